//! `tiebeam bench` and `tiebeam bench compare`.

use clap::{Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tiebeam::bench::{Ceilings, Host, Record, Run, Suite, markdown, page, read_runs, rows, time};
use tiebeam::{Error, Gpu, Options, Result, files};

/// Measure an adapter's ceilings and how near each kernel comes.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// Index or part of the name of the adapter, or 'all' [default: the best]
    #[arg(long)]
    adapter: Option<String>,
    /// How much to measure
    #[arg(long, value_enum, default_value = "quick")]
    suite: SuiteArg,
    /// Also write the results there, as JSON lines
    #[arg(long)]
    json: Option<PathBuf>,
    /// Only kernels whose name contains one of these words
    words: Vec<String>,
    #[command(subcommand)]
    compare: Option<Sub>,
}

#[derive(Subcommand)]
enum Sub {
    /// Show results of several runs side by side
    Compare {
        /// What --json wrote
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Write a page with pictures there
        #[arg(long, required_unless_present = "readme")]
        html: Option<PathBuf>,
        /// Put tables between the lines '<!-- bench -->' and '<!-- end of bench -->' of this file
        #[arg(long)]
        readme: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum SuiteArg {
    Quick,
    Full,
}

pub fn run(args: &Args) -> Result<()> {
    if let Some(Sub::Compare { files, html, readme }) = &args.compare {
        return compare(files, html.as_deref(), readme.as_deref());
    }
    let adapters = match args.adapter.as_deref() {
        Some("all") => Gpu::adapters()?.iter().map(|a| Some(a.index.to_string())).collect(),
        other => vec![other.map(str::to_string)],
    };
    let mut json = String::new();
    for adapter in adapters {
        let gpu = Gpu::open_with(Options { adapter, ..Options::default() })?;
        json += &one(&gpu, args)?.to_json();
    }
    match &args.json {
        Some(path) => write(path, &json),
        None => Ok(()),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    files::replace_with(path, text)?;
    println!("wrote {}", path.display());
    Ok(())
}

fn one(gpu: &Gpu, args: &Args) -> Result<Run> {
    println!("{}", gpu.adapter());
    if gpu.adapter().is_software() {
        println!("a software driver: these numbers are this CPU's, not a GPU's");
    }
    let (suite, budget) = match args.suite {
        SuiteArg::Quick => (Suite::Quick, Duration::from_millis(700)),
        SuiteArg::Full => (Suite::Full, Duration::from_secs(3)),
    };
    let chosen: Vec<_> = rows(gpu, suite)
        .into_iter()
        .filter(|(name, _)| args.words.is_empty() || args.words.iter().any(|w| name.contains(w.as_str())))
        .collect();
    let style = "{spinner} {pos}/{len} {wide_msg} {elapsed} so far, about {eta} to go";
    let bar = ProgressBar::new(chosen.len() as u64 + 6);
    bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
    bar.set_message("ceilings");
    bar.enable_steady_tick(Duration::from_millis(200));
    let ceilings = Ceilings::measure(gpu, |_| bar.inc(1))?;
    let host = Host::new(gpu);
    bar.suspend(|| show(&ceilings));
    let mut records = Vec::new();
    for (name, make) in chosen {
        bar.set_message(name);
        let record = time(gpu, &make(), &ceilings, budget)?;
        bar.suspend(|| println!("{}", record.line()));
        records.push(record);
        gpu.trim();
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Run { host, ceilings, records })
}

fn show(c: &Ceilings) {
    let half = c.fma16.map_or("no f16".into(), |f| format!("f16 {:.1} GFLOP/s", f * 1e-9));
    let coop = c.coop.map_or(String::new(), |f| format!(", cooperative matrices {:.1} GFLOP/s", f * 1e-9));
    println!(
        "ceilings: copy {:.2} GB/s ({:.2} by our kernel), fma f32 {:.1} GFLOP/s, {half}{coop}",
        c.copy * 1e-9,
        c.kernel_copy * 1e-9,
        c.fma32 * 1e-9
    );
    println!(
        "costs: dispatch {:.1} us in a pass, {:.1} us with a pass each, {:.1} us with a submit each; readback {:.0} us",
        c.dispatch * 1e6,
        c.pass * 1e6,
        c.submit * 1e6,
        c.readback * 1e6
    );
    println!("{}", Record::HEAD);
}

fn compare(files: &[PathBuf], html: Option<&Path>, readme: Option<&Path>) -> Result<()> {
    let mut runs = Vec::new();
    for file in files {
        runs.extend(read_runs(file)?);
    }
    if let Some(html) = html {
        write(html, &page(&runs))?;
    }
    let Some(readme) = readme else { return Ok(()) };
    let fault = |message: String| Error::Io { path: readme.to_path_buf(), message };
    let text = std::fs::read_to_string(readme).map_err(|e| fault(e.to_string()))?;
    let [start, end] = ["<!-- bench -->\n", "<!-- end of bench -->"];
    match (text.find(start), text.find(end)) {
        (Some(first), Some(last)) if first + start.len() <= last => {
            let (head, tail) = (&text[..first + start.len()], &text[last..]);
            write(readme, &format!("{head}{}{tail}", markdown(&runs)))
        }
        _ => Err(fault(format!("no lines '{}' and '{end}' in this order", start.trim_end()))),
    }
}
