//! Sources of weights: in memory, in one file, or in shards with an index.

use super::{File, FileDType, Info};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::shape::MAX_AXES;
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Named float tensors that are read one at a time, so only one has to be in memory.
pub trait Weights {
    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// The sizes of a tensor's axes.
    ///
    /// # Errors
    /// When there is no tensor of this name.
    fn shape(&self, name: &str) -> Result<Vec<usize>>;

    /// Reads a tensor as f32 on the device, without gradient tracking.
    ///
    /// # Errors
    /// When there is no float tensor of this name, or the file or the device fails.
    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor>;

    /// Reads a range of a tensor's elements in row-major order, as a flat tensor. Callers use it to read a tensor in parts.
    ///
    /// # Errors
    /// As [`Weights::read`].
    ///
    /// # Panics
    /// When the tensor has fewer elements.
    fn read_range(&self, gpu: &Gpu, name: &str, range: Range<usize>) -> Result<Tensor> {
        let x = self.read(gpu, name)?;
        Ok(x.reshape([x.count()]).slice(0, range))
    }
}

impl Weights for BTreeMap<String, Tensor> {
    fn names(&self) -> Vec<String> {
        self.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.get(name).map(|x| x.shape().to_vec()).ok_or_else(|| missing(name))
    }

    fn read(&self, _: &Gpu, name: &str) -> Result<Tensor> {
        self.get(name).map(|x| x.detach().cast(DType::F32)).ok_or_else(|| missing(name))
    }
}

impl<W: Weights + ?Sized> Weights for &W {
    fn names(&self) -> Vec<String> {
        (**self).names()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        (**self).shape(name)
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        (**self).read(gpu, name)
    }

    fn read_range(&self, gpu: &Gpu, name: &str, range: Range<usize>) -> Result<Tensor> {
        (**self).read_range(gpu, name, range)
    }
}

fn missing(name: &str) -> Error {
    Error::config(format!("there is no tensor `{name}` in these weights"))
}

impl Weights for File {
    fn names(&self) -> Vec<String> {
        File::names(self).map(String::from).collect()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        Ok(self.info(name)?.shape.clone())
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        Ok(Tensor::from_slice(gpu, &self.tensor_f32(name)?, &self.info(name)?.shape[..]))
    }
}

/// A model on disk: one safetensors file, or a folder of shards with `model.safetensors.index.json`. Files are mapped, and a
/// tensor is read from the disk when it is first used.
#[derive(Debug)]
pub struct Shards {
    path: PathBuf,
    files: Vec<File>,
    /// Index of the file that holds each tensor.
    holders: BTreeMap<String, usize>,
}

/// The name of an index of shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

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

/// The first file of a folder that looks like weights by other names or of other formats.
fn other_weights(folder: &Path) -> Option<String> {
    let names =
        std::fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| [".safetensors", ".bin", ".gguf"].iter().any(|end| name.ends_with(end))).min()
}

impl Shards {
    /// Opens a `.safetensors` file, an index file, or a folder that holds `model.safetensors.index.json` or
    /// `model.safetensors`.
    ///
    /// # Errors
    /// When a file is missing, truncated or has an inconsistent header, or the index names a tensor that its shard does not have
    /// or a file outside its own folder.
    pub fn open(path: impl AsRef<Path>) -> Result<Shards> {
        let path = path.as_ref();
        if path.is_dir() {
            let [index, single] = [INDEX, "model.safetensors"].map(|name| path.join(name));
            return match (index.is_file(), single.is_file()) {
                (true, _) => Shards::sharded(&index),
                (false, true) => Shards::single(&single),
                _ => {
                    let has = other_weights(path).map_or(String::new(), |name| format!("; it has {name}"));
                    let message = format!("the folder holds neither {INDEX} nor model.safetensors{has}");
                    Err(Error::format(path, message))
                }
            };
        }
        if path.extension().is_some_and(|e| e == "json") {
            return Shards::sharded(path);
        }
        Shards::single(path)
    }

    fn single(path: &Path) -> Result<Shards> {
        let file = File::open(path)?;
        let holders = file.names().map(|name| (name.to_string(), 0)).collect();
        Ok(Shards { path: path.to_path_buf(), files: vec![file], holders })
    }

    fn sharded(index: &Path) -> Result<Shards> {
        let wrong = |message: String| Error::format(index, format!("no valid index of shards: {message}"));
        let text = std::fs::read_to_string(index).map_err(|e| Error::io(index, e))?;
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        let map =
            json["weight_map"].as_object().ok_or_else(|| wrong("there is no object `weight_map`".into()))?;
        let folder = index.parent().unwrap_or(Path::new("."));
        let (mut files, mut holders) = (Vec::<File>::new(), BTreeMap::new());
        let mut places: BTreeMap<&str, usize> = BTreeMap::new();
        for (name, shard) in map {
            let shard = shard.as_str().ok_or_else(|| wrong(format!("`{name}` names no file")))?;
            if Path::new(shard).components().count() != 1 || shard == ".." {
                return Err(wrong(format!("`{name}` is in `{shard}`, which is not a file of this folder")));
            }
            let place = match places.get(shard) {
                Some(&place) => place,
                None => {
                    files.push(File::open(folder.join(shard))?);
                    places.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            if !files[place].contains(name) {
                return Err(wrong(format!("`{name}` should be in {shard}, which has no such tensor")));
            }
            holders.insert(name.clone(), place);
        }
        Ok(Shards { path: index.to_path_buf(), files, holders })
    }

    /// The path of the file or index that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.holders.contains_key(name)
    }

    /// The file that holds a tensor.
    ///
    /// # Errors
    /// When there is no tensor of this name; the message lists the nearest names.
    pub fn file(&self, name: &str) -> Result<&File> {
        match self.holders.get(name) {
            Some(&place) => Ok(&self.files[place]),
            // A tensor that the index does not list counts as missing, even if a shard has it.
            None => match self.files.first().map(|file| file.info(name)) {
                Some(Err(error)) => Err(error),
                _ => Err(Error::format(&self.path, format!("there is no tensor `{name}`"))),
            },
        }
    }

    /// Shape and type of a tensor.
    ///
    /// # Errors
    /// As [`Shards::file`].
    pub fn info(&self, name: &str) -> Result<&Info> {
        self.file(name)?.info(name)
    }

    /// The element type of a tensor in the file.
    ///
    /// # Errors
    /// As [`Shards::file`].
    pub fn dtype(&self, name: &str) -> Result<FileDType> {
        Ok(self.info(name)?.dtype)
    }
}

impl Weights for Shards {
    fn names(&self) -> Vec<String> {
        self.holders.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        Ok(self.info(name)?.shape.clone())
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
        let file = self.file(name)?;
        let n = range.len();
        let of = |size: usize| Ok::<_, Error>(&file.bytes(name)?[range.start * size..range.end * size]);
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
            _ => Ok(Tensor::from_slice(gpu, &file.tensor_f32(name)?[range], [n])),
        }
    }
}
