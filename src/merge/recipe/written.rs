//! Writes tensors that were learned, in the place of those that are merged.

use super::card::CARD;
use super::job::{Job, Output};
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
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// What stands in the place of merged tensors.
#[derive(Clone, Copy, Debug)]
pub struct Written<'a> {
    /// The tensors.
    pub weights: &'a BTreeMap<String, Tensor>,
    /// A description of the steps that they belong to, if these are not the models' own.
    pub network: Option<&'a Network>,
    /// What was learned, which is written beside them.
    pub record: &'a Value,
}

/// The name of the file that says what was learned.
pub const LEARNED: &str = "tiebeam_learned.json";

impl Job {
    /// Writes these tensors to the folder `out`, with the types that the outputs of the same names have, what is not merged, such as
    /// integers, and the files beside them, by the rules of [`Job::run`].
    ///
    /// # Errors
    /// When a tensor is NaN or infinite, or too large for its type; as [`Job::run`]. `out` is then left intact.
    pub fn write(
        &self,
        written: &Written,
        out: &Path,
        shard_bytes: u64,
        config: &str,
        progress: &mut Progress,
    ) -> Result<()> {
        self.check()?;
        self.check_out(out, shard_bytes)?;
        files::check_folder(out, [LEARNED, NETWORK])?;
        let has_card = !files::is_ours(out, CARD);
        let all = self.parts_of(written);
        files::replace_folder(out, |folder| {
            let shards = sharded(all.iter().map(Piece::bytes), shard_bytes);
            let notes = self.file_notes();
            for (file, pieces) in &shards {
                let file = if self.leader().is_adapter { WEIGHTS } else { file };
                let mut entries = Vec::new();
                for piece in pieces.iter().map(|&i| &all[i]) {
                    progress(piece.bytes())?;
                    entries.push(piece.entry(self)?);
                }
                save(folder.join(file), entries, &notes)?;
            }
            if shards.len() > 1 {
                let places = shards.iter().flat_map(|(file, all)| all.iter().map(move |&i| (i, file)));
                let map = places.map(|(i, file)| (all[i].name, file.as_str())).collect();
                files::replace_with(&folder.join(INDEX), index_of(map, self.written_bytes(written)))?;
            }
            self.copy_settings(folder)?;
            self.write_card(has_card, folder, config)?;
            if let Some(network) = written.network {
                files::replace_with(&folder.join(NETWORK), network.to_json())?;
            }
            if !written.record.is_null() {
                files::replace_with(&folder.join(LEARNED), format!("{:#}\n", written.record))?;
            }
            files::replace_with(&folder.join(CONFIG), config)
        })
    }

    /// Size of what [`Job::write`] writes, in bytes.
    pub fn written_bytes(&self, written: &Written) -> u64 {
        self.parts_of(written).iter().map(Piece::bytes).sum()
    }

    /// The tensors, and the outputs that are copied.
    fn parts_of<'a>(&'a self, written: &Written<'a>) -> Vec<Piece<'a>> {
        let own = written.weights.iter().map(|(name, x)| {
            let shape = x.shape().to_vec();
            Piece { name, dtype: self.dtype_of(name), shape, source: Source::Learned(x) }
        });
        let is_copied = |(_, output): &(usize, &Output)| {
            output.arguments.is_none() && !written.weights.contains_key(&output.name)
        };
        let copied = self.outputs.iter().enumerate().filter(is_copied).map(|(i, output)| Piece {
            name: &output.name,
            dtype: output.dtype,
            shape: output.shape.clone(),
            source: Source::Copied(i),
        });
        let mut all: Vec<Piece> = own.chain(copied).collect();
        all.sort_by(|a, b| a.name.cmp(b.name));
        all
    }

    /// Writes the card of the output, unless it has one of the user's.
    pub(super) fn write_card(&self, has_card: bool, folder: &Path, config: &str) -> Result<()> {
        match has_card {
            true => Ok(()),
            false => files::replace_with(&folder.join(CARD), self.card(config)),
        }
    }

    /// Reads the output of [`Job::run`] back: every tensor is there with its shape and type, and `config.json` is JSON.
    ///
    /// # Errors
    /// With what is not as it was to be written.
    pub fn check_written(&self, out: &Path) -> Result<()> {
        let all = self.outputs.iter().map(|output| (output.name.as_str(), output.dtype, &output.shape[..]));
        self.check_tensors(out, all)
    }

    /// Reads the output of [`Job::write`] back.
    ///
    /// # Errors
    /// As [`Job::check_written`].
    pub fn check_learned(&self, written: &Written, out: &Path) -> Result<()> {
        let all = self.parts_of(written);
        self.check_tensors(out, all.iter().map(|piece| (piece.name, piece.dtype, &piece.shape[..])))
    }

    fn check_tensors<'a>(
        &self,
        out: &Path,
        tensors: impl Iterator<Item = (&'a str, FileDType, &'a [usize])>,
    ) -> Result<()> {
        let file = if self.leader().is_adapter { out.join(WEIGHTS) } else { out.to_path_buf() };
        let written = Shards::open(&file)?;
        for (name, dtype, shape) in tensors {
            let info = written.info(name)?;
            if info.shape != shape || info.dtype != dtype {
                let message = format!(
                    "`{name}` is {} {:?} there, and was to be {dtype} {shape:?}",
                    info.dtype, info.shape
                );
                return Err(Error::format(out, message));
            }
            written.bytes(name)?;
        }
        let settings = out.join("config.json");
        match std::fs::read(&settings) {
            Ok(bytes) => serde_json::from_slice::<Value>(&bytes)
                .map(drop)
                .map_err(|e| Error::format(&settings, e.to_string())),
            Err(_) => Ok(()),
        }
    }

    /// Merges the models so that each can be rebuilt, by `merge_method: rmm`.
    ///
    /// # Errors
    /// As [`ReversibleModels::new`], and when `basis` is no number from 1 on.
    pub fn reversible(
        &self,
        gpu: &Gpu,
        sources: &[&dyn Weights],
        on: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<ReversibleModels> {
        self.check()?;
        let models = self.merged_models(sources)?;
        if self.config.dtype.is_some() {
            return Err(Error::config("`rmm`: bases are kept in f32; leave out `dtype`"));
        }
        let paths = self.config.slices[0].sources.iter().filter(|source| !self.config.is_base_only(source));
        let names = distinct(paths.map(|source| model_name(&source.model)).collect());
        let models: Vec<(String, &dyn Weights)> = names.into_iter().zip(models).collect();
        let base = self.config.base.as_ref().map(|_| sources[0]);
        let p = self.count("basis", models.len().div_ceil(2))?;
        let mut kept = ReversibleModels::new(gpu, base, &models, p, on)?;
        if base.is_some() {
            kept.base = Some(self.leader().checkpoint.fingerprint()?);
        }
        Ok(kept)
    }

    /// Writes reversibly merged models to the folder `out`, with the files beside them.
    ///
    /// # Errors
    /// As [`Job::run`].
    pub fn write_reversible(&self, models: &ReversibleModels, out: &Path, config: &str) -> Result<()> {
        files::check_folder(out, [REVERSIBLE, CONFIG])?;
        let has_card = !files::is_ours(out, CARD);
        files::replace_folder(out, |folder| {
            models.save(folder.join(REVERSIBLE))?;
            self.copy_settings(folder)?;
            self.write_card(has_card, folder, config)?;
            files::replace_with(&folder.join(CONFIG), config)
        })
    }

    /// The type of a tensor of the output.
    fn dtype_of(&self, name: &str) -> FileDType {
        let found = self.outputs.iter().find(|output| output.name == name);
        let float = |dtype: &FileDType| matches!(dtype, FileDType::F32 | FileDType::F16 | FileDType::BF16);
        found.map(|output| output.dtype).filter(float).or(self.config.dtype).unwrap_or(FileDType::F32)
    }
}

/// A tensor that is written.
struct Piece<'a> {
    name: &'a str,
    dtype: FileDType,
    shape: Vec<usize>,
    source: Source<'a>,
}

enum Source<'a> {
    Learned(&'a Tensor),
    /// The output of this number.
    Copied(usize),
}

impl Piece<'_> {
    fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bits() / 8) as u64
    }

    fn entry(&self, job: &Job) -> Result<Entry<'static>> {
        let bytes = match self.source {
            Source::Learned(x) => encoded(self.name, x, self.dtype)?,
            Source::Copied(i) => job.copied(i)?,
        };
        Ok(Entry::bytes(self.name, self.dtype, &self.shape, bytes))
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

/// A model's name: that of its folder, or of its file if that says more than `model`.
pub(super) fn model_name(path: &Path) -> String {
    let text =
        |part: Option<&std::ffi::OsStr>| part.map_or_else(String::new, |p| p.to_string_lossy().into_owned());
    let own = text(path.file_name());
    match own.strip_suffix(".safetensors") {
        Some("model" | "adapter_model") => text(path.parent().and_then(Path::file_name)),
        Some(stem) => stem.to_string(),
        None => own,
    }
}

/// Names of which no two are equal: of equal ones, each but the first has its number behind it.
fn distinct(names: Vec<String>) -> Vec<String> {
    let mut seen = Vec::new();
    for name in names {
        let mut own = name.clone();
        let mut number = 2;
        while seen.contains(&own) {
            own = format!("{name}-{number}");
            number += 1;
        }
        seen.push(own);
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_models_apart() {
        let named = |path: &str| model_name(Path::new(path));
        assert_eq!(named("x/SmolLM2-1.7B"), "SmolLM2-1.7B");
        assert_eq!(named("x1/model.safetensors"), "x1");
        assert_eq!(named("zoo/blur.safetensors"), "blur");
        let names = ["a", "b", "a", "a-2"].map(String::from).to_vec();
        assert_eq!(distinct(names), ["a", "b", "a-2", "a-2-2"]);
    }
}
