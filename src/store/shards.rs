//! A model on disk: one safetensors file, or several.

use super::{File, FileDType, Info, Weights, foreign, hub, some};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::shape::MAX_AXES;
use crate::tensor::Tensor;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A model on disk: one safetensors file, or a folder of shards with `model.safetensors.index.json`. Files are mapped, and a
/// tensor is read from the disk when it is first used.
///
/// Where a folder can be read in more than one way, it is read as transformers reads it, and [`Shards::notes`] says what was
/// chosen. Names of tensors are those that the model itself has: what `torch.compile` (`_orig_mod.`) and wrappers for several
/// devices (`module.`) put into them is left out.
#[derive(Debug)]
pub struct Shards {
    path: PathBuf,
    files: Vec<File>,
    /// Where each tensor is.
    places: BTreeMap<String, Place>,
    notes: Vec<String>,
}

/// Where a tensor is.
#[derive(Debug)]
struct Place {
    /// Index of its file.
    file: usize,
    /// Its name there.
    name: String,
}

/// The name of an index of shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The name of weights in one file.
const SINGLE: &str = "model.safetensors";

/// Refuses weights of Hugging Face without their folder, where a model is to be read and not weights alone.
pub(crate) fn needs_folder(path: &Path) -> Result<()> {
    let is_weights = path.is_file() && path.extension().is_some_and(|e| e == "safetensors" || e == "json");
    match is_weights {
        false => Ok(()),
        true => Err(Error::config(format!(
            "{}: name the folder of this file, which has config.json and the tokenizer",
            path.display()
        ))),
    }
}

/// Which files a path stands for.
enum Layout {
    Single(PathBuf),
    Index(PathBuf),
    /// Shards in a folder that has no index.
    Unlisted,
}

impl Layout {
    /// A whole file goes before an index, as in transformers.
    fn of(path: &Path) -> Layout {
        if !path.is_dir() {
            let is_index = path.extension().is_some_and(|e| e == "json");
            return if is_index { Layout::Index(path.into()) } else { Layout::Single(path.into()) };
        }
        let [single, index] = [SINGLE, INDEX].map(|name| path.join(name));
        match () {
            () if single.is_file() => Layout::Single(single),
            () if index.is_file() => Layout::Index(index),
            () => Layout::Unlisted,
        }
    }
}

/// The files by which two paths to one model are known to be the same: all of its weights, with links resolved. The index says
/// nothing, because two models may have equal ones.
pub(crate) fn same_weights(path: &Path) -> Vec<PathBuf> {
    let beside = |index: &Path, name: &String| index.with_file_name(name);
    let files: Vec<PathBuf> = match Layout::of(path) {
        Layout::Single(file) => vec![file],
        Layout::Index(index) => {
            listed(&index).unwrap_or_default().iter().map(|n| beside(&index, n)).collect()
        }
        Layout::Unlisted => {
            let parts = files_in(path).into_iter().filter(|name| part(name).is_some());
            parts.map(|name| path.join(name)).collect()
        }
    };
    let files = if files.is_empty() { vec![path.to_path_buf()] } else { files };
    files.into_iter().map(|file| file.canonicalize().unwrap_or(file)).collect()
}

/// The names of the files in a folder, sorted.
fn files_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Splits the name of a shard, `STEM-00001-of-00003.safetensors`, into the stem, its number and their number.
fn part(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, all) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    (digits(all) && digits(number)).then(|| Some((stem, number.parse().ok()?, all.parse().ok()?)))?
}

impl Shards {
    /// Opens a `.safetensors` file, an index file, or a folder that holds `model.safetensors`, `model.safetensors.index.json` or
    /// all of the shards `model-00001-of-...`. A name of Hugging Face's hub is looked for by [`located`](super::located).
    ///
    /// # Errors
    /// When a file is missing, truncated, of another format or has an inconsistent header, or the index names a file outside its
    /// own folder. The message says what to do.
    pub fn open(path: impl AsRef<Path>) -> Result<Shards> {
        let path = &hub::located(path.as_ref());
        if !path.exists() {
            return Err(hub::missing(path));
        }
        let mut shards = match Layout::of(path) {
            Layout::Single(file) => Shards::of(&file, vec![File::open(&file)?]),
            Layout::Index(index) => Shards::sharded(&index)?,
            Layout::Unlisted => Shards::unlisted(path)?,
        };
        let index = path.join(INDEX);
        if index.is_file() && shards.path.ends_with(SINGLE) {
            // An index of this one file says nothing else.
            let is_same = |all: BTreeSet<String>| all.iter().all(|file| file == SINGLE);
            if !listed(&index).is_ok_and(is_same) {
                shards.note(format!("{SINGLE} is read, and {INDEX} beside it is not"));
            }
        }
        shards.strip();
        let fields: BTreeSet<&str> = shards.files.iter().flat_map(|file| file.unknown_fields()).collect();
        if !fields.is_empty() {
            let fields = some(fields);
            shards.note(format!(
                "the header describes tensors by {fields} too, which the format does not have"
            ));
        }
        Ok(shards)
    }

    /// All tensors of these files.
    fn of(path: &Path, files: Vec<File>) -> Shards {
        let mut places = BTreeMap::new();
        for (file, opened) in files.iter().enumerate() {
            for name in opened.names() {
                places.entry(name.to_string()).or_insert(Place { file, name: name.into() });
            }
        }
        Shards { path: path.to_path_buf(), files, places, notes: Vec::new() }
    }

    /// Opens the shards of a folder that has no index.
    fn unlisted(folder: &Path) -> Result<Shards> {
        let names = files_in(folder);
        let parts: Vec<_> = names.iter().filter_map(|name| Some((name, part(name)?))).collect();
        let Some(&(_, (stem, _, count))) = parts.first() else {
            return Err(Error::format(folder, without_weights(folder, &names)));
        };
        let name = |i: usize| format!("{stem}-{i:05}-of-{count:05}.safetensors");
        let absent: Vec<String> = (1..=count).map(name).filter(|name| !names.contains(name)).collect();
        if !absent.is_empty() || parts.len() != count {
            let message = match absent.is_empty() {
                true => format!(
                    "the folder holds shards of several models and no {INDEX}; name the index or one file"
                ),
                false => format!(
                    "the folder holds {} of {count} shards and no {INDEX}; {} is missing: download it again",
                    parts.len(),
                    some(absent.iter().map(String::as_str))
                ),
            };
            return Err(Error::format(folder, message));
        }
        let files = (1..=count).map(|i| File::open(folder.join(name(i)))).collect::<Result<Vec<_>>>()?;
        let mut shards = Shards::of(&folder.join(INDEX), files);
        shards.note(format!("there is no {INDEX}; all {count} shards are read"));
        Ok(shards)
    }

    fn sharded(index: &Path) -> Result<Shards> {
        let wrong = |message: String| Error::format(index, format!("no valid index of shards: {message}"));
        let json = read_index(index)?;
        let map =
            json["weight_map"].as_object().ok_or_else(|| wrong("there is no object `weight_map`".into()))?;
        let folder = index.parent().unwrap_or(Path::new("."));
        let (mut files, mut places) = (Vec::<File>::new(), BTreeMap::new());
        let mut absent = BTreeSet::new();
        let mut opened: BTreeMap<&str, usize> = BTreeMap::new();
        for (name, shard) in map {
            let shard = shard.as_str().ok_or_else(|| wrong(format!("`{name}` names no file")))?;
            let shard = shard.strip_prefix("./").unwrap_or(shard);
            if Path::new(shard).components().count() != 1 || shard == ".." {
                return Err(wrong(format!("`{name}` is in `{shard}`, which is not a file of this folder")));
            }
            let file = match opened.get(shard) {
                Some(&file) => file,
                None => {
                    files.push(shard_of(folder, shard)?);
                    opened.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            // What is really missing is found when it is asked for.
            if files[file].contains(name) {
                places.insert(name.clone(), Place { file, name: name.clone() });
            } else {
                absent.insert(name.clone());
            }
        }
        let mut forgotten = siblings(&opened);
        forgotten.retain(|shard| folder.join(shard).is_file());
        for shard in &forgotten {
            files.push(File::open(folder.join(shard))?);
        }
        let mut shards = Shards { path: index.to_path_buf(), files, places, notes: Vec::new() };
        if !forgotten.is_empty() {
            let names = some(forgotten.iter().map(String::as_str));
            shards.note(format!("the index does not list {names} of the same shards"));
        }
        shards.add_unlisted();
        absent.retain(|name| !shards.contains(name));
        if !absent.is_empty() {
            let names = some(absent.iter().map(String::as_str));
            shards.note(format!("the index lists {names}, which no shard has"));
        }
        Ok(shards)
    }

    /// Adds the tensors that the index does not list: those of listed shards, which transformers reads too, and those of the other
    /// shards of the same model.
    fn add_unlisted(&mut self) {
        let (mut added, mut again) = (BTreeSet::new(), BTreeSet::new());
        for (file, opened) in self.files.iter().enumerate() {
            for name in opened.names() {
                match self.places.get(name) {
                    Some(place) if place.file == file => {}
                    Some(_) => drop(again.insert(name.to_string())),
                    None => {
                        self.places.insert(name.into(), Place { file, name: name.into() });
                        added.insert(name.to_string());
                    }
                }
            }
        }
        again.retain(|name| !added.contains(name));
        if !added.is_empty() {
            let names = some(added.iter().map(String::as_str));
            self.note(format!("the shards have {names}, which the index does not list; they are read too"));
        }
        if !again.is_empty() {
            let names = some(again.iter().map(String::as_str));
            self.note(format!(
                "several shards have {names}; they are read from the one that the index names"
            ));
        }
    }

    /// Leaves out what `torch.compile` and wrappers put into names, unless two names would become one.
    fn strip(&mut self) {
        // No layer has such a name. They are put wherever a part of a model is wrapped.
        const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];
        let mut plain: Vec<String> = self.places.keys().cloned().collect();
        let mut left_out = BTreeSet::new();
        for name in &mut plain {
            let found = WRAPPERS.iter().filter(|wrapper| name.split('.').any(|part| part == **wrapper));
            left_out.extend(found.map(|wrapper| format!("{wrapper}.")));
            let parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
            *name = parts.join(".");
        }
        while !plain.is_empty() && plain.iter().all(|name| name.starts_with("module.")) {
            left_out.insert("module.".to_string());
            plain.iter_mut().for_each(|name| *name = name["module.".len()..].to_string());
        }
        let distinct: BTreeSet<&String> = plain.iter().collect();
        if left_out.is_empty() || distinct.len() != plain.len() || plain.iter().any(String::is_empty) {
            return;
        }
        let all = std::mem::take(&mut self.places).into_values();
        self.places = plain.into_iter().zip(all).collect();
        let left_out = some(left_out.iter().map(String::as_str));
        self.note(format!("its tensors' names have {left_out} of a wrapper in them, which is left out"));
    }

    /// Gives tensors other names: every `from` in a name becomes its `to`, in the order of the table.
    ///
    /// # Errors
    /// When a `from` is in no name, or two tensors would have one name.
    pub(crate) fn rename(&mut self, table: &[(String, String)]) -> Result<()> {
        let wrong = |message: String| Err(Error::format(&self.path, message));
        let mut names: Vec<String> = self.places.keys().cloned().collect();
        for (from, to) in table {
            if from.is_empty() || !names.iter().any(|name| name.contains(from)) {
                return wrong(format!("no tensor's name has `{from}` in it, which is to become `{to}`"));
            }
            names.iter_mut().for_each(|name| *name = name.replace(from, to));
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = names.iter().find(|name| name.is_empty() || !seen.insert(name.as_str())) {
            return wrong(format!("two tensors would have the name `{twice}`"));
        }
        let all = std::mem::take(&mut self.places).into_values();
        self.places = names.into_iter().zip(all).collect();
        Ok(())
    }

    fn note(&mut self, what: String) {
        self.notes.push(what);
    }

    /// What was chosen where the files can be read in more than one way, one sentence each, for the user.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The path of the file or index that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// The file that holds a tensor, and the tensor's name there.
    ///
    /// # Errors
    /// When there is no tensor of this name; the message lists the nearest names.
    pub fn find<'a>(&'a self, name: &str) -> Result<(&'a File, &'a str)> {
        match self.places.get(name) {
            Some(place) => Ok((&self.files[place.file], &place.name)),
            None => {
                let near = super::nearest(name, self.places.keys().map(String::as_str));
                let hint =
                    if near.is_empty() { "there are no tensors".into() } else { format!("near: {near}") };
                Err(Error::format(&self.path, format!("no tensor `{name}`; {hint}")))
            }
        }
    }

    /// Shape and type of a tensor.
    ///
    /// # Errors
    /// As [`Shards::find`].
    pub fn info(&self, name: &str) -> Result<&Info> {
        let (file, name) = self.find(name)?;
        file.info(name)
    }

    /// A hash of all tensors, which tells the weights of models apart.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn fingerprint(&self) -> Result<u128> {
        let one = |name: String| {
            let (shape, bytes) = (self.shape(&name)?, self.bytes(&name)?);
            Ok((name, shape, bytes))
        };
        super::fingerprint(self.names().into_iter().map(one))
    }

    /// The element type of a tensor in the file.
    ///
    /// # Errors
    /// As [`Shards::find`].
    pub fn dtype(&self, name: &str) -> Result<FileDType> {
        Ok(self.info(name)?.dtype)
    }

    /// The bytes of a tensor as they are stored.
    ///
    /// # Errors
    /// As [`Shards::find`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let (file, name) = self.find(name)?;
        file.bytes(name)
    }
}

/// The shards of the same model as the `listed` ones that are not among them, by their numbers.
fn siblings(listed: &BTreeMap<&str, usize>) -> Vec<String> {
    let sets: BTreeSet<(&str, usize)> =
        listed.keys().filter_map(|name| part(name)).map(|(stem, _, count)| (stem, count)).collect();
    let names = |(stem, count): (&str, usize)| {
        let name = |i: usize| format!("{stem}-{i:05}-of-{count:05}.safetensors");
        (1..=count).map(name).collect::<Vec<_>>()
    };
    let all = sets.into_iter().flat_map(names);
    all.filter(|name| !listed.contains_key(name.as_str())).collect()
}

/// Opens a file that an index lists.
fn shard_of(folder: &Path, shard: &str) -> Result<File> {
    let path = folder.join(shard);
    match path.exists() {
        true => File::open(path),
        false => {
            let message = "the index lists this file, which is not there; download it again";
            Err(Error::io(path, std::io::Error::new(std::io::ErrorKind::NotFound, message)))
        }
    }
}

fn read_index(index: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(index).map_err(|e| Error::io(index, e))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::format(index, format!("no valid index of shards: {e}")).because_of(e))
}

/// The files that an index lists.
fn listed(index: &Path) -> Result<BTreeSet<String>> {
    let json = read_index(index)?;
    let files = json["weight_map"].as_object().into_iter().flatten().filter_map(|(_, file)| file.as_str());
    Ok(files.map(|file| file.strip_prefix("./").unwrap_or(file).to_string()).collect())
}

/// Why a folder without weights of this crate's format is none, and what to do with what it has.
fn without_weights(folder: &Path, names: &[String]) -> String {
    let ending = |end: &str| names.iter().find(|name| name.ends_with(end));
    let none = format!("the folder holds neither {INDEX} nor {SINGLE}");
    let pickle = |name: &&String| {
        let [stem, end] = name.rsplit_once('.').map_or(["", ""], |(stem, end)| [stem, end]);
        matches!(end, "bin" | "pt" | "pth") && (stem.contains("model") || stem.contains("consolidated"))
    };
    if names.iter().any(|name| name == "adapter_model.safetensors") {
        return format!(
            "{none}; it has adapter_model.safetensors, an adapter: merge it into its model first, by \
             `tiebeam convert MODEL --untie --adapter FOLDER`"
        );
    }
    if let Some(name) = ending(".safetensors") {
        return format!("{none}; it has {name}, which can be named itself");
    }
    if let Some(name) = ending(".gguf") {
        return format!(
            "{none}; it has {name}: name that file where GGUF is read (`tiebeam run`, `tiebeam inspect`)"
        );
    }
    match names.iter().find(pickle) {
        Some(name) => format!("{none}; it has {name}: {}", foreign::pytorch()),
        None if hub::is_cached(folder) => format!("{none}; the download is not complete: run it again"),
        None => none,
    }
}

impl Weights for Shards {
    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        Ok(self.info(name)?.shape.clone())
    }

    fn is_float(&self, name: &str) -> bool {
        self.dtype(name).is_ok_and(FileDType::is_float)
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        let shape = self.shape(name)?;
        let count = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        if shape.len() > MAX_AXES || count.is_none_or(|n| n > u32::MAX as usize) {
            let message = format!(
                "tensor `{name}` {shape:?}: at most {MAX_AXES} axes and {} elements are computed with",
                u32::MAX
            );
            return Err(Error::format(self.path(), message));
        }
        Ok(self.read_range(gpu, name, 0..shape.iter().product())?.reshape(&shape[..]))
    }

    fn read_range(&self, gpu: &Gpu, name: &str, range: Range<usize>) -> Result<Tensor> {
        let (file, stored) = self.find(name)?;
        let n = range.len();
        let of = |size: usize| Ok::<_, Error>(&file.bytes(stored)?[range.start * size..range.end * size]);
        match self.dtype(name)? {
            FileDType::F32 => Ok(Tensor::from_bytes(gpu, DType::F32, of(4)?, [n])),
            FileDType::F16 => Ok(Tensor::from_bytes(gpu, DType::F16, of(2)?, [n]).cast(DType::F32)),
            FileDType::BF16 => Ok(Tensor::from_bf16(gpu, of(2)?, [n])),
            FileDType::F64 => {
                let narrow = super::bytes::to_f32(FileDType::F64, of(8)?);
                let narrow =
                    narrow.map_err(|e| Error::format(file.path(), format!("tensor `{name}`: {e}")))?;
                Ok(Tensor::from_slice(gpu, &narrow, [n]))
            }
            // `tensor_f32` refuses all other types, with a message that names the type.
            _ => Ok(Tensor::from_slice(gpu, &file.tensor_f32(stored)?[range], [n])),
        }
    }

    fn sample(&self, name: &str, length: usize, starts: &[usize]) -> Result<Option<Vec<f32>>> {
        let (file, stored) = self.find(name)?;
        file.pieces_f32(stored, length, starts).map(Some)
    }
}
