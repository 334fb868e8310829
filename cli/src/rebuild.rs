//! `tiebeam rebuild`.

use crate::context::Context;
use clap::Parser;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tiebeam::merge::{REVERSIBLE, ReversibleModels, Weights};
use tiebeam::models::adapter::{SETTINGS, WEIGHTS};
use tiebeam::store::save_tensors;
use tiebeam::{Error, Result, files};

const EXAMPLES: &str = "\
Examples:
  tiebeam rebuild out/merged french --out out/french
  tiebeam rebuild out/merged 0 --base models/base --out out/first

The folder is one that a merge by `merge_method: rmm` wrote.";

/// Rebuild one of the models that were merged reversibly
#[derive(Parser)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// The folder of the merge
    folder: PathBuf,
    /// The model: its name, or its number
    model: String,
    /// The base, if the merge had one
    #[arg(long)]
    base: Option<PathBuf>,
    /// The folder to write
    #[arg(long)]
    out: PathBuf,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    let whole = |path: &std::path::Path| path.canonicalize().ok();
    if whole(&args.out).is_some_and(|out| Some(out) == whole(&args.folder)) {
        return Err(Error::config(format!(
            "--out {}: this is the folder of the merge, whose other models would be lost; name another",
            args.out.display()
        )));
    }
    let gpu = context.open()?;
    let models = ReversibleModels::load(&gpu, args.folder.join(REVERSIBLE))?;
    let which = models.find(&args.model)?;
    if models.has_base != args.base.is_some() {
        return Err(Error::config(match models.has_base {
            true => "these are task vectors; --base names the model that they are added to",
            false => "these models were merged without a base; leave out --base",
        }));
    }
    let base = args.base.as_ref().map(|path| context.shards(path)).transpose()?;
    if let (Some(base), Some(own)) = (&base, models.base)
        && base.fingerprint()? != own
    {
        return Err(Error::config(format!(
            "{}: these models were merged relative to a base with other weights",
            base.path().display()
        )));
    }
    let weights = models.model(&gpu, which, base.as_ref().map(|base| base as &dyn Weights))?;
    let settings = tiebeam::store::settings_in(&args.folder)?;
    let file = if settings.iter().any(|name| name == SETTINGS) { WEIGHTS } else { "model.safetensors" };
    files::replace_folder(&args.out, |folder| {
        for name in &settings {
            let from = args.folder.join(name);
            let bytes = std::fs::read(&from).map_err(|e| Error::io(&from, e))?;
            files::replace_with(&folder.join(name), bytes)?;
        }
        let notes = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        save_tensors(folder.join(file), &weights, &notes)
    })?;
    let (name, place) = (&models.names[which], args.out.display());
    context.result(format_args!("rebuilt {name}, {} tensors: {place}", weights.len()));
    context.record(&json!({"line": "rebuilt", "model": name, "tensors": weights.len(), "out": args.out}))?;
    context.whole();
    Ok(())
}
