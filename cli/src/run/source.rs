//! Where a language model is read from: published files, or a file of our own.

use crate::context::{Context, unless_stopped};
use crate::train::CHECKPOINT;
use serde_json::json;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tiebeam::error::ErrorKind;
use tiebeam::models::adapter::{Adapter, Base};
use tiebeam::models::llama::{Form, Published};
use tiebeam::models::lm::{Lm, LmConfig, Saved};
use tiebeam::{Error, Gpu, Result, files};

/// A model on disk whose header has been read.
pub enum Source {
    Published(Box<Published>),
    Saved(Box<Saved>),
}

impl Source {
    /// Opens a model, and says what was chosen where its files leave a choice.
    pub fn open(path: &Path, context: &Context) -> Result<Source> {
        let of = |name: &str| path.join(name);
        if of(CHECKPOINT).is_file() && !of("model.safetensors").exists() && !of("config.json").exists() {
            return Err(Error::config(format!(
                "{}: a training that was stopped; its command with --resume ends it, and {} is the model so far",
                path.display(),
                of(CHECKPOINT).display()
            )));
        }
        // A damaged file of ours is no published model either.
        let alone =
            path.is_dir() && path.join("model.safetensors").exists() && !path.join("config.json").exists();
        if Saved::is_at(path) || alone {
            return Saved::open(path).map(Box::new).map(Source::Saved);
        }
        let published = Published::open(path)?;
        published.notes().iter().for_each(|note| context.note(format_args!("{}: {note}", path.display())));
        Ok(Source::Published(Box::new(published)))
    }

    pub fn config(&self) -> &LmConfig {
        match self {
            Source::Published(published) => published.config(),
            Source::Saved(saved) => saved.config(),
        }
    }

    /// `llama`, `mistral`, `qwen2`, or `lm` for our own.
    pub fn kind(&self) -> &str {
        match self {
            Source::Published(published) => published.kind(),
            Source::Saved(_) => "lm",
        }
    }

    pub fn bytes(&self) -> Result<usize> {
        match self {
            Source::Published(published) => published.bytes(),
            Source::Saved(saved) => Ok(saved.bytes()),
        }
    }

    /// Reads the weights to the device, for sequences of up to `most` tokens, and says what was read.
    pub fn load(
        &self,
        gpu: &Gpu,
        (most, form): (usize, Form),
        context: &Context,
        stop: &AtomicBool,
    ) -> Result<Lm> {
        let started = Instant::now();
        let bar =
            context.bar(Some(self.config().depth as u64), "reading {bar:24} {pos}/{len} blocks, ETA {eta}");
        let watch = |done: usize| {
            bar.set_position(done as u64);
            unless_stopped(stop, "nothing was written")
        };
        let model = match self {
            Source::Published(published) => published.load_watched(gpu, most, form, &watch)?,
            Source::Saved(saved) => {
                let (model, own) = (saved.load(gpu)?, saved.config().context);
                let shorter = most < own && !saved.config().has_learned_positions();
                if shorter { model.with_context(most)? } else { model }
            }
        };
        gpu.synchronize()?;
        bar.finish_and_clear();
        let (seconds, memory) = (started.elapsed().as_secs_f64(), gpu.memory_stats().used);
        let (parameters, bytes) = (self.parameters(&model)?, self.bytes()? as u64);
        let used = model.counts()[1];
        let shared = match self {
            Source::Saved(_) if used > parameters => format!(", {:.1} M used", used as f64 / 1e6),
            _ => String::new(),
        };
        context.note(format_args!(
            "{}: {:.1} M parameters{shared}, {} in the file, {} on the device, read in {seconds:.2} s",
            gpu.adapter(),
            parameters as f64 / 1e6,
            files::size(bytes),
            files::size(memory),
        ));
        context.record(&json!({
            "line": "model", "kind": self.kind(), "parameters": parameters, "file_bytes": bytes,
            "device_bytes": memory, "seconds": seconds, "adapter": gpu.adapter().name,
            "driver": gpu.adapter().driver,
        }))?;
        Ok(model)
    }

    /// Number of weights that the file has.
    fn parameters(&self, model: &Lm) -> Result<usize> {
        match self {
            Source::Published(published) => published.check(),
            Source::Saved(_) => Ok(model.counts()[0]),
        }
    }

    /// The model with an adapter on its weights. One of another base is taken only if `other` says so.
    pub fn adapted(&self, path: &Path, model: &Lm, folder: &Path, other: bool) -> Result<Lm> {
        if !other {
            self.base(path)?.check_adapter(folder).map_err(|error| match error.kind() {
                ErrorKind::Config => Error::config(format!("{error}; --other-base takes it all the same")),
                _ => error,
            })?;
        }
        Adapter::open(folder, model, None)?.apply(model)
    }

    /// What an adapter says of the model that it is for.
    pub fn base(&self, path: &Path) -> Result<Base> {
        let name =
            path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into());
        let fingerprint = match self {
            Source::Published(published) => published.fingerprint()?,
            Source::Saved(saved) => saved.fingerprint()?,
        };
        Ok(Base { name, fingerprint })
    }
}
