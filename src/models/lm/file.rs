//! Language models in files: safetensors with the settings in the metadata.

use super::{Lm, LmConfig};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::sharing::MOST_SHARED;
use crate::nn::{Module, ModuleFile};
use crate::ops::sequence::rope::Rope;
use crate::rng::Rng;
use crate::store::{File, fingerprint, missing};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The name of a model in a folder.
const IN_FOLDER: &str = "model.safetensors";

/// A language model on disk whose header has been read. No device is needed yet.
pub struct Saved {
    file: File,
    config: LmConfig,
}

impl Saved {
    /// The file that a path stands for: itself, or the model in a folder.
    fn file_of(path: &Path) -> PathBuf {
        if path.is_dir() { path.join(IN_FOLDER) } else { path.into() }
    }

    /// Whether there is such a model, whatever its version: a file of [`Lm::save`], or a folder with one.
    pub fn is_at(path: impl AsRef<Path>) -> bool {
        let file = File::open(Saved::file_of(path.as_ref()));
        file.is_ok_and(|file| LmConfig::is_in(file.metadata()))
    }

    /// Opens a file of [`Lm::save`], or a folder with one as `model.safetensors`.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Format`] when it cannot be read;
    /// [`Error::Config`] when it has no such model, or one of a newer version.
    pub fn open(path: impl AsRef<Path>) -> Result<Saved> {
        let path = path.as_ref();
        if !path.exists() {
            return Err(missing(path));
        }
        let file = File::open(Saved::file_of(path))?;
        let config = LmConfig::from_metadata(file.metadata(), &file.path().display().to_string())?;
        let saved = Saved { file, config };
        saved.check_size()?;
        Ok(saved)
    }

    /// Refuses settings of a model that cannot be in a file of this size, before anything of that size is made.
    fn check_size(&self) -> Result<()> {
        let elements =
            |name: &str| self.file.info(name).map_or(0, |info| info.shape.iter().product::<usize>());
        let held: usize = self.file.names().map(elements).sum();
        let used = self.config.used_at_most();
        match used <= u128::from(MOST_SHARED) * held as u128 {
            true => Ok(()),
            false => Err(Error::format(
                self.path(),
                format!("its settings are those of a model of {used} weights, and it has {held} numbers"),
            )),
        }
    }

    /// Where the model is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Sizes, kinds of parts, and what the depths share.
    pub fn config(&self) -> &LmConfig {
        &self.config
    }

    /// Everything that the file's metadata says, such as how the model was trained.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.file.metadata()
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.file.names().filter_map(|name| self.file.bytes(name).ok()).map(<[u8]>::len).sum()
    }

    /// A hash of the settings and of names, shapes and elements of all tensors, which tells models apart. It reads the whole file.
    ///
    /// # Errors
    /// [`Error::Format`] when the file is damaged.
    pub fn fingerprint(&self) -> Result<u128> {
        let mut names: Vec<&str> = self.file.names().collect();
        names.sort_unstable();
        let bytes = |name: &str| Ok((self.file.info(name)?.shape.clone(), self.file.bytes(name)?));
        let tensor = |name: &str| bytes(name).map(|(shape, bytes)| (name.to_string(), shape, bytes));
        // The settings are part of what is computed.
        let settings = format!("{:?}", self.config.settings());
        let settings = [Ok(("settings".to_string(), Vec::new(), settings.as_bytes()))];
        fingerprint(settings.into_iter().chain(names.into_iter().map(tensor)))
    }

    /// Reads the model to a device.
    ///
    /// # Errors
    /// [`Error::Format`] when the file's tensors are not those of its settings; when the device fails.
    pub fn load(&self, gpu: &Gpu) -> Result<Lm> {
        // What is drawn here is written over. Names and shapes follow from the settings.
        let model = Lm::try_new(gpu, self.config.clone(), &mut Rng::new(0)).map_err(|error| match error {
            Error::Config { message, .. } => Error::config(format!("{}: {message}", self.path().display())),
            other => other,
        })?;
        model.load(self.file.path())?;
        Ok(model)
    }
}

impl Lm {
    /// Writes the model with its settings to a safetensors file, which [`Lm::open`] reads. What is shared is stored once. The file is
    /// replaced whole or not at all.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Rng, Tensor};
    /// # let gpu = Gpu::open()?;
    /// # let path = std::env::temp_dir().join(format!("tiebeam-lm-{}.safetensors", std::process::id()));
    /// use tiebeam::models::lm::{Lm, LmConfig};
    /// let config = LmConfig::small().width(16).heads(2).kv_heads(2).hidden(32).context(8); // one block, 6 depths
    /// let model = Lm::new(&gpu, config, &mut Rng::new(1));
    /// model.save(&path)?;
    /// let again = Lm::open(&gpu, &path)?;
    /// let tokens = Tensor::from_slice(&gpu, &[104u32, 105], [1, 2]);
    /// assert_eq!(again.config, model.config);
    /// assert_eq!(again.forward(&tokens).to_vec::<f32>()?, model.forward(&tokens).to_vec::<f32>()?);
    /// # std::fs::remove_file(path).ok();
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the file cannot be written, or the device has failed.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_with(path, &BTreeMap::new())
    }

    /// [`Lm::save`] with text of your own in the file's metadata.
    ///
    /// # Errors
    /// As [`Lm::save`].
    pub fn save_with(&self, path: impl AsRef<Path>, metadata: &BTreeMap<String, String>) -> Result<()> {
        self.check_angles()?;
        let mut all = metadata.clone();
        all.extend(self.config.metadata());
        ModuleFile::save_with(self, path, &all)
    }

    /// Opens a file of [`Lm::save`], or a folder with one as `model.safetensors`.
    ///
    /// # Errors
    /// As [`Saved::open`] and [`Saved::load`].
    pub fn open(gpu: &Gpu, path: impl AsRef<Path>) -> Result<Lm> {
        Saved::open(path)?.load(gpu)
    }

    /// This model for sequences of up to `context` tokens, with the same leaves.
    ///
    /// # Errors
    /// [`Error::Config`] when positions are learned for another number, or the rotary angles are not those of the settings.
    pub fn with_context(&self, context: usize) -> Result<Lm> {
        let (mut new, own) = (self.clone(), self.config.context);
        if self.positions.is_some() && context != own {
            let message = format!("positions are learned for {own} tokens, and {context} are asked for");
            return Err(Error::config(message));
        }
        self.check_angles()?;
        new.config.context = context;
        new.config.check("the model")?;
        new.rope = new.config.rope(self.gpu());
        Ok(new)
    }

    /// Refuses a model that cannot be saved, since its rotary angles do not follow from its settings: one of a GGUF file with divisors of
    /// its own, as those of Llama 3 have.
    ///
    /// # Errors
    /// [`Error::Config`] for such a model; when the device fails.
    pub fn check_angles(&self) -> Result<()> {
        let table = |rope: &Option<Rope>| rope.as_ref().map(|rope| rope.table.to_vec::<f32>()).transpose();
        match table(&self.rope)? == table(&self.config.rope(self.gpu()))? {
            true => Ok(()),
            false => Err(Error::config(
                "the model's file divides the rotary angles by numbers of its own, which cannot be kept; take the folder from which \
                 the file was made",
            )),
        }
    }

    /// Number of weights that are stored, and that are used.
    pub fn counts(&self) -> [usize; 2] {
        let all = self.parameters();
        [all.stored(), all.used()]
    }
}
