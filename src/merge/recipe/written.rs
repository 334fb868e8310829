//! Writes tensors that were learned, in the place of those that are merged.

use super::card::CARD;
use super::job::Job;
use super::run::{CONFIG, Progress};
use crate::error::{Error, Result};
use crate::files;
use crate::gpu::Gpu;
use crate::merge::{REVERSIBLE, ReversibleModels, Shards, Weights};
use crate::models::adapter::WEIGHTS;
use crate::models::network::{NETWORK, Network};
use crate::store::{Entry, FileDType, INDEX, bf16_bytes, index_of, save, sharded};
use crate::tensor::Tensor;
use half::f16;
use std::collections::BTreeMap;
use std::path::Path;

impl Job {
    /// Writes these tensors to the folder `out`, with the types that the outputs of the same names have, and the files beside them,
    /// by the rules of [`Job::run`]. `network` is a description that belongs to them.
    ///
    /// # Errors
    /// When a tensor is NaN or infinite, or too large for its type; as [`Job::run`]. `out` is then left intact.
    pub fn write(
        &self,
        weights: &BTreeMap<String, Tensor>,
        network: Option<&Network>,
        out: &Path,
        shard_bytes: u64,
        config: &str,
        progress: &mut Progress,
    ) -> Result<()> {
        self.check()?;
        self.check_out(out, shard_bytes)?;
        let has_card = !files::is_ours(out, CARD);
        let all: Vec<(&String, &Tensor, FileDType)> =
            weights.iter().map(|(name, x)| (name, x, self.dtype_of(name))).collect();
        let bytes = |(_, x, dtype): &(&String, &Tensor, FileDType)| (x.count() * dtype.bits() / 8) as u64;
        files::replace_folder(out, |folder| {
            let shards = sharded(all.iter().map(bytes), shard_bytes);
            let notes = self.file_notes();
            for (file, tensors) in &shards {
                let mut entries = Vec::new();
                for &i in tensors {
                    let (name, x, dtype) = all[i];
                    progress(bytes(&all[i]))?;
                    entries.push(Entry::bytes(name.clone(), dtype, x.shape(), encoded(name, x, dtype)?));
                }
                save(folder.join(file), entries, &notes)?;
            }
            if shards.len() > 1 {
                let places = shards.iter().flat_map(|(file, all)| all.iter().map(move |&i| (i, file)));
                let map = places.map(|(i, file)| (all[i].0.as_str(), file.as_str())).collect();
                files::replace_with(&folder.join(INDEX), index_of(map, all.iter().map(bytes).sum()))?;
            }
            self.copy_settings(folder)?;
            self.write_card(has_card, folder, config)?;
            if let Some(network) = network {
                files::replace_with(&folder.join(NETWORK), network.to_json())?;
            }
            files::replace_with(&folder.join(CONFIG), config)
        })
    }

    /// Merges the models so that each can be rebuilt, by `merge_method: rmm`.
    ///
    /// # Errors
    /// As [`ReversibleModels::new`], and when `basis` is no number from 1 on.
    pub fn reversible(&self, gpu: &Gpu, sources: &[&dyn Weights]) -> Result<ReversibleModels> {
        self.check()?;
        let models = self.merged_models(sources)?;
        let paths = self.config.slices[0].sources.iter().filter(|source| !self.config.is_base_only(source));
        let named = |source: &super::config::Source| {
            source.model.file_stem().map_or_else(String::new, |n| n.to_string_lossy().into())
        };
        let models: Vec<(String, &dyn Weights)> = paths.map(named).zip(models).collect();
        let base = self.config.base.as_ref().map(|_| sources[0]);
        let p = self.count("basis", models.len().div_ceil(2))?;
        ReversibleModels::new(gpu, base, &models, p)
    }

    /// Writes reversibly merged models to the folder `out`, with the files beside them.
    ///
    /// # Errors
    /// As [`Job::run`].
    pub fn write_reversible(&self, models: &ReversibleModels, out: &Path, config: &str) -> Result<()> {
        files::check_folder(out, [REVERSIBLE, CONFIG])?;
        files::replace_folder(out, |folder| {
            models.save(folder.join(REVERSIBLE))?;
            self.copy_settings(folder)?;
            files::replace_with(&folder.join(CONFIG), config)
        })
    }

    /// Writes the card of the output, unless it has one of the user's.
    pub(super) fn write_card(&self, has_card: bool, folder: &Path, config: &str) -> Result<()> {
        match has_card {
            true => Ok(()),
            false => files::replace_with(&folder.join(CARD), self.card(config)),
        }
    }

    /// Reads the output back: every tensor is there with its shape and type, and `config.json` is JSON.
    ///
    /// # Errors
    /// With what is not as it was to be written.
    pub fn check_written(&self, out: &Path) -> Result<()> {
        let file = if self.leader().is_adapter { out.join(WEIGHTS) } else { out.to_path_buf() };
        let written = Shards::open(&file)?;
        for output in &self.outputs {
            let info = written.info(&output.name)?;
            if info.shape != output.shape || info.dtype != output.dtype {
                let message = format!(
                    "`{}` is {} {:?} there, and was to be {} {:?}",
                    output.name, info.dtype, info.shape, output.dtype, output.shape
                );
                return Err(Error::format(out, message));
            }
            written.bytes(&output.name)?;
        }
        let settings = out.join("config.json");
        match std::fs::read(&settings) {
            Ok(bytes) => serde_json::from_slice::<serde_json::Value>(&bytes)
                .map(drop)
                .map_err(|e| Error::format(&settings, e.to_string())),
            Err(_) => Ok(()),
        }
    }

    /// The type of a tensor of the output.
    fn dtype_of(&self, name: &str) -> FileDType {
        let found = self.outputs.iter().find(|output| output.name == name);
        let float = |dtype: &FileDType| matches!(dtype, FileDType::F32 | FileDType::F16 | FileDType::BF16);
        found.map(|output| output.dtype).filter(float).or(self.config.dtype).unwrap_or(FileDType::F32)
    }
}

fn encoded(name: &str, x: &Tensor, dtype: FileDType) -> Result<Vec<u8>> {
    let values = x.to_vec::<f32>()?;
    let (bytes, fits): (Vec<u8>, fn(f32) -> bool) = match dtype {
        FileDType::BF16 => (bf16_bytes(&values), |x| half::bf16::from_f32(x).is_finite()),
        FileDType::F16 => (values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(), |x| {
            f16::from_f32(x).is_finite()
        }),
        _ => (bytemuck::cast_slice(&values).to_vec(), f32::is_finite),
    };
    match values.iter().position(|&x| !fits(x)) {
        None => Ok(bytes),
        Some(at) => Err(Error::config(format!(
            "tensor `{name}`: element {at} is {}, no number of {dtype}; look at the parameters and the data",
            values[at]
        ))),
    }
}
