//! Labelled rows for evaluating multilayer perceptrons.

use std::path::{Path, PathBuf};
use tiebeam::merge::MlpModel;
use tiebeam::store::File;
use tiebeam::{Error, Gpu, Result, Tensor};

/// Inputs and labels of a safetensors file with `x [rows, inputs]` in floats and `y [rows]` in whole numbers.
pub struct Data {
    pub path: PathBuf,
    pub x: Tensor,
    pub labels: Vec<u32>,
}

impl Data {
    pub fn read(gpu: &Gpu, path: &Path, net: &MlpModel) -> Result<Data> {
        let file = File::open(path)?;
        let wrong = |message: String| Error::format(path, message);
        let shape = &file.info("x")?.shape;
        let (x, labels) = (file.tensor_f32("x")?, file.tensor_u32("y")?);
        let (rows, inputs) = (labels.len(), net.sizes()[0]);
        if rows == 0 || shape.first() != Some(&rows) || x.len() != rows * inputs {
            return Err(wrong(format!(
                "x is {shape:?} with {rows} labels; the network reads [{rows}, {inputs}]"
            )));
        }
        let classes = net.sizes()[net.sizes().len() - 1];
        if let Some(at) = labels.iter().position(|&label| label as usize >= classes) {
            return Err(wrong(format!(
                "label {} of row {at} is none of the network's {classes}",
                labels[at]
            )));
        }
        let x = Tensor::from_slice(gpu, &x, [rows, inputs]);
        Ok(Data { path: path.to_path_buf(), x, labels })
    }

    /// The file's name without its ending.
    pub fn name(&self) -> String {
        self.path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
    }
}
