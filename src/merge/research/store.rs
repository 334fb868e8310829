//! Reversibly merged models in a file, from which each of them is rebuilt.

use super::reversible::Reversible;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::merge::Weights;
use crate::store::{Entry, File, FileDType, save};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

/// Several models of one shape as a small basis for each row of their task vectors ([`Reversible`]).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ReversibleModels {
    /// The names of the models.
    pub names: Vec<String>,
    /// Whether they are task vectors of a base.
    pub has_base: bool,
    /// A hash of the base's weights ([`Shards::fingerprint`](crate::merge::Shards::fingerprint)), if it is known.
    pub base: Option<u128>,
    tensors: BTreeMap<String, Stored>,
}

/// One tensor of all models.
#[derive(Clone, Debug)]
struct Stored {
    shape: Vec<usize>,
    /// Whether its columns are what has a basis, and not its rows.
    by_columns: bool,
    merged: Reversible,
}

/// The name of the file in a folder.
pub const REVERSIBLE: &str = "reversible.safetensors";

const NAMES: &str = "tiebeam.reversible.names";
const SHAPES: &str = "tiebeam.reversible.shapes";
const COLUMNS: &str = "tiebeam.reversible.columns";
const BASE: &str = "tiebeam.reversible.base";
const OF_BASE: &str = "tiebeam.reversible.of_base";

/// Whether the columns of a tensor are vectors: of `B` of LoRA, as the paper has it.
fn is_by_columns(name: &str) -> bool {
    name.contains(".lora_B.")
}

/// Elements of a tensor as rows. A tensor of one axis is one row.
fn rows(x: &Tensor, by_columns: bool) -> Tensor {
    let first = if x.shape().len() > 1 { x.shape()[0] } else { 1 };
    let matrix = x.reshape([first, x.count() / first.max(1)]);
    if by_columns { matrix.t().contiguous() } else { matrix }
}

impl ReversibleModels {
    /// Computes a basis of `p` vectors for each row of the models' task vectors relative to `base`, or of the models themselves. `on` is
    /// told how many tensors are done of how many.
    ///
    /// # Errors
    /// When the models differ in names or shapes, `p` is not in `1..=n`, or the device fails; what `on` returns.
    pub fn new(
        gpu: &Gpu,
        base: Option<&dyn Weights>,
        models: &[(String, &dyn Weights)],
        p: usize,
        on: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<ReversibleModels> {
        let Some((_, first)) = models.first() else { return Err(Error::config("rmm: there are no models")) };
        if !(1..=models.len()).contains(&p) {
            return Err(Error::config(format!("rmm: a basis of {p} for {} models", models.len())));
        }
        let mut tensors = BTreeMap::new();
        let all_names = first.float_names();
        for (done, name) in all_names.iter().cloned().enumerate() {
            let shape = first.shape(&name)?;
            let by_columns = is_by_columns(&name);
            let zero = base.map(|base| base.read(gpu, &name)).transpose()?;
            let one = |(model, weights): &(String, &dyn Weights)| {
                let x = weights.read(gpu, &name)?;
                if x.shape()[..] != shape[..] {
                    return Err(Error::config(format!(
                        "`{name}` is {} in {model}, {shape:?} in another",
                        x.shape()
                    )));
                }
                let x = zero.as_ref().map_or(x.clone(), |zero| x.sub(zero));
                Ok(rows(&x.detach(), by_columns))
            };
            let all = models.iter().map(one).collect::<Result<Vec<Tensor>>>()?;
            if let Some(model) = all.iter().position(|x| x.count() > 0 && !finite(x)) {
                return Err(Error::config(format!("`{name}` of {} is NaN or infinite", models[model].0)));
            }
            tensors.insert(name, Stored { shape, by_columns, merged: Reversible::new(&all, p)? });
            on(done + 1, all_names.len())?;
        }
        let names = models.iter().map(|(name, _)| name.clone()).collect();
        Ok(ReversibleModels { names, has_base: base.is_some(), base: None, tensors })
    }

    /// How many numbers are stored, and how many the models have.
    pub fn numbers(&self) -> [usize; 2] {
        let stored = self.tensors.values().map(|one| one.merged.stored()).sum();
        let all = self.tensors.values().map(|one| one.shape.iter().product::<usize>()).sum::<usize>();
        [stored, all * self.names.len()]
    }

    /// Rebuilds a model, by its number. `base` is that of [`ReversibleModels::new`].
    ///
    /// # Errors
    /// When there is no such model, or the base has other tensors.
    pub fn model(&self, gpu: &Gpu, i: usize, base: Option<&dyn Weights>) -> Result<BTreeMap<String, Tensor>> {
        if i >= self.names.len() {
            return Err(Error::config(format!("rmm: model {i} of {}", self.names.len())));
        }
        let one = |(name, stored): (&String, &Stored)| {
            let x = stored.merged.model(i);
            let x = if stored.by_columns { x.t().contiguous() } else { x };
            let x = x.reshape(&stored.shape[..]);
            let x = match base.map(|base| base.read(gpu, name)).transpose()? {
                Some(base) if base.shape() != x.shape() => {
                    let message =
                        format!("`{name}` is {} in the base, {} in the models", base.shape(), x.shape());
                    return Err(Error::config(message));
                }
                Some(base) => x.add(&base),
                None => x,
            };
            x.evaluate();
            Ok((name.clone(), x))
        };
        self.tensors.iter().map(one).collect()
    }

    /// The number of the model of this name, or with this number.
    ///
    /// # Errors
    /// When there is none; the message lists the names.
    pub fn find(&self, name: &str) -> Result<usize> {
        let by_name = self.names.iter().position(|own| own == name);
        let by_number = || name.parse().ok().filter(|&i: &usize| i < self.names.len());
        by_name.or_else(by_number).ok_or_else(|| {
            let names = self.names.iter().enumerate().map(|(i, own)| format!("{i}: {own}"));
            Error::config(format!("no model `{name}`; there are {}", names.collect::<Vec<_>>().join(", ")))
        })
    }

    /// Writes a safetensors file. It is replaced atomically.
    ///
    /// # Errors
    /// When it cannot be written, or the device fails.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut entries = Vec::new();
        for (name, stored) in &self.tensors {
            for (kind, x) in [(BASIS, stored.merged.basis()), (COEFFICIENTS, stored.merged.coefficients())] {
                let bytes = bytemuck::cast_slice::<f32, u8>(&x.to_vec::<f32>()?).to_vec();
                entries.push(Entry::bytes(format!("{name}{kind}"), FileDType::F32, &x.shape()[..], bytes));
            }
        }
        let shapes: BTreeMap<&String, &Vec<usize>> =
            self.tensors.iter().map(|(n, s)| (n, &s.shape)).collect();
        let columns: Vec<&String> =
            self.tensors.iter().filter(|(_, s)| s.by_columns).map(|(n, _)| n).collect();
        let text = |value: serde_json::Value| value.to_string();
        let notes = [
            (NAMES.to_string(), text(serde_json::json!(self.names))),
            (SHAPES.to_string(), text(serde_json::json!(shapes))),
            (COLUMNS.to_string(), text(serde_json::json!(columns))),
            (OF_BASE.to_string(), self.has_base.to_string()),
        ];
        let mut notes: BTreeMap<String, String> = notes.into();
        if let Some(base) = self.base {
            notes.insert(BASE.into(), format!("{base:032x}"));
        }
        save(path, entries, &notes)
    }

    /// Reads a file of [`ReversibleModels::save`].
    ///
    /// # Errors
    /// When it cannot be read, or is no such file.
    pub fn load(gpu: &Gpu, path: impl AsRef<Path>) -> Result<ReversibleModels> {
        let file = File::open(path.as_ref())?;
        let wrong = |what: &str| Error::format(file.path(), format!("no reversibly merged models: {what}"));
        let text = |key: &str| file.metadata().get(key).ok_or_else(|| wrong(&format!("`{key}` is missing")));
        let read = |key: &str| serde_json::from_str(text(key)?).map_err(|e| wrong(&e.to_string()));
        let names: Vec<String> = serde_json::from_value(read(NAMES)?).map_err(|e| wrong(&e.to_string()))?;
        let shapes: BTreeMap<String, Vec<usize>> =
            serde_json::from_value(read(SHAPES)?).map_err(|e| wrong(&e.to_string()))?;
        let columns: Vec<String> =
            serde_json::from_value(read(COLUMNS)?).map_err(|e| wrong(&e.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, shape) in shapes {
            let by_columns = columns.contains(&name);
            let part = |kind: &str| {
                let name = format!("{name}{kind}");
                Ok(Tensor::from_slice(gpu, &file.tensor_f32(&name)?, &file.info(&name)?.shape[..]))
            };
            let [basis, coefficients] = [part(BASIS)?, part(COEFFICIENTS)?];
            let count = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
            let first = if shape.len() > 1 { shape[0] } else { 1 };
            let merged = Reversible::of(basis, coefficients)
                .filter(|merged| merged.models() == names.len() && Some(merged.count()) == count)
                .filter(|merged| by_columns || merged.rows() == first)
                .ok_or_else(|| wrong(&format!("`{name}` has other sizes than it says")))?;
            tensors.insert(name, Stored { shape, by_columns, merged });
        }
        let base = file.metadata().get(BASE).map(|text| u128::from_str_radix(text, 16));
        let base = base.transpose().map_err(|_| wrong("what it says of its base is no hash"))?;
        Ok(ReversibleModels { names, has_base: text(OF_BASE)? == "true", base, tensors })
    }
}

const BASIS: &str = "/basis";
const COEFFICIENTS: &str = "/coefficients";

fn finite(x: &Tensor) -> bool {
    x.non_finite().to_vec::<u32>().is_ok_and(|words| words[0] == 0)
}
