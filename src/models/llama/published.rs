//! A model as it was published: a GGUF file, or a folder as Hugging Face's libraries write it.

use super::read::{HUGGING_FACE, Head, Matrix, Reader, Tensors, stored};
use super::{Llama, LlamaConfig, LlamaSettings, gguf};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::store::gguf::Gguf;
use crate::store::{FileDType, Shards, Weights};
use crate::tensor::Tensor;
use std::path::{Path, PathBuf};

/// In which form weights are kept on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Form {
    /// As they are stored: packed, in 16 bits or in f32. To run a model.
    #[default]
    Stored,
    /// As leaves in f32. To train a model, or to convert it.
    F32,
}

/// A model on disk whose header has been read. No device is needed yet.
pub struct Published {
    path: PathBuf,
    kind: String,
    config: LlamaConfig,
    source: Source,
}

enum Source {
    Gguf(Gguf),
    Folder(Shards, LlamaSettings),
}

impl Published {
    /// Opens a GGUF file, or a folder with `config.json` and `model.safetensors` or its shards.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] when a file cannot be read, [`Error::Config`] for a model that is not computed. The
    /// message says why.
    pub fn open(path: impl AsRef<Path>) -> Result<Published> {
        let path = path.as_ref().to_path_buf();
        if !path.is_dir() {
            let file = Gguf::open(&path)?;
            let (kind, config) = gguf::settings(&file)?;
            return Ok(Published { path, kind, config, source: Source::Gguf(file) });
        }
        let settings = path.join("config.json");
        let text = std::fs::read_to_string(&settings).map_err(|e| {
            let message = format!("{e}; a folder needs it for the sizes of its model");
            Error::io(&settings, std::io::Error::new(e.kind(), message))
        })?;
        let settings = LlamaSettings::from_json(&text)?;
        let (kind, config) = (settings.kind.clone(), settings.config);
        Ok(Published { kind, config, source: Source::Folder(Shards::open(&path)?, settings), path })
    }

    /// Where the model is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kind of model, as its file calls it: `llama`, `mistral`, `qwen2`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The name that the file gives the model, if it does.
    pub fn title(&self) -> Option<String> {
        match &self.source {
            Source::Gguf(file) => gguf::title(file),
            Source::Folder(..) => None,
        }
    }

    /// Sizes and constants.
    pub fn config(&self) -> LlamaConfig {
        self.config
    }

    /// Bytes of all tensors on disk.
    ///
    /// # Errors
    /// When a file has tensors of unknown size.
    pub fn bytes(&self) -> Result<usize> {
        match &self.source {
            Source::Gguf(file) => file.names().map(|name| file.bytes(name)).sum(),
            Source::Folder(shards, _) => {
                shards.names().iter().map(|name| Ok(shards.file(name)?.bytes(name)?.len())).sum()
            }
        }
    }

    /// Reads the weights to a device, for sequences of up to `context` tokens, or the model's own number if that is less.
    ///
    /// # Errors
    /// [`Error::Format`] when a tensor is missing, [`Error::Config`] when it has another shape, a scale is not finite, or there
    /// is a tensor that these models do not have; when the device fails.
    pub fn load(&self, gpu: &Gpu, context: usize, form: Form) -> Result<Llama> {
        let (shards, settings) = match &self.source {
            Source::Gguf(file) => return gguf::load(gpu, file, context, form),
            Source::Folder(shards, settings) => (shards, settings),
        };
        let config = self.config.context(self.config.context.min(context));
        let frequencies = config.rope_scaling.frequencies(config.head_dim(), config.rope_base);
        let head = if settings.tied_head { Head::Tied } else { Head::Own };
        Reader::new(gpu, &Folder(shards, form), &HUGGING_FACE, config).model(head, frequencies)
    }
}

/// The tensors of a folder in one form.
struct Folder<'a>(&'a Shards, Form);

impl Tensors for Folder<'_> {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.0.shape(name)
    }

    fn matrix(&self, gpu: &Gpu, name: &str) -> Result<Matrix> {
        let Folder(shards, form) = self;
        let dtype = match shards.dtype(name)? {
            FileDType::F16 => DType::F16,
            FileDType::BF16 => DType::Bf16,
            _ => DType::F32,
        };
        if *form == Form::F32 || !dtype.is_half() {
            return Ok(Matrix::Tensor(shards.read(gpu, name)?));
        }
        let bytes = shards.file(name)?.bytes(name)?;
        Ok(Matrix::Tensor(stored(gpu, dtype, bytes, &shards.shape(name)?)))
    }

    fn vector(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        self.0.read(gpu, name)
    }
}
