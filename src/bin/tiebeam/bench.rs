//! `tiebeam bench` and `tiebeam bench compare`.

use clap::{Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tiebeam::bench::{
    self, Baseline, Ceilings, Entry, Event, Part, Record, Run, Settings, Suite, entries, markdown, page,
    read_runs,
};
use tiebeam::{Error, Gpu, Options, Result, files};

/// Measure an adapter's ceilings and how near each kernel comes to them.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// Index or part of the name of the adapter, or 'all' [default: the best]
    #[arg(long)]
    adapter: Option<String>,
    /// How much to measure
    #[arg(long, value_enum, default_value = "quick")]
    suite: SuiteArg,
    /// Also write the results to this file, as JSON lines. During the run, each result is added to FILE.part as soon as it is
    /// measured; 'bench compare' can read the part file of a killed run
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also compare each time with that of the same row in this file: another engine's JSON lines (family or op, shape,
    /// median_ms), or a file of --json
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Instead of measuring, show the kernels that a call of each row whose name contains the word runs, with their share of the
    /// time
    #[arg(long, value_name = "WORD", conflicts_with_all = ["json", "baseline", "words"])]
    kernels: Option<String>,
    /// Check many elements of every op's result against its f64 reference instead of a few, and once more after timing. A wrong
    /// result has no time
    #[arg(long, conflicts_with_all = ["kernels", "plan"])]
    check: bool,
    /// Instead of running, show the dispatches that the rows plan for this device, or for the class that TIEBEAM_DEVICE names:
    /// kernel, constants, workgroups, parts of summed axes, bytes and operations. Lanes and matrix units are always the adapter's
    #[arg(long, conflicts_with_all = ["json", "baseline", "kernels"])]
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
        /// Files of --json
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Write a page with pictures to this file
        #[arg(long, required_unless_present_any = ["readme", "baseline"])]
        html: Option<PathBuf>,
        /// Put tables between the lines '<!-- bench -->' and '<!-- end of bench -->' of this file
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

pub fn run(args: &Args) -> Result<()> {
    if let Some(Sub::Compare { files, html, readme, baseline }) = &args.compare {
        return compare(files, html.as_deref(), readme.as_deref(), baseline.as_deref());
    }
    // The files are opened first, so an error in them is reported before anything is measured.
    let baseline = args.baseline.as_deref().map(Baseline::read).transpose()?;
    let mut part = args.json.as_deref().map(part).transpose()?;
    let adapters = match args.adapter.as_deref() {
        Some("all") => Gpu::adapters()?.iter().map(|a| Some(a.index.to_string())).collect(),
        other => vec![other.map(str::to_string)],
    };
    let (mut outcome, mut whole, mut any) = (Ok(()), true, false);
    for adapter in adapters {
        let options = Options::default().adapter(adapter);
        // An adapter that cannot be opened does not make the lines of the others incomplete.
        let done = Gpu::open_with(options.clone()).and_then(|gpu| {
            let ended = one(gpu, options, args, &mut part, baseline.as_ref());
            (whole, any) = (whole && ended.is_ok(), true);
            ended?
        });
        if let (Some("all"), Err(error)) = (args.adapter.as_deref(), &done) {
            eprintln!("error: {error}");
        }
        outcome = outcome.and(done);
    }
    if let (Some(part), Some(path)) = (part, &args.json) {
        if whole && any {
            part.finish()?;
            println!("wrote {}", path.display());
        } else if part.leave()? {
            println!("lines so far are in {}", Part::beside(path).display());
        }
    }
    outcome
}

fn part(path: &Path) -> Result<Part> {
    let beside = Part::beside(path);
    if beside.exists() {
        println!("replacing {}, which a run left that did not end", beside.display());
    }
    Part::create(path)
}

/// Measures one adapter, opened with `options`. The outer error says why the run did not reach its end. The inner one says that
/// some rows failed.
fn one(
    gpu: Gpu,
    options: Options,
    args: &Args,
    part: &mut Option<Part>,
    baseline: Option<&Baseline>,
) -> Result<Result<()>> {
    println!("{}", gpu.adapter());
    if gpu.adapter().is_software() {
        println!("a software driver: these numbers are this CPU's, not a GPU's");
    }
    let (suite, budget) = match args.suite {
        SuiteArg::Quick => (Suite::Quick, Duration::from_millis(700)),
        SuiteArg::Full => (Suite::Full, Duration::from_secs(3)),
    };
    // A plan is for the class that TIEBEAM_DEVICE may name, a measurement for the actual adapter.
    let cpu = if args.plan { gpu.class().is_cpu() } else { gpu.adapter().is_software() };
    let entries = entries(cpu, suite);
    if let Some(word) = &args.kernels {
        let table = |entry| bench::kernels(&gpu, entry).map(|found| found.table());
        return each(entries, &format!("--kernels {word}"), |entry| entry.name().contains(word), table)
            .map(Ok);
    }
    if args.plan {
        println!("planned for the class '{}' of devices", gpu.class().name);
        return each(entries, "--plan", |entry| entry.is_wanted(&args.words), |entry| planned(&gpu, entry))
            .map(Ok);
    }
    let (entries, others): (Vec<Entry>, Vec<Entry>) =
        entries.into_iter().partition(|entry| entry.is_wanted(&args.words));
    if entries.is_empty() {
        let names: Vec<String> = others.iter().map(Entry::name).collect();
        let message = format!("no row's name contains one of these words; there are {}", names.join("; "));
        return Err(Error::config(message));
    }
    let long: Vec<String> = others.iter().filter(|entry| entry.asked).map(Entry::name).collect();
    if args.words.is_empty() && !long.is_empty() {
        println!("left out here unless a word selects them, because they take minutes: {}", long.join("; "));
    }
    let reopen = Box::new(move || Gpu::open_with(options.clone()));
    let settings = Settings { reopen, check: args.check, ..Settings::new(budget) };
    let bar = bar(entries.len() + 6);
    let mut ready = false;
    let run = bench::run(gpu, entries, &settings, &mut |event| {
        if let (Some(line), Some(part)) = (event.to_json(), part.as_mut()) {
            part.line(&line.to_string())?;
        }
        show(&event, &bar, ready);
        ready |= matches!(event, Event::Ceilings(_));
        Ok(())
    });
    bar.finish_and_clear();
    let run = run?;
    if let Some(remark) = run.remark() {
        println!("{remark}");
    }
    if let Some(baseline) = baseline {
        print!("\n{}", baseline.matches(&run).table());
    }
    Ok(run.verdict())
}

fn bar(count: usize) -> ProgressBar {
    let style = "{spinner} {pos}/{len} {wide_msg} {elapsed} so far, about {eta} to go";
    let bar = ProgressBar::new(count as u64);
    bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
    bar.set_message("ceilings");
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Shows an event. `ready` says that all ceilings have been measured once.
fn show(event: &Event, bar: &ProgressBar, ready: bool) {
    match event {
        Event::Host(_) => {}
        Event::Measured(which, error) => {
            if let Some(error) = error {
                bar.suspend(|| println!("no ceiling '{}': {error}", which.name()));
            } else if ready {
                bar.suspend(|| println!("above its ceiling; '{}' was measured again:", which.name()));
            }
            bar.inc(!ready as u64);
        }
        Event::Ceilings(ceilings) => bar.suspend(|| show_ceilings(ceilings, ready)),
        Event::Turn(name) => bar.set_message(name.to_string()),
        Event::Row(record) => {
            bar.suspend(|| println!("{}", record.line()));
            bar.inc(1);
        }
        Event::Failed(failed) => {
            bar.suspend(|| println!("{}", failed.line()));
            bar.inc(1);
        }
        Event::Lost(Ok(())) => bar.suspend(|| println!("the device was lost; it is open again")),
        Event::Lost(Err(error)) => {
            bar.suspend(|| println!("the device was lost and does not open again: {error}"));
        }
        // What a later version of the library tells besides is not shown.
        _ => {}
    }
}

fn show_ceilings(c: &Ceilings, again: bool) {
    let rate = |unit: f64, of: Option<f64>| of.map_or("-".into(), |f| format!("{:.1}", f * unit));
    println!(
        "ceilings: copy {} GB/s ({} by our kernel), fma f32 {} GFLOP/s, f16 {}, cooperative matrices {}",
        rate(1e-9, c.copy),
        rate(1e-9, c.kernel_copy),
        rate(1e-9, c.fma32),
        rate(1e-9, c.fma16),
        rate(1e-9, c.coop)
    );
    if again {
        return;
    }
    println!(
        "costs: dispatch {} us in a pass, {} us with a pass each, {} us with a submit each; readback {} us",
        rate(1e6, c.dispatch),
        rate(1e6, c.pass),
        rate(1e6, c.submit),
        rate(1e6, c.readback)
    );
    println!("{}", Record::HEAD);
}

fn planned(gpu: &Gpu, entry: Entry) -> Result<String> {
    let line = |(pass, count): (String, usize)| match count {
        1 => format!("  {pass}\n"),
        _ => format!("  {pass} ({count} times)\n"),
    };
    Ok(bench::plan(gpu, entry)?.into_iter().map(line).collect())
}

/// Prints a text for each wanted row.
fn each(
    entries: Vec<Entry>,
    option: &str,
    wanted: impl Fn(&Entry) -> bool,
    text: impl Fn(Entry) -> Result<String>,
) -> Result<()> {
    let entries: Vec<Entry> = entries.into_iter().filter(wanted).collect();
    if entries.is_empty() {
        return Err(Error::config(format!("{option}: no such row; 'tiebeam bench' shows their names")));
    }
    let (bar, count) = (bar(entries.len()), entries.len());
    let mut failed = 0;
    for entry in entries {
        let name = entry.name();
        bar.set_message(name.clone());
        let text = text(entry).unwrap_or_else(|error| {
            failed += 1;
            format!("  FAILED: {error}\n")
        });
        bar.suspend(|| print!("{name}\n{text}"));
        bar.inc(1);
    }
    bar.finish_and_clear();
    match failed {
        0 => Ok(()),
        _ => Err(Error::device(format!("{failed} of {count} rows failed"))),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    files::replace_with(path, text)?;
    println!("wrote {}", path.display());
    Ok(())
}

fn compare(
    files: &[PathBuf],
    html: Option<&Path>,
    readme: Option<&Path>,
    baseline: Option<&Path>,
) -> Result<()> {
    let mut runs: Vec<Run> = Vec::new();
    for file in files {
        runs.extend(read_runs(file)?);
    }
    if let Some(baseline) = baseline.map(Baseline::read).transpose()? {
        for run in &runs {
            let host = &run.host;
            let (date, kernels) = (host.date(), host.kernels());
            println!("{}, {date}{kernels}\n{}", host.adapter, baseline.matches(run).table());
        }
    }
    if let Some(html) = html {
        let text = page(&runs).map_err(|message| Error::io(html, std::io::Error::other(message)))?;
        write(html, &text)?;
    }
    let Some(readme) = readme else { return Ok(()) };
    let fault = |message: String| Error::format(readme, message);
    let text = std::fs::read_to_string(readme).map_err(|e| Error::io(readme, e))?;
    let [start, end] = ["<!-- bench -->\n", "<!-- end of bench -->"];
    match (text.find(start), text.find(end)) {
        (Some(first), Some(last)) if first + start.len() <= last => {
            let (head, tail) = (&text[..first + start.len()], &text[last..]);
            write(readme, &format!("{head}{}{tail}", markdown(&runs)))
        }
        _ => Err(fault(format!("no lines '{}' and '{end}' in this order", start.trim_end()))),
    }
}
