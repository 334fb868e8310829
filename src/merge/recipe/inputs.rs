//! What goes into a merge of one tensor and what comes out, for every method.

use super::arguments::Arguments;
use super::methods;
use crate::error::Result;
use crate::tensor::Tensor;

/// Makes a pass: calls its argument with one [`Inputs`] after the other.
pub type EachInputs<'a> = dyn FnMut(&mut dyn FnMut(&Inputs) -> Result<()>) -> Result<()> + 'a;

/// Samples a tensor of the base and of all models: pieces of a length that begin at these elements. `None` if they are not on the host.
pub type SampleInputs<'a> = dyn Fn(usize, &[usize]) -> Result<Option<[Vec<Vec<f32>>; 2]>> + 'a;

/// A merged tensor, or a part of it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Merged {
    /// Its elements.
    pub tensor: Tensor,
    /// What [`Tensor::non_finite`] says of the base and of the models, one after the other, if the method knows it already.
    pub finite: Option<Tensor>,
}

impl From<Tensor> for Merged {
    fn from(tensor: Tensor) -> Merged {
        Merged { tensor, finite: None }
    }
}

/// The tensors that one output is made of, or the same part of each.
#[derive(Debug)]
pub struct Inputs {
    /// The base's tensor, if the configuration has a base.
    pub base: Option<Tensor>,
    /// The models' tensors. If the method merges task vectors, the base is not among them.
    pub models: Vec<Tensor>,
    /// The models' Fisher diagonals, for [`Method::Fisher`](super::method::Method::Fisher); a clean and a pretrained model's, for
    /// [`Method::Signature`](super::method::Method::Signature).
    pub others: Vec<Tensor>,
}

impl Inputs {
    /// The clean model's change from the pretrained model, and then each robust model's. Without a pretrained model, they are the
    /// tensors themselves.
    pub(super) fn changes(&self, a: &Arguments) -> Vec<Tensor> {
        let [has_clean, has_pre] = a.signature;
        let clean = if has_clean { self.others.first() } else { self.base.as_ref() };
        let pre = self.others.last().filter(|_| has_pre);
        let all = clean.into_iter().chain(&self.models);
        all.map(|x| pre.map_or_else(|| x.clone(), |pre| x.sub(pre))).collect()
    }

    /// Computes the task vectors; none without a base.
    pub(super) fn deltas(&self) -> Vec<Tensor> {
        self.base.as_ref().map(|base| methods::task_vectors(base, &self.models)).unwrap_or_default()
    }
}
