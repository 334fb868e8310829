//! Evaluates a merged model and its inputs on data. The models are classifying networks that [`MlpModel`] knows.

use super::barrier::Evaluation;
use super::mlp::MlpModel;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::merge::Weights;
use crate::store::{File, FileDType};
use crate::tensor::Tensor;

/// Inputs and labels.
#[derive(Clone, Debug)]
pub struct Data {
    /// `[rows, width]`
    pub inputs: Tensor,
    /// `[rows]`
    pub labels: Vec<u32>,
}

impl Data {
    /// Reads inputs and labels by their names in a file. Inputs of an integer type are divided by their largest.
    ///
    /// # Errors
    /// When a name is missing or the shapes or types do not fit.
    pub fn open(gpu: &Gpu, path: impl AsRef<std::path::Path>, inputs: &str, labels: &str) -> Result<Data> {
        let file = File::open(path.as_ref())?;
        let shape = file.info(inputs)?.shape.clone();
        let float = matches!(
            file.info(inputs)?.dtype,
            FileDType::F64 | FileDType::F32 | FileDType::F16 | FileDType::BF16
        );
        let values = if float {
            file.tensor_f32(inputs)?
        } else {
            let whole = file.tensor_u32(inputs)?;
            let most = whole.iter().copied().max().unwrap_or(0).max(1) as f32;
            whole.into_iter().map(|x| x as f32 / most).collect()
        };
        let [rows, _] = shape[..] else {
            return Err(Error::format(
                file.path(),
                format!("`{inputs}` is {shape:?}; it must be [rows, width]"),
            ));
        };
        file.expect(labels, &[rows])?;
        let labels = file.tensor_u32(labels)?;
        Ok(Data { inputs: Tensor::from_slice(gpu, &values, &shape[..]), labels })
    }

    /// Computes loss and accuracy of a multilayer perceptron.
    ///
    /// # Errors
    /// When the weights are not a multilayer perceptron or do not fit these inputs and labels, or a file or the device fails.
    pub fn evaluate(&self, gpu: &Gpu, weights: &dyn Weights) -> Result<Evaluation> {
        let network = MlpModel::of(weights)?;
        let (want, have) = (network.sizes()[0], self.inputs.shape()[1]);
        if want != have {
            return Err(Error::config(format!("evaluate: the network has {want} inputs, the data {have}")));
        }
        Evaluation::of(&network.logits(gpu, weights, &self.inputs)?, &self.labels)
    }
}
