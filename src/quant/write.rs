//! Rounds a model, one tensor at a time, from its files to the output's. In a folder, the scales of a file's tensors are kept until
//! its levels are written.

use super::encode::{SHAPE, compressed_config, shape_bytes};
use super::job::{CONFIG, Format, Item, Job, Source};
use super::plan::Part;
use super::round::round_from;
use super::search::Rounding;
use crate::error::{Error, Result};
use crate::files;
use crate::store::gguf::{self, GgufType, Value as Metadata};
use crate::store::{Entry, FileDType, INDEX, Shards, index_of, save, settings_in};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

/// Weights that are in memory as f32 at a time: 64 MiB.
const PIECE: usize = 1 << 24;
/// Pieces have a multiple of so many rows, so that the zeros of a piece are whole words.
const ROWS: usize = 8;
/// Which version of its blocks ggml wrote: `GGML_QNT_VERSION` of ggml.h.
const QUANTIZATION_VERSION: i128 = 2;

/// What rounding did to one tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Measured {
    /// The sum of squared errors.
    pub squared_error: f64,
    /// The sum of squared weights.
    pub squared: f64,
}

impl Measured {
    /// The root of the mean squared error, relative to that of the weights.
    pub fn relative(&self) -> f64 {
        if self.squared > 0.0 { (self.squared_error / self.squared).sqrt() } else { 0.0 }
    }
}

impl std::ops::AddAssign for Measured {
    fn add_assign(&mut self, other: Measured) {
        self.squared_error += other.squared_error;
        self.squared += other.squared;
    }
}

/// Called with the number of further bytes of the model that have been rounded, of [`Job::work`] in all. An error ends the run and
/// leaves the old output intact.
pub type Progress<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// A run: what has been made and not been asked for yet, and what was measured.
struct Run<'a, 'p> {
    job: &'a Job,
    progress: &'a mut Progress<'p>,
    /// Scales and zeros of weights whose levels are written, by the number of the item and the end of the name.
    made: BTreeMap<(usize, &'static str), Vec<u8>>,
    measured: Vec<Option<Measured>>,
}

impl Job {
    /// Rounds the model and writes it whole or not at all. Equal models and settings give equal bytes. Returns what rounding did to
    /// each of [`Job::items`].
    ///
    /// # Errors
    /// Those of [`Job::check_out`] and `progress`; for a weight that is NaN or infinite, or too large for a scale of 16 bits,
    /// named by tensor, row and column; when a file or the disk fails. `out` is then as it was.
    pub fn run(&self, out: &Path, progress: &mut Progress) -> Result<Vec<Option<Measured>>> {
        self.check_out(out)?;
        let measured = vec![None; self.items.len()];
        let run = RefCell::new(Run { job: self, progress, made: BTreeMap::new(), measured });
        match (&self.source, self.format) {
            (Source::Folder(shards), Format::CompressedTensors) => {
                files::replace_folder(out, |folder| self.folder(shards, folder, &run))?;
            }
            _ => self.gguf(out, &run)?,
        }
        Ok(run.into_inner().measured)
    }

    fn folder(&self, shards: &Shards, folder: &Path, run: &RefCell<Run>) -> Result<()> {
        for name in settings_in(&self.path)?.into_iter().filter(|name| name != CONFIG) {
            let path = self.path.join(&name);
            let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
            files::replace_with(&folder.join(name), bytes)?;
        }
        let mut config = self.config.clone();
        config["quantization_config"] = self.packing_config()?;
        files::replace_with(&folder.join(CONFIG), format!("{config:#}\n"))?;
        let notes = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let files = self.shards();
        let mut places = BTreeMap::new();
        for (file, items) in &files {
            let mut entries = Vec::new();
            for &i in items {
                entries.extend(self.entries(shards, run, i)?);
            }
            places.extend(entries.iter().map(|entry| (entry.name().to_string(), file.as_str())));
            save(folder.join(file), entries, &notes)?;
        }
        if files.len() == 1 {
            return Ok(());
        }
        let places = places.iter().map(|(name, file)| (name.as_str(), *file)).collect();
        files::replace_with(&folder.join(INDEX), index_of(places, self.bytes_after()))
    }

    /// The tensors that a folder has in the place of an item.
    fn entries<'a>(
        &'a self,
        shards: &'a Shards,
        run: &'a RefCell<Run<'_, '_>>,
        i: usize,
    ) -> Result<Vec<Entry<'a>>> {
        let item = &self.items[i];
        if let (Some(rounding), Some(shape)) = (item.rounding, item.matrix()) {
            return Ok(packed(run, i, item, &rounding, shape));
        }
        let bytes = shards.bytes(&item.name)?;
        Ok(vec![Entry::bytes(item.name.clone(), shards.dtype(&item.name)?, &item.shape, bytes)])
    }

    /// The object `quantization_config`: all linear layers if they are rounded alike, or else the layers of each rounding.
    fn packing_config(&self) -> Result<Value> {
        let mut roundings: Vec<Rounding> = Vec::new();
        for rounding in self.items.iter().filter_map(|item| item.rounding).map(settings_of) {
            if !roundings.contains(&rounding) {
                roundings.push(rounding);
            }
        }
        let with =
            |rounding: Rounding| self.patterns(|item| item.rounding.map(settings_of) == Some(rounding));
        let groups: Vec<(Rounding, Vec<String>)> = match roundings[..] {
            [one] => vec![(one, vec!["Linear".into()])],
            _ => roundings.iter().map(|&rounding| (rounding, with(rounding))).collect(),
        };
        let mut ignore = self.patterns(|item| item.rounding.is_none() && item.part != Part::Embed);
        // A head that is the table of token vectors has no tensor, and is a linear layer to transformers.
        if self.items.iter().all(|item| item.part != Part::Head) {
            ignore.push("lm_head".into());
        }
        compressed_config(&groups, &ignore)
    }

    /// The modules that are chosen, as compressed-tensors matches names. Modules that differ in numbers only are one regular
    /// expression if all of them are chosen.
    fn patterns(&self, chosen: impl Fn(&Item) -> bool) -> Vec<String> {
        let mut classes: BTreeMap<String, Vec<(&str, bool)>> = BTreeMap::new();
        for item in self.items.iter().filter(|item| item.shape.len() == 2) {
            let Some(module) = item.name.strip_suffix(".weight") else { continue };
            classes.entry(class_of(module)).or_default().push((module, chosen(item)));
        }
        let mut all = Vec::new();
        for (class, modules) in classes {
            let whole = modules.iter().all(|(_, chosen)| *chosen);
            if whole && class.contains("\\d+") {
                all.push(format!("re:^{class}$"));
            } else {
                all.extend(
                    modules.iter().filter(|(_, chosen)| *chosen).map(|(module, _)| module.to_string()),
                );
            }
        }
        all
    }

    fn gguf(&self, out: &Path, run: &RefCell<Run>) -> Result<()> {
        let conversion = self.settings.conversion.as_ref();
        // A value of the source keeps its type, because llama.cpp asks for some with types that are not the usual ones.
        let (mut metadata, made) = match &self.source {
            Source::Gguf(file) => (file.encoded(), Vec::new()),
            Source::Folder(_) => (BTreeMap::new(), conversion.map_or(Vec::new(), |c| c.metadata.clone())),
        };
        let own =
            [("general.file_type", self.file_type()), ("general.quantization_version", QUANTIZATION_VERSION)];
        let own = own.map(|(key, number)| (key.to_string(), Metadata::Integer(number)));
        for (key, value) in made.into_iter().chain(own) {
            let value = gguf::encoded(&value).map_err(|e| Error::config(format!("quantise: {key}: {e}")))?;
            metadata.insert(key, value);
        }
        // Files are written with the usual alignment.
        metadata.remove("general.alignment");
        let metadata: Vec<(String, Vec<u8>)> = metadata.into_iter().collect();
        let mut entries = Vec::new();
        for (i, item) in self.items.iter().enumerate() {
            let kind = item.kind.ok_or_else(|| {
                Error::config(format!("quantise: tensor `{}` has no type of GGUF", item.name))
            })?;
            let (name, shape) = (item.name.clone(), &item.shape[..]);
            entries.push(match (item.rounding, item.matrix(), &self.source) {
                (Some(rounding), Some(sizes), _) => {
                    gguf::Entry::lazy(name, kind, shape, move || run.borrow_mut().blocks(i, &rounding, sizes))
                }
                (_, _, Source::Gguf(file)) => {
                    gguf::Entry::bytes(name, kind, shape, file.bytes_of(&item.source)?)
                }
                (_, _, Source::Folder(shards)) => {
                    gguf::Entry::lazy(name, kind, shape, move || kept(shards, item))
                }
            });
        }
        if let (Source::Folder(_), Some(conversion)) = (&self.source, conversion) {
            let more = conversion.more.iter();
            entries.extend(more.map(|(name, all)| gguf::Entry::f32(name.as_str(), &[all.len()], all)));
        }
        gguf::save_encoded(out, &metadata, entries)
    }

    /// The number by which `general.file_type` calls the type of most weights: `llama_ftype` of llama.h.
    fn file_type(&self) -> i128 {
        let numbers = [
            (GgufType::F32, 0),
            (GgufType::F16, 1),
            (GgufType::Q4_0, 2),
            (GgufType::Q4_1, 3),
            (GgufType::Q8_0, 7),
            (GgufType::Q5_0, 8),
            (GgufType::Q5_1, 9),
            (GgufType::BF16, 32),
        ];
        let weights = |kind: GgufType| -> usize {
            self.items.iter().filter(|item| item.kind == Some(kind)).map(Item::count).sum()
        };
        numbers.into_iter().max_by_key(|(kind, _)| weights(*kind)).map_or(0, |(_, number)| number)
    }
}

/// The bytes of a tensor of a folder that a GGUF file has unrounded: vectors as F32, and matrices as they are stored, with their
/// rows in the order of the output.
fn kept(shards: &Shards, item: &Item) -> Result<Vec<u8>> {
    let (file, source) = shards.find(&item.source)?;
    let (all, rows) = (item.count(), item.shape.first().copied().unwrap_or(1));
    let values;
    let bytes = match item.shape.len() {
        2.. => file.bytes(source)?,
        _ => {
            values = file.range_f32(source, 0..all)?;
            bytemuck::cast_slice(&values)
        }
    };
    if item.place.heads.is_none() {
        return Ok(bytes.to_vec());
    }
    let row = bytes.len() / rows.max(1);
    Ok((0..rows).flat_map(|r| &bytes[item.place.source_row(r, rows) * row..][..row]).copied().collect())
}

/// A rounding without what `quantization_config` does not say.
fn settings_of(rounding: Rounding) -> Rounding {
    rounding.stored(super::search::Stored::F16)
}

/// A module's name as a regular expression with any number in the place of each.
fn class_of(module: &str) -> String {
    let part = |part: &str| match !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
        true => "\\d+".to_string(),
        false => part
            .chars()
            .flat_map(|c| (!c.is_alphanumeric() && c != '_').then_some('\\').into_iter().chain([c]))
            .collect(),
    };
    module.split('.').map(part).collect::<Vec<_>>().join("\\.")
}

/// The tensors in the place of a weight. The levels are asked for before scales and zeros, because a file sorts its tensors by
/// type and then by name, so that only these have to be kept.
fn packed<'a>(
    run: &'a RefCell<Run>,
    i: usize,
    item: &'a Item,
    rounding: &Rounding,
    matrix: [usize; 2],
) -> Vec<Entry<'a>> {
    let rounding = *rounding;
    let entry = |(what, dtype, shape): (&'static str, FileDType, Vec<usize>)| match what {
        SHAPE => Entry::bytes(part_name(item, what), dtype, &shape, shape_bytes(matrix)),
        _ => {
            let make = move || run.borrow_mut().part(i, &rounding, matrix, what);
            Entry::lazy(part_name(item, what), dtype, &shape, make)
        }
    };
    rounding.compressed_layout(matrix).into_iter().map(entry).collect()
}

/// The name of a tensor in the place of a weight, such as `weight_scale` of `NAME.weight`.
fn part_name(item: &Item, what: &str) -> String {
    format!("{}{what}", item.name.strip_suffix("weight").unwrap_or(&item.name))
}

impl Run<'_, '_> {
    /// Rounds a matrix in pieces, and gives each to `take`.
    fn pieces(
        &mut self,
        i: usize,
        rounding: &Rounding,
        [rows, columns]: [usize; 2],
        mut take: impl FnMut(super::Rounded) -> Result<()>,
    ) -> Result<()> {
        let item = &self.job.items[i];
        let step = (PIECE / columns.max(1) / ROWS).max(1) * ROWS;
        let mut measured = Measured::default();
        let mut told = 0;
        for from in (0..rows).step_by(step) {
            let to = rows.min(from + step);
            let w = self.job.source.rows(item, [rows, columns], from..to)?;
            measured.squared += w.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
            let rounded = round_from(from, &item.name, &w, [to - from, columns], rounding)?;
            measured.squared_error += rounded.error;
            drop(w);
            take(rounded)?;
            let done = item.bytes_before * to as u64 / rows as u64;
            (self.progress)(done - told)?;
            told = done;
        }
        self.measured[i] = Some(measured);
        Ok(())
    }

    /// The blocks of a tensor of a GGUF file.
    fn blocks(&mut self, i: usize, rounding: &Rounding, shape: [usize; 2]) -> Result<Vec<u8>> {
        let mut all = Vec::with_capacity(self.job.items[i].bytes_after as usize);
        self.pieces(i, rounding, shape, |rounded| {
            all.extend(rounded.to_gguf()?.1);
            Ok(())
        })?;
        Ok(all)
    }

    /// One of the tensors in the place of a weight of a folder.
    fn part(
        &mut self,
        i: usize,
        rounding: &Rounding,
        shape: [usize; 2],
        what: &'static str,
    ) -> Result<Vec<u8>> {
        if let Some(made) = self.made.remove(&(i, what)) {
            return Ok(made);
        }
        let mut parts: BTreeMap<&'static str, Vec<u8>> = BTreeMap::new();
        self.pieces(i, rounding, shape, |rounded| {
            for (what, bytes) in rounded.compressed_parts() {
                parts.entry(what).or_default().extend(bytes);
            }
            Ok(())
        })?;
        let asked = parts.remove(what).unwrap_or_default();
        self.made.extend(parts.into_iter().map(|(what, bytes)| ((i, what), bytes)));
        Ok(asked)
    }
}
