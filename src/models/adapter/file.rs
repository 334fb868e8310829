//! Adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

use super::config::{self, AdapterConfig, AdapterKind, SETTINGS, Said};
use super::{Adapter, Part};
use crate::error::{Error, Result};
use crate::files;
use crate::gpu::Gpu;
use crate::models::llama::half_row;
use crate::models::lm::{LINEARS, Lm};
use crate::nn::Module;
use crate::ops::sequence::rope::Pairing;
use crate::share::{ShardConfig, ShardPool};
use crate::store::{Entry, File, save};
use crate::tensor::Tensor;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The model that an adapter is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// The name of its folder or file.
    pub name: String,
    /// A hash of its weights ([`Published::fingerprint`](crate::models::llama::Published::fingerprint),
    /// [`Saved::fingerprint`](crate::models::lm::Saved::fingerprint)).
    pub fingerprint: u128,
}

impl Base {
    /// The base that an adapter's folder names. PEFT's name none.
    ///
    /// # Errors
    /// When its file of weights cannot be read, or what it says of its base is damaged.
    pub fn of_adapter(folder: impl AsRef<Path>) -> Result<Option<Base>> {
        let file = File::open(folder.as_ref().join(WEIGHTS))?;
        let said = |key: &str| file.metadata().get(key);
        let Some(text) = said(BASE[0]) else { return Ok(None) };
        let fingerprint = u128::from_str_radix(text, 16).map_err(|_| {
            Error::format(file.path(), format!("`{}` is '{text}', which is no fingerprint", BASE[0]))
        })?;
        let name = said(BASE[1]).map_or("another model", String::as_str).into();
        Ok(Some(Base { name, fingerprint }))
    }

    /// What the metadata of an adapter's weights say of its base.
    pub(crate) fn said(&self) -> [(String, String); 2] {
        [
            (BASE[0].to_string(), format!("{:032x}", self.fingerprint)),
            (BASE[1].to_string(), self.name.clone()),
        ]
    }

    /// Refuses the adapter of another base.
    ///
    /// # Errors
    /// [`Error::Config`] with both names; as [`Base::of_adapter`].
    pub fn check_adapter(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        match Base::of_adapter(folder)? {
            Some(meant) if meant.fingerprint != self.fingerprint => Err(Error::config(format!(
                "{}: this adapter is of {} (weights {:032x}), and the model is {} (weights {:032x})",
                folder.display(),
                meant.name,
                meant.fingerprint,
                self.name,
                self.fingerprint
            ))),
            _ => Ok(()),
        }
    }
}

/// The name of an adapter's weights in a folder.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// Keys of the weights' metadata that name the base.
pub(super) const BASE: [&str; 2] = ["tiebeam.base", "tiebeam.base_name"];

/// GGUF files of Llama have the rows of q and k in an order in which neighbours are rotated together. PEFT's adapters are for the
/// other order, in which row `i` of a head belongs to row `i + head / 2`.
#[derive(Clone, Copy)]
struct Order {
    /// The width of a head whose rows are put in another order.
    head: Option<usize>,
}

impl Order {
    fn of(model: &Lm, name: &str) -> Order {
        let turned = model.config.pairing == Pairing::Neighbours && matches!(name, "q" | "k");
        Order { head: turned.then(|| model.config.head_dim()) }
    }

    /// Where row `row` of the model stands in PEFT's file.
    fn in_file(self, row: usize) -> usize {
        self.head.map_or(row, |head| half_row(row, head))
    }

    /// Brings rows (of `columns` each) from the file's order to the model's, or back.
    fn rows(self, data: &[f32], columns: usize, to_file: bool) -> Vec<f32> {
        let count = data.len() / columns;
        let mut new = vec![0.0; data.len()];
        for row in 0..count {
            let other = self.in_file(row);
            let (from, to) = if to_file { (row, other) } else { (other, row) };
            new[to * columns..][..columns].copy_from_slice(&data[from * columns..][..columns]);
        }
        new
    }

    /// The same for columns, of which a row has so many.
    fn columns(self, data: &[f32], columns: usize, to_file: bool) -> Vec<f32> {
        data.chunks(columns).flat_map(|row| self.rows(row, 1, to_file)).collect()
    }
}

/// Brings a part to the order of PEFT's files, or back.
fn ordered(
    kind: AdapterKind,
    order: Order,
    own: &str,
    x: (Vec<f32>, &[usize]),
    to_file: bool,
) -> Result<Vec<f32>> {
    let (data, shape) = x;
    match (kind, own) {
        _ if order.head.is_none() => Ok(data),
        (AdapterKind::Lora { .. }, "lora_B.weight") => Ok(order.rows(&data, shape[1], to_file)),
        (AdapterKind::Lora { .. }, _) => Ok(data),
        (AdapterKind::Miss { .. }, _) => Ok(order.columns(&data, shape[1], to_file)),
        _ => Err(Error::config(
            "blocks of q and k cannot be brought to the order of rows in a GGUF file; take the folder from which it was made",
        )),
    }
}

impl Adapter {
    /// Writes the adapter into a folder that PEFT opens too, unless it is a mixture of shards, which PEFT does not have.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written; when the device fails; [`Error::Config`] for Bone on q or k of a GGUF file.
    pub fn save(&self, folder: impl AsRef<Path>, model: &Lm, base: &Base) -> Result<()> {
        let folder = folder.as_ref();
        let mut entries = Vec::new();
        for (name, x) in self.parameters().state_dict() {
            let mut data = x.detach().cast(crate::DType::F32).to_vec::<f32>()?;
            if let Some((_, matrix, own)) = config::place(&name) {
                data =
                    ordered(self.config.kind, Order::of(model, matrix), own, (data, &x.shape()[..]), true)?;
            }
            let bytes = bytemuck::cast_slice::<f32, u8>(&data).to_vec();
            entries.push(Entry::bytes(name, crate::store::FileDType::F32, &x.shape()[..], bytes));
        }
        for (name, pool) in &self.pools {
            for (kind, lists) in [("index_a", &pool.index_a), ("index_b", &pool.index_b)] {
                let all: Vec<u8> = lists.iter().flatten().flat_map(|i| i.to_le_bytes()).collect();
                let shape = [lists.len(), lists.first().map_or(0, Vec::len)];
                let name = format!("mos.{name}.{kind}");
                entries.push(Entry::bytes(name, crate::store::FileDType::U32, &shape, all));
            }
        }
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        let said = [
            ("format", "pt".to_string()),
            (BASE[0], format!("{:032x}", base.fingerprint)),
            (BASE[1], base.name.clone()),
        ];
        let metadata = said.map(|(key, value)| (key.to_string(), value)).into();
        save(folder.join(WEIGHTS), entries, &metadata)?;
        let swapped = model.config.pairing == Pairing::Neighbours;
        let depths = |name: &str| self.depths(name, model.blocks.len());
        let settings = self.config.json(&base.name, swapped, &depths, &self.ranks());
        let text = serde_json::to_string_pretty(&settings);
        files::replace_with(&folder.join(SETTINGS), text.map_err(|error| Error::config(error.to_string()))?)
    }

    /// The depths at which a layer has a part, if that is not all of them.
    fn depths(&self, name: &str, depth: usize) -> Option<Vec<usize>> {
        let some: Vec<usize> = self.parts.keys().filter(|(_, own)| *own == name).map(|(at, _)| *at).collect();
        (some.len() < depth).then_some(some)
    }

    /// The ranks of the parts of LoRA that have another one than most.
    fn ranks(&self) -> BTreeMap<String, usize> {
        let of = |(&(depth, name), part): (&(usize, &str), &Part)| match part {
            Part::Lora([a, _]) if a.shape()[0] != self.config.rank() => {
                Some((config::short(depth, name), a.shape()[0]))
            }
            _ => None,
        };
        self.parts.iter().filter_map(of).collect()
    }

    /// Reads a folder of [`Adapter::save`] or of PEFT for this model. `base` is the model's own; an adapter that names another one is
    /// refused, and one that names none, as PEFT's, is taken if its sizes fit. `None` takes any.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] when the files cannot be read, have another kind of adapter or settings that are not computed,
    /// or a tensor that has no place; [`Error::Config`] for the adapter of another base, with both names.
    pub fn open(folder: impl AsRef<Path>, model: &Lm, base: Option<&Base>) -> Result<Adapter> {
        let folder = folder.as_ref();
        let said = Said::open(folder)?;
        let mut config = said.config.clone();
        base.map_or(Ok(()), |base| base.check_adapter(folder))?;
        let file = File::open(folder.join(WEIGHTS))?;
        let reader = Reader { file: &file, model, gpu: model.gpu(), kind: config.kind, said: &said };
        let adapter = match config.kind {
            AdapterKind::Mos(shards) => {
                reader.check_rows()?;
                reader.shards(&config, shards)?
            }
            _ => {
                let parts = reader.parts()?;
                config.targets =
                    LINEARS.into_iter().filter(|name| parts.keys().any(|(_, own)| own == name)).collect();
                Adapter { config, parts, pools: BTreeMap::new() }
            }
        };
        // Sizes are seen by applying it.
        adapter.apply(model).map_err(|error| Error::format(folder, error.to_string()))?;
        Ok(adapter)
    }
}

struct Reader<'a> {
    file: &'a File,
    model: &'a Lm,
    gpu: &'a Gpu,
    kind: AdapterKind,
    said: &'a Said,
}

impl Reader<'_> {
    fn wrong(&self, message: String) -> Error {
        Error::format(self.file.path(), message)
    }

    /// A tensor as a leaf, brought to the model's order.
    fn tensor(&self, name: &str, axes: usize) -> Result<Tensor> {
        self.scaled(name, axes, 1.0)
    }

    /// The same, multiplied by a factor.
    fn scaled(&self, name: &str, axes: usize, factor: f32) -> Result<Tensor> {
        let shape = &self.file.info(name)?.shape;
        if shape.len() != axes || shape.contains(&0) {
            return Err(self.wrong(format!("`{name}` is {shape:?}, and {axes} axes are expected")));
        }
        let mut data = self.file.tensor_f32(name)?;
        if let Some((_, matrix, own)) = config::place(name) {
            data = ordered(self.kind, Order::of(self.model, matrix), own, (data, shape), false)?;
        }
        data.iter_mut().for_each(|x| *x *= factor);
        if let Some(i) = data.iter().position(|x| !x.is_finite()) {
            return Err(self.wrong(format!("`{name}` has {} at element {i}", data[i])));
        }
        let x = Tensor::from_slice(self.gpu, &data, &shape[..]);
        x.check()?;
        Ok(x.requires_grad())
    }

    /// The parts of LoRA, MiSS and Bone.
    fn parts(&self) -> Result<BTreeMap<(usize, &'static str), Part>> {
        let mut parts = BTreeMap::new();
        let names: BTreeSet<&str> = self.file.names().collect();
        for &name in &names {
            let unknown = || {
                self.wrong(format!(
                    "`{name}` belongs to no linear layer of a block; adapters of other parts are not read"
                ))
            };
            let (depth, matrix, own) = config::place(name).ok_or_else(unknown)?;
            let part = match (self.kind, own) {
                (AdapterKind::Lora { .. }, "lora_A.weight") => {
                    let other = name.replace("lora_A", "lora_B");
                    let factor = self.said.factor(depth, matrix).map_err(|why| self.wrong(why))?;
                    Part::Lora([self.tensor(name, 2)?, self.scaled(&other, 2, factor)?])
                }
                (AdapterKind::Lora { .. }, "lora_B.weight")
                    if names.contains(&name.replace("lora_B", "lora_A")[..]) =>
                {
                    continue;
                }
                (AdapterKind::Miss { .. }, "miss_block" | "bone_block") => Part::Miss(self.tensor(name, 2)?),
                (AdapterKind::Bone { .. }, "miss_block" | "bone_block") => Part::Bone(self.tensor(name, 3)?),
                _ => return Err(unknown()),
            };
            if parts.insert((depth, matrix), part).is_some() {
                return Err(self.wrong(format!("it has two parts of `{matrix}` in block {depth}")));
            }
        }
        match parts.is_empty() {
            false => Ok(parts),
            true => Err(self.wrong("it has no part of a linear layer".into())),
        }
    }

    /// The rows of pools lie in the order of one kind of files, and cannot be brought to the other.
    fn check_rows(&self) -> Result<()> {
        let own = if self.model.config.pairing == Pairing::Neighbours { "neighbours" } else { "halves" };
        match self.said.all.get("mos_rows").and_then(Value::as_str) {
            Some(there) if there != own => Err(self.wrong(format!(
                "its shards were trained on a model whose rotary positions pair {there}, as GGUF files or folders do, and this one's \
                 pair {own}"
            ))),
            _ => Ok(()),
        }
    }

    fn shards(&self, config: &AdapterConfig, shards: ShardConfig) -> Result<Adapter> {
        let depth = self.model.blocks.len();
        let mut pools = BTreeMap::new();
        let mut parts = BTreeMap::new();
        for &name in LINEARS.iter().filter(|name| config.targets.contains(name)) {
            let index = |kind: &str, pool: &Tensor| -> Result<Vec<Vec<u32>>> {
                let path = format!("mos.{name}.{kind}");
                let all = self.file.tensor_u32(&path)?;
                let each = shards.rank * shards.shards;
                let rows = pool.shape()[0];
                if all.len() != depth * each || all.iter().any(|&row| row as usize >= rows) {
                    return Err(self.wrong(format!(
                        "`{path}` has {} numbers below {rows}; {depth} blocks of rank {} with {} shards need {}",
                        all.len(),
                        shards.rank,
                        shards.shards,
                        depth * each
                    )));
                }
                Ok(all.chunks(each).map(<[u32]>::to_vec).collect())
            };
            let [pool_a, pool_b] = [
                self.tensor(&format!("mos.{name}.pool_a"), 2)?,
                self.tensor(&format!("mos.{name}.pool_b"), 2)?,
            ];
            let (index_a, index_b) = (index("index_a", &pool_a)?, index("index_b", &pool_b)?);
            let (rank, scale) = (shards.rank, shards.alpha / shards.rank as f32);
            pools.insert(name, ShardPool { pool_a, pool_b, index_a, index_b, rank, scale });
            parts.extend((0..depth).map(|layer| ((layer, name), Part::Shards(layer))));
        }
        Ok(Adapter { config: config.clone(), parts, pools })
    }
}
