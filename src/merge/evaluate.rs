//! What a merged model is worth beside its inputs, on data: multilayer perceptrons that classify.

use super::weights::Weights;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::store::{File, FileDType};
use crate::tensor::Tensor;

/// Inputs and labels.
#[derive(Clone, Debug)]
pub struct Data {
    /// `[rows, width]`
    pub inputs: Tensor,
    /// `[rows]`, i32
    pub labels: Tensor,
}

impl Data {
    /// Inputs and labels by their names in a file; integers as inputs are divided by their largest.
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
        let labels = Tensor::from_slice(gpu, &file.tensor_i32(labels)?, [rows]);
        Ok(Data { inputs: Tensor::from_slice(gpu, &values, &shape[..]), labels })
    }
}

/// `[mean cross-entropy, share of right answers]` of the network `x = relu(x W^T + b)`, the last layer without `relu`. Its layers
/// are the tensors `NAME.weight [out, in]` in the order of their names, numbers by value, with `NAME.bias [out]` where there is
/// one.
///
/// # Errors
/// When the tensors make no such network for these inputs; the device's fault.
pub fn mlp(gpu: &Gpu, weights: &dyn Weights, data: &Data) -> Result<[f64; 2]> {
    let mut layers: Vec<String> =
        weights.names().iter().filter_map(|n| n.strip_suffix(".weight").map(String::from)).collect();
    layers.sort_by_key(|name| natural(name));
    let mut x = data.inputs.clone();
    for (i, layer) in layers.iter().enumerate() {
        let w = weights.read(gpu, &format!("{layer}.weight"))?;
        if w.shape().len() != 2 || w.shape()[1] != x.shape()[1] {
            let (w, x) = (w.shape(), x.shape());
            return Err(Error::config(format!("evaluate: `{layer}.weight` {w} is no layer for inputs {x}")));
        }
        x = x.matmul(&w.t());
        let bias = format!("{layer}.bias");
        if weights.shape(&bias).is_ok() {
            x = x.add(&weights.read(gpu, &bias)?);
        }
        if i + 1 < layers.len() {
            x = x.relu();
        }
    }
    let loss = x.cross_entropy(&data.labels, None);
    let right = x.argmax(1).cast(crate::DType::I32).eq(&data.labels).cast(crate::DType::F32).mean_all();
    Ok([f64::from(loss.item()?), f64::from(right.item()?)])
}

/// A key that orders names with their numbers by value.
fn natural(name: &str) -> Vec<(u64, String)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let words = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (text, tail) = rest.split_at(words);
        let digits = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
        let (number, tail) = tail.split_at(digits);
        key.push((0, text.to_string()));
        key.push((number.parse().unwrap_or(u64::MAX), String::new()));
        rest = tail;
    }
    key
}
