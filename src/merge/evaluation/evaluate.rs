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
    /// Reads inputs `[rows, ..]` and labels `[rows]` by their names in a file. What an input has behind its rows, such as the axes of
    /// an image, becomes one axis. Inputs of an integer type are divided by their largest.
    ///
    /// # Errors
    /// When a name is missing, there is no row, or the shapes or types do not fit.
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
        let wrong = |message: String| Error::format(file.path(), message);
        let rows = match shape[..] {
            [0, ..] => return Err(wrong(format!("`{inputs}` has no row"))),
            [rows, _, ..] => rows,
            _ => return Err(wrong(format!("`{inputs}` is {shape:?}; it must be [rows, width]"))),
        };
        file.expect(labels, &[rows])?;
        let labels = file.tensor_u32(labels)?;
        Ok(Data { inputs: Tensor::from_slice(gpu, &values, [rows, values.len() / rows]), labels })
    }

    /// Checks that a network reads these inputs and that the labels are among its outputs.
    ///
    /// # Errors
    /// When it does not, or they are not.
    pub fn check(&self, network: &MlpModel) -> Result<()> {
        let sizes = network.sizes();
        let (want, have) = (sizes[0], self.inputs.shape()[1]);
        if want != have {
            return Err(Error::config(format!("the network has {want} inputs, the data {have} a row")));
        }
        let classes = sizes[sizes.len() - 1];
        match self.labels.iter().position(|&label| label as usize >= classes) {
            Some(row) => Err(Error::config(format!(
                "label {} of row {row} is none of the network's {classes}",
                self.labels[row]
            ))),
            None => Ok(()),
        }
    }

    /// Computes loss and accuracy of a multilayer perceptron.
    ///
    /// # Errors
    /// When the weights are not a multilayer perceptron or do not fit these inputs and labels, or a file or the device fails.
    pub fn evaluate(&self, gpu: &Gpu, weights: &dyn Weights) -> Result<Evaluation> {
        let network = MlpModel::of(weights)?;
        self.check(&network)?;
        Evaluation::of(&network.logits(gpu, weights, &self.inputs)?, &self.labels)
    }
}
