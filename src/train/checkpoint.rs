//! Checkpoints of a run: what the first rank writes, and what all ranks go on from.

use super::Trainer;
use crate::error::{Error, Result};
use crate::nn::Module;
use crate::ranks::on_first;
use crate::store::{Checkpoint, read_checkpoint, save_checkpoint, write_params};
use std::collections::BTreeMap;
use std::path::Path;

/// Checks that what a checkpoint says ([`Trainer::load_if`]) is the same as the settings of a run.
///
/// # Errors
/// [`Error::Format`] with the first setting that differs.
pub fn same_settings(
    checkpoint: &Path,
    metadata: &BTreeMap<String, String>,
    settings: &BTreeMap<String, String>,
) -> Result<()> {
    for (name, here) in settings {
        let there = metadata.get(name).map_or("not said", String::as_str);
        if there != here {
            return Err(Error::format(
                checkpoint,
                format!("this checkpoint is of another run: `{name}` is '{there}' there and '{here}' here"),
            ));
        }
    }
    Ok(())
}

impl Trainer {
    /// Writes a checkpoint: the model's parameters and buffers, the state of optimizer and loss scale, the number of steps and the
    /// generator. The file is replaced whole or not at all. Of several ranks the first one writes, and all know whether it could.
    ///
    /// # Errors
    /// As [`save_checkpoint`] and [`ModuleFile::save`](crate::nn::ModuleFile::save).
    pub fn save(&self, path: impl AsRef<Path>, model: &(impl Module + ?Sized)) -> Result<()> {
        self.save_with(path, model, &BTreeMap::new())
    }

    /// [`Trainer::save`] with text of your own in the file's metadata, such as settings and losses.
    ///
    /// # Errors
    /// As [`Trainer::save`].
    pub fn save_with(
        &self,
        path: impl AsRef<Path>,
        model: &(impl Module + ?Sized),
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        on_first(&*self.ranks, || self.write(path.as_ref(), model, metadata)).map(drop)
    }

    fn write(
        &self,
        path: &Path,
        model: &(impl Module + ?Sized),
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        let run = Checkpoint::default()
            .step(self.step())
            .optimizer(self.state()?)
            .rng(Some(self.rng.clone()))
            .metadata(metadata.clone());
        let all = model.parameters();
        all.check_saved()?;
        save_checkpoint(path, &all.state_dict(), &run)
    }

    /// Restores what [`Trainer::save`] wrote, and returns the metadata. The run goes on with the bits of one that was never stopped.
    ///
    /// The loss scale of a file that has none is left as it is, so that a run in f32 can go on in f16. Of several ranks the first one
    /// reads, and the others get everything from it; there may be more or fewer of them than when the file was written.
    ///
    /// # Errors
    /// As [`load_checkpoint`](crate::store::load_checkpoint), and when the state is of another optimizer or model. Then nothing has
    /// changed.
    pub fn load(
        &mut self,
        path: impl AsRef<Path>,
        model: &(impl Module + ?Sized),
    ) -> Result<BTreeMap<String, String>> {
        self.load_if(path, model, |_| Ok(()))
    }

    /// [`Trainer::load`] of a file whose metadata `check` accepts. Nothing has changed if it does not.
    ///
    /// # Errors
    /// As [`Trainer::load`], and what `check` returns.
    pub fn load_if(
        &mut self,
        path: impl AsRef<Path>,
        model: &(impl Module + ?Sized),
        check: impl FnOnce(&BTreeMap<String, String>) -> Result<()>,
    ) -> Result<BTreeMap<String, String>> {
        let ranks = self.ranks.clone();
        let metadata = on_first(&*ranks, || self.read(path.as_ref(), model, check))?;
        match ranks.size() {
            1 => self.optimizer.loaded()?,
            _ => self.share_state(model)?,
        }
        self.first_words(metadata.unwrap_or_default())
    }

    fn read(
        &mut self,
        path: &Path,
        model: &(impl Module + ?Sized),
        check: impl FnOnce(&BTreeMap<String, String>) -> Result<()>,
    ) -> Result<BTreeMap<String, String>> {
        let params = model.parameters().state_dict();
        let (file, mut run) = read_checkpoint(path, &params, check)?;
        // First what may be another optimizer's. The model comes last.
        self.set_state(run.step, std::mem::take(&mut run.optimizer))?;
        write_params(&file, &params)?;
        if let Some(rng) = run.rng {
            self.rng.set_state(rng.state());
        }
        Ok(run.metadata)
    }
}
