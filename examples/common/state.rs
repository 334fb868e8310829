//! The checkpoint of an example's training run, saved after each epoch.

use std::collections::BTreeMap;
use std::path::Path;
use tiebeam::nn::{Module, Parameters};
use tiebeam::optim::{AdamW, LossScale};
use tiebeam::store::{Checkpoint, File, load_checkpoint, save_checkpoint};
use tiebeam::{Error, Result, Rng};

/// Creates a folder if it does not exist.
pub fn folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))
}

/// The state of a training run that its checkpoint stores in addition to the parameters.
pub struct State<const N: usize> {
    pub optimizer: AdamW,
    pub scale: LossScale,
    pub rng: Rng,
    /// The recorded numbers of each epoch so far.
    pub curve: Vec<[f64; N]>,
    /// Settings that must be the same when a run continues from a checkpoint.
    pub settings: String,
}

impl<const N: usize> State<N> {
    pub fn save(&self, path: &Path, net: &impl Module) -> Result<()> {
        let line = |epoch: &[f64; N]| epoch.map(|x| format!("{x:?}")).join(" ");
        let metadata: BTreeMap<String, String> = [
            ("settings".to_string(), self.settings.clone()),
            ("curve".to_string(), self.curve.iter().map(line).collect::<Vec<_>>().join("\n")),
        ]
        .into();
        let mut optimizer = self.optimizer.state_dict()?;
        optimizer.extend(self.scale.state_dict()?);
        let run = Checkpoint::default()
            .step(self.optimizer.steps())
            .optimizer(optimizer)
            .rng(Some(self.rng.clone()))
            .metadata(metadata);
        save_checkpoint(path, Parameters::of(net).named(), &run)
    }

    /// Restores everything from a checkpoint. `net` must have the parameters of the optimizer.
    pub fn load(&mut self, path: &Path, net: &impl Module) -> Result<()> {
        let metadata = File::open(path)?.metadata().clone();
        let wrong = |message: String| Error::format(path, message);
        let have = metadata.get("settings").map_or("nothing", String::as_str);
        if have != self.settings {
            let want = &self.settings;
            return Err(wrong(format!("a checkpoint of another run: it has `{have}`, here is `{want}`")));
        }
        let numbers = |line: &str| -> Option<[f64; N]> {
            let all: Option<Vec<f64>> = line.split(' ').map(|x| x.parse().ok()).collect();
            all?.try_into().ok()
        };
        let curve = metadata.get("curve").map_or("", String::as_str).lines().map(numbers);
        self.curve = curve.collect::<Option<_>>().ok_or_else(|| wrong("its curve cannot be read".into()))?;
        let mut run = load_checkpoint(path, Parameters::of(net).named())?;
        self.scale.load_state(&mut run.optimizer)?;
        self.optimizer.load_state(run.step, &run.optimizer)?;
        if let Some(rng) = run.rng {
            self.rng.set_state(rng.state());
        }
        println!("resumed    {} after epoch {}", path.display(), self.curve.len());
        Ok(())
    }
}
