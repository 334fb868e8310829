//! A model as it was published: a GGUF file, or a folder as Hugging Face's libraries write it.

use super::read::{Form, HUGGING_FACE, Head, Matrix, Reader, Tensors, check, fits};
use super::{LlamaSettings, gguf};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::lm::{Lm, LmConfig};
use crate::share::Packing;
use crate::store::gguf::{Conversion, Gguf};
use crate::store::{FileDType, QuantConfig, Shards, Weights, fingerprint, located, missing, needs_folder};
use crate::tensor::Tensor;
use std::cell::RefCell;
use std::path::{Path, PathBuf};

/// A model on disk whose header has been read. No device is needed yet.
pub struct Published {
    path: PathBuf,
    kind: String,
    config: LmConfig,
    source: Source,
}

enum Source {
    Gguf(Gguf),
    Folder(Shards, Box<LlamaSettings>, Option<QuantConfig>),
}

impl Published {
    /// Opens a GGUF file, or a folder with `config.json` and `model.safetensors` or its shards. A name `owner/name` under which
    /// nothing is here is looked for in the cache of Hugging Face's hub; nothing is downloaded.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] when a file cannot be read, [`Error::Config`] for a model that is not computed. The
    /// message says why.
    pub fn open(path: impl AsRef<Path>) -> Result<Published> {
        let path = located(path.as_ref());
        if !path.exists() {
            return Err(missing(&path));
        }
        if !path.is_dir() {
            needs_folder(&path)?;
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
        let packed = settings.quantization.as_ref().map(QuantConfig::from_json).transpose()?;
        let (kind, config) = (settings.kind.clone(), settings.config.clone());
        Ok(Published {
            kind,
            config,
            source: Source::Folder(Shards::open(&path)?, Box::new(settings), packed),
            path,
        })
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

    /// What was chosen where the files can be read in more than one way, for the user: [`Shards::notes`].
    pub fn notes(&self) -> &[String] {
        match &self.source {
            Source::Gguf(_) => &[],
            Source::Folder(shards, ..) => shards.notes(),
        }
    }

    /// Sizes and constants.
    pub fn config(&self) -> &LmConfig {
        &self.config
    }

    /// Checks from the headers that every tensor that the model needs is there, in its sizes and in a type that is read, and that
    /// there is none that these models do not have. Returns the number of weights, however many bits each has.
    ///
    /// # Errors
    /// [`Error::Format`] and [`Error::Config`], which name the tensor.
    pub fn check(&self) -> Result<usize> {
        match &self.source {
            Source::Gguf(file) => gguf::check(file),
            Source::Folder(shards, settings, packed) => {
                self.check_head()?;
                let folder =
                    Folder { shards, packed: packed.as_ref(), form: Form::Stored, read: RefCell::default() };
                check(&folder, &HUGGING_FACE, &self.config, settings.head(), settings.config.biases)
            }
        }
    }

    /// How a folder becomes a GGUF file, without its tokenizer.
    ///
    /// # Errors
    /// [`Error::Config`] when this is a GGUF file already, and for what such a file cannot say.
    pub fn gguf(&self) -> Result<Conversion> {
        match &self.source {
            Source::Gguf(_) => Err(Error::config(format!("{} is a GGUF file already", self.path.display()))),
            Source::Folder(_, _, Some(_)) => Err(Error::config(format!(
                "{}: its weights are packed already (`quantization_config`); take the folder from which they were made",
                self.path.display()
            ))),
            Source::Folder(shards, settings, None) => {
                self.check()?;
                settings.gguf(&shards.names())
            }
        }
    }

    /// How the weights are packed, if a folder says it.
    pub fn packing(&self) -> Option<String> {
        match &self.source {
            Source::Folder(_, _, Some(packed)) => Some(packed.bits_text()),
            _ => None,
        }
    }

    /// Bytes of all tensors on disk.
    ///
    /// # Errors
    /// When a file has tensors of unknown size.
    pub fn bytes(&self) -> Result<usize> {
        match &self.source {
            Source::Gguf(file) => file.names().map(|name| file.bytes(name)).sum(),
            Source::Folder(shards, ..) => {
                shards.names().iter().map(|name| Ok(shards.bytes(name)?.len())).sum()
            }
        }
    }

    /// A hash of names, shapes and elements of all tensors, which tells models apart, also the same one in other packings. It reads all
    /// files.
    ///
    /// # Errors
    /// [`Error::Format`] when a file is damaged.
    pub fn fingerprint(&self) -> Result<u128> {
        match &self.source {
            Source::Gguf(file) => {
                let mut names: Vec<&str> = file.names().collect();
                names.sort_unstable();
                let one =
                    |name: &str| Ok((name.to_string(), file.shape(name)?.to_vec(), file.bytes_of(name)?));
                fingerprint(names.into_iter().map(one))
            }
            Source::Folder(shards, ..) => shards.fingerprint(),
        }
    }

    /// Reads the weights to a device, for sequences of up to `context` tokens, or the model's own number if that is less.
    ///
    /// # Errors
    /// [`Error::Format`] when a tensor is missing, [`Error::Config`] when it has another shape, a scale is not finite, or there
    /// is a tensor that these models do not have; when the device fails.
    pub fn load(&self, gpu: &Gpu, context: usize, form: Form) -> Result<Lm> {
        self.load_watched(gpu, context, form, &|_| Ok(()))
    }

    /// [`Published::load`], which tells `watch` how many of the blocks have been read. An error of `watch` ends it.
    ///
    /// # Errors
    /// As [`Published::load`], and what `watch` returns.
    pub fn load_watched(
        &self,
        gpu: &Gpu,
        context: usize,
        form: Form,
        watch: &dyn Fn(usize) -> Result<()>,
    ) -> Result<Lm> {
        let (shards, settings, packed) = match &self.source {
            Source::Gguf(file) => return gguf::load(gpu, file, context, form, watch),
            Source::Folder(shards, settings, packed) => (shards, settings, packed.as_ref()),
        };
        self.check_head()?;
        let config = self.config.clone().context(self.config.context.min(context));
        let frequencies = config.rope_scaling.frequencies(config.head_dim(), config.rope_base);
        let folder = Folder { shards, packed, form, read: RefCell::default() };
        let reader =
            Reader::new(gpu, &folder, &HUGGING_FACE, config).biases(settings.config.biases).watch(watch);
        reader.model(settings.head(), frequencies)
    }
}

impl Published {
    /// Refuses a folder whose model has a head of its own that is in none of its files.
    fn check_head(&self) -> Result<()> {
        let Source::Folder(shards, settings, packed) = &self.source else { return Ok(()) };
        let head = format!("{}.weight", HUGGING_FACE.head);
        if settings.config.tied_head || packed.is_some() || shards.contains(&head) {
            return Ok(());
        }
        Err(Error::format(
            shards.path(),
            format!(
                "there is no `{head}`, and config.json does not say `tie_word_embeddings: true`, with which the table of token \
                 vectors would stand for it; was it left out when the model was saved?"
            ),
        ))
    }
}

impl LlamaSettings {
    /// A head in the file of a tied model is used, as transformers 5 does.
    fn head(&self) -> Head {
        if self.config.tied_head { Head::AsFound } else { Head::Own }
    }
}

/// The tensors of a folder in one form.
struct Folder<'a> {
    shards: &'a Shards,
    packed: Option<&'a QuantConfig>,
    form: Form,
    /// The packed weight that was read last, whose shape is asked for before its words.
    read: RefCell<Option<(String, PackedWeight)>>,
}

type PackedWeight = (Packing, [usize; 2], Vec<u32>);

/// The ends of the names of the tensors that make up a packed weight.
const PARTS: [&str; 9] = [
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_shape",
    ".weight_g_idx",
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
];

impl Folder<'_> {
    /// Reads the packed weight of this name, unless the folder has it as a tensor.
    fn packed(&self, name: &str) -> Result<Option<PackedWeight>> {
        let kept = self.read.borrow_mut().take_if(|(of, _)| of == name);
        match (kept, self.packed) {
            (Some((_, weight)), _) => Ok(Some(weight)),
            (None, Some(packed)) => packed.packed(self.shards, name),
            (None, None) => Ok(None),
        }
    }
}

impl Tensors for Folder<'_> {
    fn names(&self) -> Vec<String> {
        let names = self.shards.names();
        if self.packed.is_none() {
            return names;
        }
        // The parts of a packed weight stand for the weight.
        let whole = |name: String| {
            let path = PARTS.iter().find_map(|part| name.strip_suffix(part));
            path.map_or(name.clone(), |path| format!("{path}.weight"))
        };
        names.into_iter().map(whole).collect()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        if let Some(weight) = self.packed(name)? {
            let shape = weight.1.to_vec();
            *self.read.borrow_mut() = Some((name.into(), weight));
            return Ok(shape);
        }
        self.shards.shape(name)
    }

    fn check(&self, name: &str, want: &[usize]) -> Result<()> {
        // The sizes of a packed weight are seen when it is read.
        let parts = name.strip_suffix(".weight").filter(|_| self.packed.is_some());
        if parts.is_some_and(|path| PARTS.iter().any(|part| self.shards.contains(&format!("{path}{part}")))) {
            return Ok(());
        }
        match self.shards.dtype(name)? {
            FileDType::F32 | FileDType::F16 | FileDType::BF16 | FileDType::F64 => {
                fits(name, &self.shards.shape(name)?, want)
            }
            other => Err(Error::config(format!(
                "tensor `{name}` is {other}, which holds no weights that are read"
            ))),
        }
    }

    fn matrix(&self, gpu: &Gpu, name: &str) -> Result<Matrix> {
        if let Some((packing, shape, words)) = self.packed(name)? {
            return Ok(match self.form {
                Form::Stored => Matrix::Packed(packing, words),
                Form::F32 => {
                    Matrix::Tensor(Tensor::from_slice(gpu, &packing.decode(&words, shape[1]), shape))
                }
            });
        }
        let dtype = match self.shards.dtype(name)? {
            FileDType::F16 => DType::F16,
            FileDType::BF16 => DType::Bf16,
            _ => DType::F32,
        };
        if self.form == Form::F32 || !dtype.is_half() {
            return Ok(Matrix::Tensor(self.shards.read(gpu, name)?));
        }
        let bytes = self.shards.bytes(name)?;
        Ok(Matrix::Tensor(Tensor::resident(gpu, dtype, bytes, &self.shards.shape(name)?[..])))
    }

    fn vector(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        self.shards.read(gpu, name)
    }
}
