//! LoRA adapters of any model, as changes of its named weights: read, written and extracted without knowing what the model computes.

use super::config::{AdapterKind, SETTINGS, Said};
use super::file::{BASE, WEIGHTS};
use crate::error::{Error, Result};
use crate::files;
use crate::gpu::Gpu;
use crate::store::{Entry, File, Weights, nearest, save};
use crate::tape::no_grad;
use crate::tensor::Tensor;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The factors of one weight in the file.
#[derive(Clone, Debug)]
struct Factors {
    /// Names of `A [rank, in]` and `B [out, rank]`.
    names: [String; 2],
    scale: f32,
}

/// A LoRA adapter in the files of PEFT, by the names of the weights that it changes: `W + scale B A`.
#[derive(Debug)]
pub struct Lora {
    folder: PathBuf,
    file: File,
    parts: BTreeMap<String, Factors>,
}

/// What stands before a model's own names in PEFT's files.
const PREFIX: &str = "base_model.model.";

impl Lora {
    /// Whether a folder holds an adapter and no model.
    pub fn is_at(folder: &Path) -> bool {
        folder.join(SETTINGS).is_file() && folder.join(WEIGHTS).is_file()
    }

    /// Opens a folder. The names are those of the model that the adapter was trained on; [`Lora::fit`] finds them in a model.
    ///
    /// # Errors
    /// When a file cannot be read; for another kind of adapter, and for tensors that are no factors.
    pub fn open(folder: impl AsRef<Path>) -> Result<Lora> {
        let folder = folder.as_ref();
        let said = Said::open(folder)?;
        if !matches!(said.config.kind, AdapterKind::Lora { .. }) {
            return Err(Error::config(format!(
                "{}: only LoRA is added to weights by name; put other adapters on their model by `tiebeam convert MODEL --untie \
                 --adapter FOLDER`",
                folder.display()
            )));
        }
        let file = File::open(folder.join(WEIGHTS))?;
        let wrong = |message: String| Err(Error::format(file.path(), message));
        let mut found: BTreeMap<String, [Option<String>; 2]> = BTreeMap::new();
        for name in file.names() {
            let own = name.strip_prefix(PREFIX).unwrap_or(name);
            let part = [".lora_A.", ".lora_B."].iter().position(|mark| own.contains(mark));
            let Some(part) = part.filter(|_| own.ends_with(".weight")) else {
                return wrong(format!("`{name}` is no factor of LoRA, and is not added to weights"));
            };
            let path = own.split(".lora_").next().unwrap_or_default();
            found.entry(path.to_string()).or_default()[part] = Some(name.to_string());
        }
        let mut parts = BTreeMap::new();
        for (path, names) in found {
            let [Some(a), Some(b)] = names else { return wrong(format!("`{path}` has one factor of two")) };
            let (&[rank, _], &[_, other]) = (&file.info(&a)?.shape[..], &file.info(&b)?.shape[..]) else {
                return wrong(format!("the factors of `{path}` are no matrices"));
            };
            if rank != other || rank == 0 {
                return wrong(format!("the factors of `{path}` have the ranks {rank} and {other}"));
            }
            let scale = said.scale(&path, rank).map_err(|message| Error::format(file.path(), message))?;
            parts.insert(format!("{path}.weight"), Factors { names: [a, b], scale });
        }
        match parts.is_empty() {
            true => wrong("there are no factors of LoRA".into()),
            false => Ok(Lora { folder: folder.to_path_buf(), file, parts }),
        }
    }

    /// Finds the weights in a model, whose names may begin with `model.` where the adapter's do not, or the other way round.
    ///
    /// # Errors
    /// When the model lacks a weight or has it in another size: the adapter is of another base.
    pub fn fit(&mut self, model: &dyn Weights) -> Result<()> {
        let all: BTreeSet<String> = model.names().into_iter().collect();
        let mut parts = BTreeMap::new();
        for (name, factors) in std::mem::take(&mut self.parts) {
            let with = format!("model.{name}");
            let without = name.strip_prefix("model.").unwrap_or(&name).to_string();
            let found = [name.clone(), with, without].into_iter().find(|name| all.contains(name));
            let place = self.folder.display();
            let Some(found) = found else {
                let near = nearest(&name, all.iter().map(String::as_str));
                return Err(Error::config(format!(
                    "{place}: this adapter changes `{name}`, which the model does not have (near: {near}); it is of another model"
                )));
            };
            let (shape, size) = (model.shape(&found)?, self.size(&factors)?);
            if shape != size {
                return Err(Error::config(format!(
                    "{place}: this adapter's part of `{found}` is {size:?}, and the model has {shape:?}; it is of another model"
                )));
            }
            parts.insert(found, factors);
        }
        self.parts = parts;
        Ok(())
    }

    fn size(&self, factors: &Factors) -> Result<[usize; 2]> {
        let [a, b] = factors.names.each_ref().map(|name| self.file.info(name).map(|info| &info.shape));
        Ok([b?[0], a?[1]])
    }

    /// The names of the weights that it changes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.keys().map(String::as_str)
    }

    /// Whether it changes this weight.
    pub fn contains(&self, name: &str) -> bool {
        self.parts.contains_key(name)
    }

    /// The change of some rows of a weight, `[rows, in]`. `None` if it changes another weight.
    ///
    /// # Errors
    /// When a factor cannot be read.
    ///
    /// # Panics
    /// When the weight has fewer rows.
    pub fn change(&self, gpu: &Gpu, name: &str, rows: Range<usize>) -> Result<Option<Tensor>> {
        let Some(Factors { names, scale }) = self.parts.get(name) else { return Ok(None) };
        let [a, b] = [self.file.read(gpu, &names[0])?, self.file.read(gpu, &names[1])?];
        Ok(Some(no_grad(|| b.slice(0, rows).matmul_f32(&a).scale(*scale))))
    }
}

/// A weight's factors that are to be written: its name, `A [rank, in]` and `B [out, rank]`.
pub type Pair = (String, Tensor, Tensor);

/// Writes factors into a folder that PEFT opens, with `W + B A` for every weight. `base` is the name of the model that they are for, and
/// the hash of its weights if it is known. `rank` is that of most weights.
///
/// # Errors
/// When a file cannot be written, or the device fails.
pub fn write_lora(folder: &Path, pairs: &[Pair], rank: usize, base: (&str, Option<u128>)) -> Result<()> {
    let mut entries = Vec::new();
    let (mut targets, mut ranks, mut alphas) = (BTreeSet::new(), BTreeMap::new(), BTreeMap::new());
    for (name, a, b) in pairs {
        let path = name.strip_suffix(".weight").unwrap_or(name);
        targets.insert(path.rsplit('.').next().unwrap_or(path).to_string());
        // A rank of its own has an alpha of its own, so that the factor stays 1.
        if a.shape()[0] != rank {
            ranks.insert(path.to_string(), a.shape()[0]);
            alphas.insert(path.to_string(), a.shape()[0]);
        }
        for (kind, x) in [("A", a), ("B", b)] {
            let bytes = bytemuck::cast_slice::<f32, u8>(&x.to_vec::<f32>()?).to_vec();
            let name = format!("{PREFIX}{path}.lora_{kind}.weight");
            entries.push(Entry::bytes(name, crate::store::FileDType::F32, &x.shape()[..], bytes));
        }
    }
    let mut said = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    if let Some(fingerprint) = base.1 {
        said.insert(BASE[0].into(), format!("{fingerprint:032x}"));
        said.insert(BASE[1].into(), base.0.into());
    }
    let settings: Value = json!({
        "base_model_name_or_path": base.0, "task_type": "CAUSAL_LM", "inference_mode": true, "bias": "none",
        "target_modules": targets, "r": rank, "peft_type": "LORA", "lora_alpha": rank, "lora_dropout": 0.0,
        "use_rslora": false, "rank_pattern": ranks, "alpha_pattern": alphas,
    });
    save(folder.join(WEIGHTS), entries, &said)?;
    files::replace_with(&folder.join(SETTINGS), format!("{settings:#}\n"))
}
