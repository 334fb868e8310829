//! The command `tiebeam`: lists and checks adapters, measures and tunes kernels, runs language models and trained potentials,
//! matches, merges and rounds models. Some of its subcommands also run on several ranks: `tiebeam-mpi` gives them.

mod barrier;
mod bench;
mod context;
mod convert;
mod data;
mod doctor;
mod evaluate;
mod extract;
mod finetune;
mod fisher;
mod inspect;
mod matching;
mod merge;
mod pareto;
mod predict;
mod quantise;
pub mod ranks;
mod rebuild;
mod run;
mod scores;
mod shell;
mod train;
mod tune;
mod zoo;

use clap::{CommandFactory, Parser, Subcommand};
use context::{Context, Global};
use serde_json::json;
use std::process::ExitCode;
use std::sync::Arc;
use tiebeam::error::ErrorKind;
use tiebeam::ranks::{Alone, Ranks};
use tiebeam::{Error, Gpu, Result};

/// Exit statuses, and where to read more.
const AFTER: &str = "\
Exit status:
  0    done
  1    failed; the reason is on stderr
  2    wrong usage
  130  stopped by Ctrl-C, after leaving what was written whole
  141  the reader of stdout has gone away

Examples:
  tiebeam doctor
  tiebeam bench --json=mine.jsonl
  tiebeam help merge

'-' stands for stdin or stdout where a file of text is meant. NO_COLOR is obeyed.";

/// GPU tensor engine for models that store fewer weights than they use: measure adapters, run language models and trained
/// potentials, match and merge models
#[derive(Parser)]
#[command(name = "tiebeam", version, propagate_version = true, after_long_help = AFTER)]
struct Args {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the adapters that --gpu can choose from
    #[command(after_long_help = "Examples:\n  tiebeam adapters\n  tiebeam adapters --json")]
    Adapters,
    Barrier(barrier::Args),
    Bench(bench::Args),
    Convert(convert::Args),
    /// Print the shell's completions of this command
    #[command(after_long_help = shell::EXAMPLES)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    Doctor(doctor::Args),
    Evaluate(evaluate::Args),
    Extract(extract::Args),
    Finetune(finetune::Args),
    Fisher(fisher::Args),
    /// Write the manual pages of this command and its subcommands into a folder
    #[command(after_long_help = "Examples:\n  tiebeam man target/man\n  man -l target/man/tiebeam-merge.1")]
    Man {
        /// The folder, which is made if it does not exist
        folder: std::path::PathBuf,
    },
    Inspect(inspect::Args),
    Merge(merge::Args),
    Match(matching::Args),
    Pareto(pareto::Args),
    Predict(predict::Args),
    Quantise(quantise::Args),
    Rebuild(rebuild::Args),
    Run(run::Args),
    Train(train::Args),
    Tune(tune::Args),
    Zoo(zoo::Args),
}

fn run(command: &Command, context: &Context) -> Result<()> {
    match command {
        Command::Adapters => adapters(context),
        Command::Barrier(args) => barrier::run(args, context),
        Command::Bench(args) => bench::run(args, context),
        Command::Convert(args) => convert::run(args, context),
        Command::Completions { shell } => shell::completions(*shell, Args::command(), context),
        Command::Doctor(args) => doctor::run(args, context),
        Command::Evaluate(args) => evaluate::run(args, context),
        Command::Extract(args) => extract::run(args, context),
        Command::Finetune(args) => finetune::run(args, context),
        Command::Fisher(args) => fisher::run(args, context),
        Command::Man { folder } => shell::man(folder, Args::command(), context),
        Command::Inspect(args) => inspect::run(args, context),
        Command::Merge(args) => merge::run(args, context),
        Command::Match(args) => matching::run(args, context),
        Command::Pareto(args) => pareto::run(args, context),
        Command::Predict(args) => predict::run(args, context),
        Command::Quantise(args) => quantise::run(args, context),
        Command::Rebuild(args) => rebuild::run(args, context),
        Command::Run(args) => run::run(args, context),
        Command::Train(args) => train::run(args, context),
        Command::Tune(args) => tune::run(args, context),
        Command::Zoo(args) => zoo::run(args, context),
    }
}

fn adapters(context: &Context) -> Result<()> {
    let all = Gpu::adapters()?;
    for adapter in &all {
        context.result(adapter);
        context.record(&json!({
            "line": "adapter",
            "index": adapter.index,
            "name": adapter.name,
            "backend": adapter.backend,
            "kind": adapter.kind,
            "vendor": adapter.vendor,
            "driver": adapter.driver,
            "max_buffer": adapter.max_buffer,
            "max_binding": adapter.max_binding,
            "features": adapter.features,
        }))?;
    }
    if all.is_empty() {
        context.note("this machine offers no adapter; `tiebeam doctor` says what to install");
    }
    Ok(())
}

/// Runs the command by the arguments of the process.
pub fn main() -> ExitCode {
    let args = Args::parse();
    match finished(&args.global, Arc::new(Alone), |context| run(&args.command, context)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error}\n"));
            ExitCode::from(status(&error))
        }
    }
}

/// Runs a subcommand in its surroundings.
fn finished(global: &Global, ranks: Arc<dyn Ranks>, work: impl FnOnce(&Context) -> Result<()>) -> Result<()> {
    let context = Context::new(global, ranks)?;
    let done = work(&context);
    let kept = context.finish(done.is_ok());
    done.and(kept)
}

/// Writes to stderr. `eprint` would panic if it is closed.
fn say(text: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
}

/// The exit status of an error.
pub fn status(error: &Error) -> u8 {
    match error.kind() {
        ErrorKind::Stopped => 130,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};

    /// The words of a command, of which those in single quotes may have blanks.
    fn words(command: &str) -> Vec<String> {
        let parts = command.split('\'').enumerate();
        let words = parts.map(|(i, part)| match i % 2 {
            0 => part.split_whitespace().map(String::from).collect(),
            _ => vec![part.to_string()],
        });
        words.flat_map(|words: Vec<String>| words).collect()
    }

    /// Every command of a help text's examples, with what the shell does to it left out.
    fn examples(help: &str) -> Vec<Vec<String>> {
        let lines = help.lines().map(str::trim).filter(|line| line.starts_with("tiebeam "));
        lines
            .map(|line| {
                let end = ["|", ">", "<"].iter().filter_map(|mark| line.find(&format!(" {mark} "))).min();
                words(&line[..end.unwrap_or(line.len())])
            })
            .collect()
    }

    #[test]
    fn every_command_has_examples_that_parse() {
        let root = Args::command();
        root.clone().debug_assert();
        for command in root.get_subcommands().chain([&root]) {
            let name = command.get_name();
            let help =
                command.get_after_long_help().unwrap_or_else(|| panic!("{name} has examples")).to_string();
            let examples = examples(&help);
            assert!(!examples.is_empty(), "{name}");
            for words in examples {
                let parsed = Args::try_parse_from(&words).map(drop);
                let kind = parsed.err().map(|error| (error.kind(), error.to_string()));
                let shown = matches!(&kind, None | Some((DisplayHelp | DisplayVersion, _)));
                assert!(shown, "{words:?}: {kind:?}");
            }
        }
    }

    #[test]
    fn options_of_every_command_come_before_or_after_it() {
        for words in [
            "tiebeam --gpu 0 --json --memory 1GB -q adapters",
            "tiebeam adapters --gpu 0 --json=a.jsonl --memory 1GB -vv",
        ] {
            let args = Args::try_parse_from(words.split(' ')).map_err(|e| e.to_string()).expect(words);
            assert_eq!(args.global.gpu.as_deref(), Some("0"));
            assert_eq!(args.global.memory, Some(1_000_000_000));
            assert!(args.global.json.is_some() && (args.global.quiet || args.global.verbose == 2));
        }
        for wrong in
            ["tiebeam adapters --memory 3apples", "tiebeam adapters -q -v", "tiebeam adapters --json a"]
        {
            assert!(Args::try_parse_from(wrong.split(' ')).is_err(), "{wrong}");
        }
    }
}
