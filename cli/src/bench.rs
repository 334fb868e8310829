//! `tiebeam bench` and `tiebeam bench compare`.

use crate::context::Context;
use clap::{Parser, Subcommand, ValueEnum};
use indicatif::ProgressBar;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;
use tiebeam::bench::{
    self, Baseline, Ceilings, Entry, Event, Matches, Record, Run, Settings, Suite, entries, markdown, page,
    parse_runs,
};
use tiebeam::{Error, Gpu, Options, Result};

const EXAMPLES: &str = "\
Examples:
  tiebeam bench
  tiebeam bench matmul softmax --json=mine.jsonl
  tiebeam bench --suite full --gpu all --json=all.jsonl
  tiebeam bench --plan matmul
  tiebeam bench compare mine.jsonl theirs.jsonl --html page.html";

/// Measure an adapter's ceilings and how near each kernel comes to them. `--gpu all` measures every adapter
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true, after_long_help = EXAMPLES)]
pub struct Args {
    /// How much to measure
    #[arg(long, value_enum, default_value = "quick")]
    suite: SuiteArg,
    /// Also compare each time with that of the same row in this file: another engine's JSON lines (family or op, shape,
    /// median_ms), or a file of --json. `-` reads stdin
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Instead of measuring, show the kernels that a call of each row whose name contains the word runs, with their share of the
    /// time
    #[arg(long, value_name = "WORD", conflicts_with_all = ["baseline", "words"])]
    kernels: Option<String>,
    /// Check many elements of every op's result against its f64 reference instead of a few, and once more after timing. A wrong
    /// result has no time
    #[arg(long, conflicts_with_all = ["kernels", "plan"])]
    check: bool,
    /// Instead of running, show the dispatches that the rows plan for this device, or for the class that TIEBEAM_DEVICE names:
    /// kernel, constants, workgroups, parts of summed axes, bytes and operations. Lanes and matrix units are always the adapter's
    #[arg(long, conflicts_with_all = ["baseline", "kernels"])]
    plan: bool,
    /// Only rows whose name contains one of these words; on a CPU driver, rows that take minutes run only if selected this way
    words: Vec<String>,
    #[command(subcommand)]
    compare: Option<Sub>,
}

#[derive(Subcommand)]
enum Sub {
    /// Show results of several runs side by side
    Compare {
        /// Files of --json, or the .part of a run that was killed; `-` reads stdin
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Write a page with pictures to this file; `-` writes to stdout [default: a table to stdout]
        #[arg(long)]
        html: Option<PathBuf>,
        /// Put tables between the lines '<!-- bench -->' and '<!-- end of bench -->' of this file; `-` reads stdin and writes to
        /// stdout
        #[arg(long)]
        readme: Option<PathBuf>,
        /// Compare each time with that of the same row in this file, as 'bench --baseline' does
        #[arg(long, value_name = "FILE")]
        baseline: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum SuiteArg {
    Quick,
    Full,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    if let Some(compared) = &args.compare {
        return compare(compared, context);
    }
    // The file is opened first, so an error in it is reported before anything is measured.
    let baseline = baseline(args.baseline.as_ref(), context)?;
    let named = context.options.adapter.as_deref();
    let adapters = match named {
        Some("all") => {
            let all: Vec<_> = Gpu::adapters()?.iter().map(|a| Some(a.index.to_string())).collect();
            if all.is_empty() {
                return Err(Error::no_adapter(
                    "this machine offers none; `tiebeam doctor` says what to install",
                ));
            }
            all
        }
        other => vec![other.map(str::to_string)],
    };
    let (mut outcome, mut whole, mut any) = (Ok(()), true, false);
    for adapter in adapters {
        let options = context.options.clone().adapter(adapter);
        // An adapter that cannot be opened does not make the lines of the others incomplete.
        let done = Gpu::open_with(options.clone()).and_then(|gpu| {
            let ended = one(gpu, options, args, context, baseline.as_ref());
            (whole, any) = (whole && ended.is_ok(), true);
            ended?
        });
        if let (Some("all"), Err(error)) = (named, &done) {
            context.error(error);
        }
        outcome = outcome.and(done);
    }
    if whole && any {
        context.whole();
    }
    outcome
}

fn baseline(path: Option<&PathBuf>, context: &Context) -> Result<Option<Baseline>> {
    path.map(|path| Baseline::parse(path, &context.read(path)?)).transpose()
}

/// Measures one adapter, opened with `options`. The outer error says why the run did not reach its end. The inner one says that
/// some rows failed.
fn one(
    gpu: Gpu,
    options: Options,
    args: &Args,
    context: &Context,
    baseline: Option<&Baseline>,
) -> Result<Result<()>> {
    context.result(gpu.adapter());
    if gpu.adapter().is_software() {
        context.note("a software driver: these numbers are this CPU's, not a GPU's");
    }
    let (suite, budget) = match args.suite {
        SuiteArg::Quick => (Suite::Quick, Duration::from_millis(700)),
        SuiteArg::Full => (Suite::Full, Duration::from_secs(3)),
    };
    // A plan is for the class that TIEBEAM_DEVICE may name, a measurement for the actual adapter.
    let cpu = if args.plan { gpu.class().is_cpu() } else { gpu.adapter().is_software() };
    let entries = entries(cpu, suite);
    if let Some(word) = &args.kernels {
        let wanted = |entry: &Entry| entry.name().contains(word);
        let found = |entry| kernels(&gpu, entry, context);
        return each(entries, &format!("--kernels {word}"), wanted, found, context).map(Ok);
    }
    if args.plan {
        context.note(format_args!("planned for the class '{}' of devices", gpu.class().name));
        let wanted = |entry: &Entry| entry.is_wanted(&args.words);
        return each(entries, "--plan", wanted, |entry| planned(&gpu, entry, context), context).map(Ok);
    }
    let (entries, others): (Vec<Entry>, Vec<Entry>) =
        entries.into_iter().partition(|entry| entry.is_wanted(&args.words));
    if entries.is_empty() {
        let names: Vec<String> = others.iter().map(Entry::name).collect();
        let message =
            format!("no row's name contains one of these words; there are\n  {}", names.join("\n  "));
        return Err(Error::config(message));
    }
    let long: Vec<String> = others.iter().filter(|entry| entry.asked).map(Entry::name).collect();
    if args.words.is_empty() && !long.is_empty() {
        let long = long.join("; ");
        context.note(format_args!(
            "left out here unless a word selects them, because they take minutes: {long}"
        ));
    }
    let reopen = Box::new(move || Gpu::open_with(options.clone()));
    let settings = Settings { reopen, check: args.check, ..Settings::new(budget) };
    let bar = bar(entries.len() + 6, context);
    let mut ready = false;
    let run = bench::run(gpu, entries, &settings, &mut |event| {
        if let Some(line) = event.to_json() {
            context.record(&line)?;
        }
        bar.suspend(|| show(&event, context, ready));
        match event {
            Event::Measured(..) => bar.inc(!ready as u64),
            Event::Turn(name) => bar.set_message(name.to_string()),
            Event::Row(_) | Event::Failed(_) => bar.inc(1),
            _ => {}
        }
        ready |= matches!(event, Event::Ceilings(_));
        Ok(())
    });
    bar.finish_and_clear();
    let run = run?;
    if let Some(remark) = run.remark() {
        context.note(remark);
    }
    if let Some(baseline) = baseline {
        beside(&baseline.matches(&run), context)?;
    }
    Ok(run.verdict())
}

fn bar(count: usize, context: &Context) -> ProgressBar {
    let style = "{spinner} {pos}/{len} {wide_msg} {elapsed} so far, about {eta} to go";
    let bar = context.bar(Some(count as u64), style);
    bar.set_message("ceilings");
    bar
}

/// Shows an event. `ready` says that all ceilings have been measured once.
fn show(event: &Event, context: &Context, ready: bool) {
    match event {
        Event::Measured(which, Some(error)) => {
            context.note(format_args!("no ceiling '{}': {error}", which.name()));
        }
        Event::Measured(which, None) if ready => {
            context.note(format_args!("above its ceiling; '{}' was measured again:", which.name()));
        }
        Event::Ceilings(ceilings) => show_ceilings(ceilings, context, ready),
        Event::Row(record) => context.result(record.line()),
        Event::Failed(failed) => context.result(failed.line()),
        Event::Lost(Ok(())) => context.note("the device was lost; it is open again"),
        Event::Lost(Err(error)) => {
            context.note(format_args!("the device was lost and does not open again: {error}"));
        }
        // The rest moves the bar, and what a later version of the library tells besides is not shown.
        _ => {}
    }
}

fn show_ceilings(c: &Ceilings, context: &Context, again: bool) {
    let rate = |unit: f64, of: Option<f64>| of.map_or("-".into(), |f| format!("{:.1}", f * unit));
    context.result(format_args!(
        "ceilings: copy {} GB/s ({} by our kernel), fma f32 {} GFLOP/s, f16 {}, cooperative matrices {}",
        rate(1e-9, c.copy),
        rate(1e-9, c.kernel_copy),
        rate(1e-9, c.fma32),
        rate(1e-9, c.fma16),
        rate(1e-9, c.coop)
    ));
    if again {
        return;
    }
    context.result(format_args!(
        "costs: dispatch {} us in a pass, {} us with a pass each, {} us with a submit each; readback {} us",
        rate(1e6, c.dispatch),
        rate(1e6, c.pass),
        rate(1e6, c.submit),
        rate(1e6, c.readback)
    ));
    context.result(Record::HEAD);
}

/// The dispatches that a row plans, one a line.
fn planned(gpu: &Gpu, entry: Entry, context: &Context) -> Result<String> {
    let name = entry.name();
    let mut text = String::new();
    for (pass, count) in bench::plan(gpu, entry)? {
        context.record(&json!({"line": "dispatch", "row": name, "dispatch": pass, "count": count}))?;
        let times = if count == 1 { String::new() } else { format!(" ({count} times)") };
        text += &format!("  {pass}{times}\n");
    }
    Ok(text)
}

/// The kernels that a call of a row runs, as a table.
fn kernels(gpu: &Gpu, entry: Entry, context: &Context) -> Result<String> {
    let name = entry.name();
    let found = bench::kernels(gpu, entry)?;
    for kernel in &found.0 {
        context.record(&json!({
            "line": "kernel", "row": name, "kernel": kernel.kernel, "count": kernel.count,
            "bytes": kernel.bytes, "seconds": kernel.seconds,
        }))?;
    }
    Ok(found.table())
}

/// Prints a text for each wanted row.
fn each(
    entries: Vec<Entry>,
    option: &str,
    wanted: impl Fn(&Entry) -> bool,
    text: impl Fn(Entry) -> Result<String>,
    context: &Context,
) -> Result<()> {
    let entries: Vec<Entry> = entries.into_iter().filter(wanted).collect();
    if entries.is_empty() {
        return Err(Error::config(format!("{option}: no such row; 'tiebeam bench' shows their names")));
    }
    let (bar, count) = (bar(entries.len(), context), entries.len());
    let mut failed = 0;
    for entry in entries {
        let name = entry.name();
        bar.set_message(name.clone());
        let text = text(entry).unwrap_or_else(|error| {
            failed += 1;
            format!("  FAILED: {error}\n")
        });
        bar.suspend(|| context.result(format_args!("{name}\n{}", text.trim_end())));
        bar.inc(1);
    }
    bar.finish_and_clear();
    context.whole();
    match failed {
        0 => Ok(()),
        _ => Err(Error::device(format!("{failed} of {count} rows failed"))),
    }
}

/// Shows a run's times beside those of a baseline.
fn beside(matches: &Matches, context: &Context) -> Result<()> {
    context.result(format_args!("\n{}", matches.table().trim_end()));
    for row in &matches.rows {
        context.record(&json!({
            "line": "match", "row": row.name, "ours_ms": row.ours_ms, "theirs_ms": row.theirs_ms, "who": row.who,
        }))?;
    }
    Ok(())
}

fn compare(Sub::Compare { files, html, readme, baseline: other }: &Sub, context: &Context) -> Result<()> {
    context.expect_data(html.as_deref())?;
    context.expect_data(readme.as_deref())?;
    let mut runs: Vec<Run> = Vec::new();
    for file in files {
        runs.extend(parse_runs(file, &context.read(file)?)?);
    }
    if let Some(baseline) = baseline(other.as_ref(), context)? {
        for run in &runs {
            let host = &run.host;
            context.result(format_args!("{}, {}{}", host.adapter, host.date(), host.kernels()));
            beside(&baseline.matches(run), context)?;
        }
    }
    if let Some(html) = html {
        let text = page(&runs).map_err(|message| Error::io(html, std::io::Error::other(message)))?;
        context.write(html, &text)?;
    }
    for run in &runs {
        for record in &run.records {
            context.record(&json!({
                "line": "row", "adapter": run.host.adapter, "row": record.name(), "median_ms": record.median_ms,
                "rate": record.rate(), "of_ceiling": record.share(),
            }))?;
        }
    }
    if html.is_none() && readme.is_none() && other.is_none() {
        context.result(markdown(&runs).trim_end());
    }
    let Some(readme) = readme else { return Ok(()) };
    let text = context.read(readme)?;
    let [start, end] = ["<!-- bench -->", "<!-- end of bench -->"];
    // The line's own end stays as it is.
    let first = text.find(start).and_then(|at| text[at..].find('\n').map(|line| at + line + 1));
    match (first, text.find(end)) {
        (Some(first), Some(last)) if first <= last => {
            let (head, tail) = (&text[..first], &text[last..]);
            context.write(readme, &format!("{head}{}{tail}", markdown(&runs)))
        }
        _ => {
            let message = format!("no lines '{start}' and '{end}' in this order");
            Err(Error::format(readme, message))
        }
    }
}
