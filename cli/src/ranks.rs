//! The subcommands that run on several ranks.

use crate::context::Global;
use crate::{finished, merge, predict, train, zoo};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::sync::Arc;
use tiebeam::Result;
use tiebeam::ranks::Ranks;

const AFTER: &str = "\
Examples:
  mpirun -n 4 tiebeam-mpi train --model lm.toml --text book.txt --out out/lm
  mpirun -n 4 tiebeam-mpi train --model lm.toml --text book.txt --out out/lm --resume
  mpirun -n 4 tiebeam-mpi predict model.safetensors frames.xyz out.xyz
  mpirun -n 4 tiebeam-mpi merge merge.yaml --out merged
  mpirun -n 4 tiebeam-mpi zoo lm --text book.txt --out out/zoo
  tiebeam-mpi help train

The arguments are those of `tiebeam`. All ranks see the same files; rank 0 prints and writes. Each takes the adapter of its number on its
machine, modulo their count; --gpu and TIEBEAM_ADAPTER name another.";

/// The command `tiebeam` on many ranks: training on parts of each batch; frames, tensors and runs spread over the ranks
#[derive(Parser)]
#[command(name = "tiebeam-mpi", version, propagate_version = true, after_long_help = AFTER)]
struct Args {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Merge(merge::Args),
    Predict(predict::Args),
    Train(train::Args),
    Zoo(zoo::Args),
}

/// What became of a command on this rank.
pub enum Outcome {
    /// Done, or help was shown.
    Done,
    /// The arguments are wrong, which has been said.
    Usage(u8),
    /// The error, which has not been said.
    Failed(tiebeam::Error),
}

impl Command {
    /// What ranks compare first: another command tells other things.
    fn name(&self) -> &'static str {
        match self {
            Command::Merge(_) => "merge",
            Command::Predict(_) => "predict",
            Command::Train(args) if args.has_data() => "train --data",
            Command::Train(_) => "train --text",
            Command::Zoo(_) => "zoo",
        }
    }
}

/// The status of the first rank whose arguments are no command, 0 if they ask for help. That rank prints what is to be said.
fn usage(ranks: &dyn Ranks, parsed: &Result<Args, clap::Error>) -> Result<Option<u8>> {
    let own = parsed.as_ref().err().map_or(Vec::new(), |error| vec![error.exit_code() as u8]);
    let all = ranks.gather(&own)?;
    let Some(first) = all.iter().position(|code| !code.is_empty()) else { return Ok(None) };
    if let (true, Err(error)) = (ranks.rank() == first, parsed) {
        let _ = error.print();
    }
    Ok(Some(all[first][0]))
}

/// Runs a subcommand on this rank, by the arguments of the process. Only rank 0 prints.
pub fn main_on(ranks: Arc<dyn Ranks>) -> Outcome {
    let parsed = Args::command().try_get_matches().and_then(|matches| Args::from_arg_matches(&matches));
    let args = match (usage(&*ranks, &parsed), parsed) {
        (Ok(None), Ok(args)) => args,
        (Ok(Some(0)), _) => return Outcome::Done,
        (Ok(code), _) => return Outcome::Usage(code.unwrap_or(2)),
        (Err(error), _) => return Outcome::Failed(error),
    };
    let work = |context: &crate::context::Context| -> Result<()> {
        context.describe_ranks();
        context.agree([("command", args.command.name().to_string())])?;
        match &args.command {
            Command::Merge(args) => merge::run(args, context),
            Command::Predict(args) => predict::run(args, context),
            Command::Train(args) => train::run(args, context),
            Command::Zoo(args) => zoo::run(args, context),
        }
    };
    match finished(&args.global, ranks, work) {
        Ok(()) => Outcome::Done,
        Err(error) => Outcome::Failed(error),
    }
}
