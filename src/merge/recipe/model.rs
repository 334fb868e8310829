//! A model of a merge: its files, and an adapter on it.

use super::rows::ByToken;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::merge::Shards;
use crate::merge::Weights;
use crate::models::adapter::{Base, Lora, SETTINGS, WEIGHTS};
use crate::store::{FileDType, INDEX, located};
use crate::tape::no_grad;
use crate::tensor::Tensor;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model that is read. Clones read from the same open files.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Model {
    /// The path in the configuration.
    pub path: PathBuf,
    /// Its tensors.
    pub checkpoint: Arc<Shards>,
    /// The adapter that is added to them, of a path `model+adapter`.
    pub adapter: Option<Arc<Lora>>,
    /// Whether it is an adapter itself, in the files of PEFT.
    pub is_adapter: bool,
    /// The `config.json` beside it, if there is one.
    pub(super) settings: Option<Value>,
    /// The tensors that are read with the rows of the output's tokens, by the name that they are asked for by.
    pub(super) by_token: BTreeMap<String, ByToken>,
}

/// Splits `model+adapter`. A path at which something is has no adapter in it.
pub(super) fn split(path: &Path) -> (PathBuf, Option<PathBuf>) {
    let text = path.to_string_lossy();
    match text.rsplit_once('+') {
        Some((model, adapter)) if !path.exists() && !adapter.is_empty() && Path::new(adapter).is_dir() => {
            (model.into(), Some(adapter.into()))
        }
        _ => (path.to_path_buf(), None),
    }
}

impl Model {
    /// Opens a model's files and its adapter. `names` says what of its tensors' names becomes what.
    ///
    /// # Errors
    /// When a file cannot be read, or the adapter is of another model.
    pub fn open(path: &Path, names: &[(String, String)]) -> Result<Model> {
        let (model, adapter) = split(path);
        // An adapter is a model here too, of the tensors that it has.
        let is_model = ["model.safetensors", INDEX].iter().any(|name| model.join(name).exists());
        let is_adapter = Lora::is_at(&model) && !is_model;
        let file = if is_adapter { model.join(WEIGHTS) } else { model.clone() };
        let mut checkpoint = Shards::open(&file)?;
        checkpoint.rename(names)?;
        let adapter = match adapter {
            None => None,
            Some(folder) => {
                let mut lora = Lora::open(&folder)?;
                lora.fit(&checkpoint)?;
                // An adapter of ours says which weights it was trained on.
                if let Some(base) = Base::of_adapter(&folder)?
                    && base.fingerprint != checkpoint.fingerprint()?
                {
                    return Err(Error::config(format!(
                        "{}: this adapter was trained on the weights of {}, and {} has others",
                        folder.display(),
                        base.name,
                        model.display()
                    )));
                }
                Some(Arc::new(lora))
            }
        };
        let settings = config_of(checkpoint.path());
        let (checkpoint, by_token) = (Arc::new(checkpoint), BTreeMap::new());
        Ok(Model { path: path.to_path_buf(), checkpoint, adapter, is_adapter, settings, by_token })
    }

    /// Where its own files are, without the adapter.
    pub fn place(&self) -> PathBuf {
        located(&split(&self.path).0)
    }

    /// The name of the model that the adapter says it is of, if it is not this one's and nothing else tells them apart.
    pub(super) fn other_base(&self) -> Option<String> {
        let (model, adapter) = split(&self.path);
        let folder = adapter?;
        let text = std::fs::read_to_string(folder.join(SETTINGS)).ok()?;
        let settings: Value = serde_json::from_str(&text).ok()?;
        let named = settings["base_model_name_or_path"].as_str()?.to_string();
        let own = model.file_name()?.to_string_lossy().into_owned();
        let differ = named.trim_end_matches('/').rsplit('/').next() != Some(own.as_str());
        (differ && Base::of_adapter(&folder).is_ok_and(|base| base.is_none())).then_some(named)
    }

    /// Whether a tensor is another one than the file has.
    pub(super) fn changes(&self, name: &str) -> bool {
        self.is_by_token(name) || self.is_adapted(name)
    }

    /// Whether the adapter changes a tensor.
    pub(super) fn is_adapted(&self, name: &str) -> bool {
        self.adapter.as_ref().is_some_and(|adapter| adapter.contains(name))
    }

    /// Whether a tensor is read with the rows of the output's tokens.
    pub(super) fn is_by_token(&self, name: &str) -> bool {
        self.by_token.contains_key(name)
    }

    /// The shape of a tensor as it is read, and its type in the file.
    pub(super) fn described(&self, name: &str) -> Result<(Vec<usize>, FileDType)> {
        let tensor = self.by_token.get(name).map_or(name, |table| &table.name);
        Ok((self.shape(name)?, self.checkpoint.dtype(tensor)?))
    }
}

/// Reads the `config.json` beside a model's file. `None` if there is none that is JSON.
fn config_of(file: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(file.with_file_name("config.json")).ok()?).ok()
}

impl Weights for Model {
    fn names(&self) -> Vec<String> {
        self.checkpoint.names()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        match self.by_token.get(name) {
            Some(table) => Ok(table.shape.clone()),
            None => self.checkpoint.shape(name),
        }
    }

    fn is_float(&self, name: &str) -> bool {
        self.checkpoint.is_float(self.by_token.get(name).map_or(name, |table| &table.name))
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        if let Some(ByToken { shape, .. }) = self.by_token.get(name) {
            return Ok(self.read_range(gpu, name, 0..shape.iter().product())?.reshape(&shape[..]));
        }
        let x = self.checkpoint.read(gpu, name)?;
        let rows = x.shape().first().copied().unwrap_or(0);
        match self.adapter.as_ref().map(|adapter| adapter.change(gpu, name, 0..rows)).transpose()?.flatten() {
            Some(change) => Ok(no_grad(|| x.add(&change))),
            None => Ok(x),
        }
    }

    fn sample(&self, name: &str, length: usize, starts: &[usize]) -> Result<Option<Vec<f32>>> {
        if let Some(table) = self.by_token.get(name) {
            let pieces = starts.iter().map(|&start| table.values(&self.checkpoint, start..start + length));
            return Ok(Some(pieces.collect::<Result<Vec<_>>>()?.concat()));
        }
        match self.changes(name) {
            true => Ok(None),
            false => self.checkpoint.sample(name, length, starts),
        }
    }

    fn read_range(&self, gpu: &Gpu, name: &str, range: Range<usize>) -> Result<Tensor> {
        if let Some(table) = self.by_token.get(name) {
            let n = range.len();
            return Ok(Tensor::from_slice(gpu, &table.values(&self.checkpoint, range)?, [n]));
        }
        let x = self.checkpoint.read_range(gpu, name, range.clone())?;
        let Some(adapter) = self.adapter.as_ref().filter(|adapter| adapter.contains(name)) else {
            return Ok(x);
        };
        // The change of the rows that the range touches, and of these the range.
        let columns = self.shape(name)?[1];
        let rows = range.start / columns..range.end.div_ceil(columns);
        let first = rows.start * columns;
        let Some(change) = adapter.change(gpu, name, rows)? else { return Ok(x) };
        let flat = change.reshape([change.count()]);
        Ok(no_grad(|| x.add(&flat.slice(0, range.start - first..range.end - first))))
    }
}
