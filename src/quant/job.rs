//! What rounding a model will do: which tensors become what. Only headers are read.

use super::plan::{Choice, Group, Part, Plan};
use super::search::{Form, Rounding, Stored};
use crate::error::{Error, Result};
use crate::files;
use crate::setters::setters;
use crate::share::packed::{Packing, Scales};
use crate::store::gguf::{Conversion, Gguf, GgufType, Place};
use crate::store::{
    FileDType, INDEX, SHARD_BYTES, Shards, Weights, located, missing, needs_folder, settings_in, sharded,
};
use serde_json::Value;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub(super) const CONFIG: &str = "config.json";
/// Columns of a group in folders, if nothing else is asked for.
const FOLDER_GROUP: usize = 64;
/// Columns of a group in GGUF's types of 4, 5 and 8 bits.
const GGUF_GROUP: usize = 32;

/// How a rounded model is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// A folder of Hugging Face with weights in compressed-tensors' layout `pack-quantized`.
    CompressedTensors,
    /// A GGUF file.
    Gguf,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Format::CompressedTensors => "compressed-tensors",
            Format::Gguf => "gguf",
        })
    }
}

/// How a model is rounded.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct JobSettings {
    /// Bits of a level: 4 or 8, and in GGUF files also 5.
    pub bits: u32,
    /// Columns that share a scale. `None`: 64 in folders, and 32 in GGUF files, which have no other groups.
    pub group: Option<usize>,
    /// Whether levels need not lie evenly around 0: [`Form::Zero`] in folders, [`Form::Affine`] in GGUF files.
    pub asymmetric: bool,
    /// Tensors for which something else holds.
    pub plan: Plan,
    /// Whether weights of a GGUF file that have few bits already may be rounded again.
    pub requantise: bool,
    /// What is written. `None`: a folder for a folder, and a GGUF file for a GGUF file.
    pub format: Option<Format>,
    /// Most bytes of a file of weights in a folder. A larger tensor has a file of its own, and a GGUF file is always one.
    pub shard_bytes: u64,
    /// Metadata and names for a folder that becomes a GGUF file:
    /// [`Published::gguf`](crate::models::llama::Published::gguf) with the metadata of `text::gguf_metadata`.
    pub conversion: Option<Conversion>,
}

setters!(JobSettings {
    bits: u32,
    group: Option<usize>,
    asymmetric: bool,
    plan: Plan,
    requantise: bool,
    format: Option<Format>,
    shard_bytes: u64,
    conversion: Option<Conversion>,
});

impl Default for JobSettings {
    /// 4 bits, symmetric, and files of up to 5 GB.
    fn default() -> JobSettings {
        JobSettings {
            bits: 4,
            group: None,
            asymmetric: false,
            plan: Plan::default(),
            requantise: false,
            format: None,
            shard_bytes: SHARD_BYTES,
            conversion: None,
        }
    }
}

/// One tensor of a model, and what becomes of it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Item {
    /// Its name, which is that of the output if a folder becomes a GGUF file.
    pub name: String,
    /// Sizes from the outermost axis.
    pub shape: Vec<usize>,
    /// What it is in the model.
    pub part: Part,
    /// Its type in the model's file.
    pub from: String,
    /// Its type in the output: that of GGUF, or bits and group as a plan has them.
    pub to: String,
    /// How it is rounded. `None`: it stays as it is.
    pub rounding: Option<Rounding>,
    /// Bytes in the model's file.
    pub bytes_before: u64,
    /// Bytes in the output, with scales.
    pub bytes_after: u64,
    /// Why it stays as it is, although it should or might have been rounded.
    pub remark: Option<String>,
    /// Where it comes from: the name there, which is its own without an order of rows if nothing is converted.
    pub(super) source: String,
    pub(super) place: Place,
    /// Its type in GGUF, if it has one: that of the source, and that of the output once that is decided.
    pub(super) kind: Option<GgufType>,
}

impl Item {
    /// Number of weights.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    pub(super) fn matrix(&self) -> Option<[usize; 2]> {
        self.shape[..].try_into().ok()
    }

    /// Whether a plan may name it.
    fn is_candidate(&self) -> bool {
        self.shape.len() == 2 && self.name.ends_with(".weight") && self.count() > 0
    }
}

/// The tensors of a model on disk.
pub(super) enum Source {
    Folder(Shards),
    Gguf(Gguf),
}

impl Source {
    fn items(&self) -> Result<Vec<Item>> {
        let names: Vec<String> = match self {
            Source::Folder(shards) => shards.names(),
            Source::Gguf(file) => file.names().map(String::from).collect(),
        };
        let item = |name: String| {
            let (shape, from, bytes, kind) = match self {
                Source::Folder(shards) => {
                    let info = shards.info(&name)?;
                    let bytes = shards.bytes(&name)?.len();
                    (info.shape.clone(), info.dtype.to_string(), bytes, kind_of(info.dtype))
                }
                Source::Gguf(file) => {
                    let kind = file.kind(&name)?;
                    (file.shape(&name)?.to_vec(), kind.to_string(), file.bytes(&name)?, Some(kind))
                }
            };
            Ok(Item {
                source: name.clone(),
                place: Place::new(name.clone()),
                kind,
                part: Part::of(&name),
                to: from.clone(),
                bytes_before: bytes as u64,
                bytes_after: bytes as u64,
                rounding: None,
                remark: None,
                name,
                shape,
                from,
            })
        };
        names.into_iter().map(item).collect()
    }

    /// Some rows of an item with so many rows and columns as f32, in the order of the output.
    pub fn rows(&self, item: &Item, [all, columns]: [usize; 2], rows: Range<usize>) -> Result<Vec<f32>> {
        let name = &item.source;
        match self {
            Source::Gguf(file) => file.rows_f32(name, rows),
            Source::Folder(shards) if item.place.heads.is_none() => {
                let (file, name) = shards.find(name)?;
                file.range_f32(name, rows.start * columns..rows.end * columns)
            }
            Source::Folder(shards) => {
                let (file, name) = shards.find(name)?;
                let mut out = Vec::with_capacity(rows.len() * columns);
                for row in rows.map(|row| item.place.source_row(row, all)) {
                    out.extend(file.range_f32(name, row * columns..(row + 1) * columns)?);
                }
                Ok(out)
            }
        }
    }
}

/// A model that is to be rounded. Nothing but headers and settings has been read.
///
/// ```no_run
/// use tiebeam::quant::{Job, JobSettings};
///
/// let job = Job::open("models/SmolLM2-135M", JobSettings::default().plan("down=8".parse()?))?;
/// println!("{} bytes become {}", job.bytes_before(), job.bytes_after());
/// job.run("models/SmolLM2-135M-4bit".as_ref(), &mut |_| Ok(()))?;
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct Job {
    pub(super) path: PathBuf,
    pub(super) source: Source,
    /// The object of `config.json`, if the model is a folder.
    pub(super) config: Value,
    pub(super) settings: JobSettings,
    pub(super) format: Format,
    pub(super) items: Vec<Item>,
}

impl Job {
    /// Opens a folder with `config.json` and safetensors, or a GGUF file, and decides what becomes of each tensor.
    ///
    /// # Errors
    /// [`Error::Config`] for bits, groups and plans that the format does not have, for weights that have few bits already, and
    /// for a model that cannot be written in this format. Messages name the tensor. [`Error::Io`] and [`Error::Format`] when a
    /// file cannot be read.
    pub fn open(model: impl AsRef<Path>, settings: JobSettings) -> Result<Job> {
        let path = &located(model.as_ref());
        let (source, config) = open(path)?;
        let format = target(&source, &settings)?;
        settings.check(format)?;
        let mut items = source.items()?;
        if let (Source::Folder(_), Format::Gguf, Some(conversion)) = (&source, format, &settings.conversion) {
            items = converted(items, conversion).map_err(|message| wrong_in(path, &message))?;
        }
        let mut job = Job { path: path.into(), source, config, settings, format, items };
        job.decide()?;
        Ok(job)
    }

    /// All tensors by their names.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// What is written.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes of all tensors in the model's files.
    pub fn bytes_before(&self) -> u64 {
        self.items.iter().map(|item| item.bytes_before).sum()
    }

    /// Bytes of all tensors in the output.
    pub fn bytes_after(&self) -> u64 {
        self.items.iter().map(|item| item.bytes_after).sum()
    }

    /// Bytes of the tensors that are rounded, of which [`Job::run`] tells how far it is.
    pub fn work(&self) -> u64 {
        self.items.iter().filter(|item| item.rounding.is_some()).map(|item| item.bytes_before).sum()
    }

    /// The files of weights of a folder, each with the numbers of its items.
    pub(super) fn shards(&self) -> Vec<(String, Vec<usize>)> {
        sharded(self.items.iter().map(|item| item.bytes_after), self.settings.shard_bytes)
    }

    fn decide(&mut self) -> Result<()> {
        let candidates: Vec<(&str, Part)> =
            self.items.iter().filter(|item| item.is_candidate()).map(|i| (i.name.as_str(), i.part)).collect();
        self.settings.plan.check(&candidates)?;
        let mut items = std::mem::take(&mut self.items);
        for item in items.iter_mut().filter(|item| item.is_candidate()) {
            let chosen = self.settings.plan.choice(&item.name, item.part);
            if chosen.is_none() && item.part == Part::Other {
                item.remark = Some("this is no known name of a linear layer; a plan can name it".into());
            }
            if let Choice::Round(bits, group) = chosen.unwrap_or_else(|| self.usual(item)) {
                match self.format {
                    Format::CompressedTensors => self.in_folder(item, bits, group),
                    Format::Gguf => self.in_gguf(item, bits, group),
                }
                .map_err(|message| self.wrong(&item.name, &message))?;
            }
        }
        self.items = items;
        if self.items.iter().any(|item| item.rounding.is_some()) {
            return Ok(());
        }
        Err(wrong_in(&self.path, &format!("no tensor would be rounded: {}", self.why_none())))
    }

    /// Why no tensor would be rounded, told of the first linear layer.
    fn why_none(&self) -> String {
        let Some(item) = self.items.iter().find(|item| matches!(item.part, Part::Linear(_))) else {
            return "none has a known name of a linear layer; `--plan` names tensors by patterns, such as '*.dense.weight=4'"
                .into();
        };
        let Item { name, from, remark, .. } = item;
        match (remark, self.settings.plan.choice(name, item.part)) {
            (Some(remark), _) => format!("`{name}`, for one, stays {from}: {remark}"),
            (None, Some(Choice::Keep)) => format!("the plan keeps `{name}`, for one"),
            (None, _) => format!("`{name}`, for one, is {from} already"),
        }
    }

    fn wrong(&self, name: &str, message: &str) -> Error {
        wrong_in(&self.path, &format!("tensor `{name}`: {message}"))
    }

    /// What becomes of a tensor that the plan does not name.
    fn usual(&self, item: &Item) -> Choice {
        match (item.part, self.format) {
            (Part::Linear(_), _) => Choice::Round(self.settings.bits, None),
            // A table that has few bits already would only grow.
            (Part::Head | Part::Embed, Format::Gguf) => {
                match item.kind.is_some_and(|kind| kind.packing().is_none()) {
                    true => Choice::Round(8, None),
                    false => Choice::Keep,
                }
            }
            _ => Choice::Keep,
        }
    }

    fn in_folder(&self, item: &mut Item, bits: u32, group: Option<Group>) -> Result<(), String> {
        let Some([rows, columns]) = item.matrix() else { return Ok(()) };
        match item.part {
            Part::Embed => {
                return Err("compressed-tensors packs linear layers, and the table of token vectors is none; end the plan with \
                            `embed=keep`, or write a GGUF file"
                    .into());
            }
            Part::Head if self.config["tie_word_embeddings"] == true => {
                return Err("`tie_word_embeddings` ties the head to the table of token vectors, and readers differ in whether they use \
                            this tensor; end the plan with `head=keep`"
                    .into());
            }
            _ => {}
        }
        if !matches!(bits, 4 | 8) {
            return Err(format!("{bits} bits; folders have levels of 4 or 8 bits"));
        }
        let stored = match &item.from[..] {
            "BF16" => Stored::BF16,
            "F16" | "F32" => Stored::F16,
            other => {
                return Err(format!("weights of {other} are not rounded; those of F32, F16 and BF16 are"));
            }
        };
        let form = if self.settings.asymmetric { Form::Zero } else { Form::Symmetric };
        let rounding = Rounding::new(bits, form).stored(stored);
        let usual = Group::Columns(self.settings.group.unwrap_or(FOLDER_GROUP));
        let rounding = match group.unwrap_or(usual) {
            Group::Row => rounding.rows(),
            Group::Columns(group) if group == 0 || !columns.is_multiple_of(group) => {
                return Err(format!(
                    "groups of {group} do not divide its {columns} columns; name another group by `--group`, or by `--plan` for \
                     this tensor"
                ));
            }
            Group::Columns(group) => {
                let readable = Packing::new(bits, group, Scales::Zero);
                readable.map_err(|e| e.to_string()).map(|_| rounding.group(group))?
            }
        };
        let parts = rounding.compressed_layout([rows, columns]).into_iter();
        let bytes = parts.map(|(_, dtype, shape)| shape.iter().product::<usize>() * dtype.bits() / 8);
        item.bytes_after = bytes.sum::<usize>() as u64;
        let group = rounding.group.map_or("row".into(), |group| group.to_string());
        item.to = format!("{bits}:{group}");
        item.rounding = Some(rounding);
        Ok(())
    }

    fn in_gguf(&self, item: &mut Item, bits: u32, group: Option<Group>) -> Result<(), String> {
        let Some([rows, columns]) = item.matrix() else { return Ok(()) };
        if group.is_some_and(|group| group != Group::Columns(GGUF_GROUP)) {
            return Err(format!("GGUF has groups of {GGUF_GROUP} columns and no others"));
        }
        // There is no type of 8 bits with offsets.
        let form = if self.settings.asymmetric && bits != 8 { Form::Affine } else { Form::Symmetric };
        let rounding = Rounding::new(bits, form);
        let kind =
            rounding.gguf_type().ok_or_else(|| format!("{bits} bits; GGUF has types of 4, 5 and 8 bits"))?;
        let from = &item.from;
        let source = item
            .kind
            .ok_or_else(|| format!("weights of {from} are not rounded; those of F32, F16 and BF16 are"))?;
        if source == kind {
            return Ok(());
        }
        if source.packing().is_some() && !self.settings.requantise {
            return Err(format!(
                "it is {source} already, and rounding it again adds to the error; take a file of F16 or F32, or say \
                 `--requantise`"
            ));
        }
        let [elements, bytes] = kind.block();
        if !columns.is_multiple_of(elements) {
            item.remark = Some(format!("rows of {columns} are no whole blocks of {elements}"));
            return Ok(());
        }
        item.bytes_after = (rows * columns / elements * bytes) as u64;
        item.to = kind.to_string();
        item.kind = Some(kind);
        item.rounding = Some(rounding);
        Ok(())
    }

    /// Checks that [`Job::run`] may write to `out`. Callers use it before long work.
    ///
    /// # Errors
    /// When `out` is the model, inside it or around it, is a folder that is not of this crate, has a foreign file with the name
    /// of one to be written, or cannot be written.
    pub fn check_out(&self, out: &Path) -> Result<()> {
        if let (Ok(model), Some(place)) = (self.path.canonicalize(), place(out))
            && (place.starts_with(&model) || model.starts_with(&place))
        {
            return Err(Error::config(format!(
                "{} is the model itself, or inside or around it; name a place beside it",
                out.display()
            )));
        }
        // A folder's files may be links to places outside of it.
        let reads =
            |read: &Path| read.canonicalize().is_ok_and(|read| place(out).is_some_and(|out| out == read));
        let links = std::fs::read_dir(&self.path).into_iter().flatten().flatten().map(|entry| entry.path());
        if let Some(link) = links.into_iter().find(|link| reads(link)) {
            return Err(Error::config(format!(
                "{} is what {} stands for, which is read; name another place",
                out.display(),
                link.display()
            )));
        }
        match self.format {
            Format::Gguf => files::check(out),
            Format::CompressedTensors => {
                let mut names = settings_in(&self.path)?;
                // The index is included even if none is written: a foreign index would list other files than ours.
                names.extend(self.shards().into_iter().map(|(file, _)| file).chain([INDEX.to_string()]));
                files::check_folder(out, names)
            }
        }
    }
}

impl JobSettings {
    fn check(&self, format: Format) -> Result<()> {
        let wrong = |message: String| Err(Error::config(format!("quantise: {message}")));
        match (format, self.bits, self.group) {
            (_, _, Some(0)) => wrong("groups of 0 columns; a group has at least one".into()),
            (Format::CompressedTensors, bits, _) if !matches!(bits, 4 | 8) => {
                wrong(format!("{bits} bits; folders have levels of 4 or 8 bits"))
            }
            (Format::Gguf, bits, _) if !matches!(bits, 4 | 5 | 8) => {
                wrong(format!("{bits} bits; GGUF has types of 4, 5 and 8 bits"))
            }
            (Format::Gguf, _, Some(group)) if group != GGUF_GROUP => {
                wrong(format!("groups of {group} columns; GGUF has groups of {GGUF_GROUP} and no others"))
            }
            (Format::Gguf, 8, _) if self.asymmetric => {
                wrong("GGUF has no type of 8 bits with offsets; leave out `--asymmetric`".into())
            }
            _ => Ok(()),
        }
    }
}

/// What is written of a model.
fn target(source: &Source, settings: &JobSettings) -> Result<Format> {
    match (source, settings.format) {
        (Source::Folder(_), Some(Format::Gguf)) if settings.conversion.is_some() => Ok(Format::Gguf),
        (Source::Folder(_), None | Some(Format::CompressedTensors)) => Ok(Format::CompressedTensors),
        (Source::Gguf(_), None | Some(Format::Gguf)) => Ok(Format::Gguf),
        (Source::Gguf(_), Some(Format::CompressedTensors)) => Err(Error::config(
            "quantise: a GGUF file has no settings and no tokenizer of Hugging Face's form, so it is not written as a folder; \
             take the model's own folder, or write GGUF",
        )),
        (Source::Folder(_), Some(Format::Gguf)) => {
            Err(Error::config("quantise: a folder becomes a GGUF file only with a conversion of its names"))
        }
    }
}

/// Opens a model, and reads the `config.json` of a folder.
fn open(path: &Path) -> Result<(Source, Value)> {
    if !path.exists() {
        return Err(missing(path));
    }
    if !path.is_dir() {
        needs_folder(path)?;
        return Ok((Source::Gguf(Gguf::open(path)?), Value::Null));
    }
    let file = path.join(CONFIG);
    let text = std::fs::read_to_string(&file).map_err(|e| {
        let message = format!("{e}; a folder needs it, because it says how weights are packed");
        Error::io(&file, std::io::Error::new(e.kind(), message))
    })?;
    let config: Value = serde_json::from_str(&text).map_err(|e| Error::format(&file, e.to_string()))?;
    if !config.is_object() {
        return Err(Error::format(&file, "this is no JSON object"));
    }
    if !config["quantization_config"].is_null() {
        return Err(Error::format(
            &file,
            "`quantization_config`: these weights are packed already; take the folder from which they were made",
        ));
    }
    Ok((Source::Folder(Shards::open(path)?), config))
}

/// The path of what may not be there yet, with links resolved.
fn place(out: &Path) -> Option<PathBuf> {
    out.canonicalize().ok().or_else(|| {
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(parent.canonicalize().ok()?.join(out.file_name()?))
    })
}

/// The type in GGUF of tensors that a folder has.
fn kind_of(dtype: FileDType) -> Option<GgufType> {
    match dtype {
        FileDType::F32 => Some(GgufType::F32),
        FileDType::F16 => Some(GgufType::F16),
        FileDType::BF16 => Some(GgufType::BF16),
        _ => None,
    }
}

fn wrong_in(path: &Path, message: &str) -> Error {
    Error::config(format!("{}: {message}", path.display()))
}

/// The items of a folder under the names of a GGUF file, where vectors are of F32.
fn converted(items: Vec<Item>, conversion: &Conversion) -> Result<Vec<Item>, String> {
    let mut all = Vec::new();
    for item in items {
        let Some(place) = conversion.places.get(&item.source) else { continue };
        if item.kind.is_none() {
            return Err(format!(
                "tensor `{}`: {} has no place in a GGUF file; F32, F16 and BF16 have",
                item.source, item.from
            ));
        }
        if item.shape.len() > 2 {
            return Err(format!(
                "tensor `{}` is {:?}; these models have vectors and matrices",
                item.source, item.shape
            ));
        }
        let mut item = Item { name: place.name.clone(), place: place.clone(), ..item };
        item.part = Part::of(&item.name);
        if item.shape.len() < 2 {
            item.kind = Some(GgufType::F32);
            item.to = "F32".into();
            item.bytes_after = 4 * item.count() as u64;
        }
        all.push(item);
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}
