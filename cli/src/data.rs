//! Labelled rows for evaluating multilayer perceptrons.

use std::path::{Path, PathBuf};
use tiebeam::merge::{MlpModel, evaluate};
use tiebeam::{Error, Gpu, Result, Tensor};

/// Inputs and labels of a safetensors file with `x [rows, ..]` and `y [rows]`.
pub struct Data {
    pub path: PathBuf,
    pub x: Tensor,
    pub labels: Vec<u32>,
}

impl Data {
    pub fn read(gpu: &Gpu, path: &Path, net: &MlpModel) -> Result<Data> {
        let data = evaluate::Data::open(gpu, path, "x", "y")?;
        data.check(net).map_err(|error| Error::format(path, error.to_string()))?;
        Ok(Data { path: path.to_path_buf(), x: data.inputs, labels: data.labels })
    }

    /// The file's name without its ending.
    pub fn name(&self) -> String {
        self.path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
    }
}
