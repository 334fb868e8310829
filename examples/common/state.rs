//! What the checkpoint of an example holds beside its training run: the settings, and the numbers of each epoch so far.

use std::collections::BTreeMap;
use std::path::Path;
use tiebeam::nn::Module;
use tiebeam::store::File;
use tiebeam::train::Trainer;
use tiebeam::{Error, Result};

/// Creates a folder if it does not exist.
pub fn folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))
}

/// Returns settings, which must be the same when the run continues, and curve as a checkpoint's metadata.
pub fn metadata<const N: usize>(settings: &str, curve: &[[f64; N]]) -> BTreeMap<String, String> {
    let line = |epoch: &[f64; N]| epoch.map(|x| format!("{x:?}")).join(" ");
    let curve = curve.iter().map(line).collect::<Vec<_>>().join("\n");
    [("settings".to_string(), settings.to_string()), ("curve".to_string(), curve)].into()
}

/// Restores everything from a checkpoint and returns the curve. `net` must have the parameters of the trainer's optimizer.
pub fn resume<const N: usize>(
    path: &Path,
    trainer: &mut Trainer,
    net: &impl Module,
    settings: &str,
) -> Result<Vec<[f64; N]>> {
    let metadata = File::open(path)?.metadata().clone();
    let wrong = |message: String| Error::format(path, message);
    let have = metadata.get("settings").map_or("nothing", String::as_str);
    if have != settings {
        return Err(wrong(format!("a checkpoint of another run: it has `{have}`, here is `{settings}`")));
    }
    let numbers = |line: &str| -> Option<[f64; N]> {
        let all: Option<Vec<f64>> = line.split(' ').map(|x| x.parse().ok()).collect();
        all?.try_into().ok()
    };
    let curve = metadata.get("curve").map_or("", String::as_str).lines().map(numbers);
    let curve: Option<Vec<_>> = curve.collect();
    let curve = curve.ok_or_else(|| wrong("its curve cannot be read".into()))?;
    trainer.load(path, net)?;
    println!("resumed    {} after epoch {}", path.display(), curve.len());
    Ok(curve)
}
