//! What all commands share: the options that every command takes, and where results, remarks and JSON lines go.

use clap::ArgAction;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::cell::{Cell, RefCell};
use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Read, Write, stderr, stdin, stdout};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tiebeam::bench::Part;
use tiebeam::{Error, Gpu, Options, Result, files};
use tracing_subscriber::EnvFilter;

/// Options that every command takes.
#[derive(clap::Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Index or part of the name of the adapter, as `tiebeam adapters` lists them [default: the best]
    #[arg(long, global = true, value_name = "ADAPTER")]
    pub adapter: Option<String>,
    /// Most device memory to use, with a unit: 500MB, 2GB, 1.5GiB [default: what the device has]
    #[arg(long, global = true, value_name = "SIZE", value_parser = files::parse_size)]
    pub memory: Option<u64>,
    /// Write results as JSON lines to FILE, or without a FILE to stdout (tables then go to stderr)
    #[arg(long, global = true, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    pub json: Option<PathBuf>,
    /// Print results and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Print what is logged: -v what happens, -vv in detail
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

/// Whether a path stands for stdin or stdout.
pub fn is_standard(path: &Path) -> bool {
    path == Path::new("-")
}

/// Where JSON lines go.
enum Lines {
    Nowhere,
    Stdout,
    File(PathBuf, RefCell<Option<Part>>),
}

/// The surroundings of a command.
pub struct Context {
    pub options: Options,
    quiet: bool,
    lines: Lines,
    /// Whether stdout carries data, so that tables go to stderr.
    data: Cell<bool>,
    /// Whether all JSON lines have been written, although the command fails.
    whole: Cell<bool>,
}

impl Context {
    pub fn new(global: &Global) -> Result<Context> {
        log(global);
        let lines = match &global.json {
            None => Lines::Nowhere,
            Some(path) if is_standard(path) => Lines::Stdout,
            Some(path) => {
                let beside = Part::beside(path);
                if beside.exists() && !global.quiet {
                    write(
                        stderr(),
                        &format!("replacing {}, which a run left that did not end\n", beside.display()),
                    );
                }
                Lines::File(path.clone(), RefCell::new(Some(Part::create(path)?)))
            }
        };
        let data = Cell::new(matches!(lines, Lines::Stdout));
        let options = Options::default().adapter(global.adapter.clone()).memory(global.memory);
        Ok(Context { options, quiet: global.quiet, lines, data, whole: Cell::new(false) })
    }

    /// Opens the device that the options name.
    pub fn open(&self) -> Result<Gpu> {
        Gpu::open_with(self.options.clone())
    }

    /// Prints lines of a result for people.
    pub fn result(&self, text: impl Display) {
        match self.data.get() {
            false => write(stdout(), &format!("{text}\n")),
            true => self.note(text),
        }
    }

    /// Prints a remark: what is being done, and what is worth knowing about the result.
    pub fn note(&self, text: impl Display) {
        if !self.quiet {
            write(stderr(), &format!("{text}\n"));
        }
    }

    /// Writes a result as a JSON line, if lines are wanted.
    pub fn record(&self, line: &Value) -> Result<()> {
        match &self.lines {
            Lines::Nowhere => {}
            Lines::Stdout => write(stdout(), &format!("{line}\n")),
            Lines::File(_, part) => {
                if let Some(part) = part.borrow_mut().as_mut() {
                    part.line(&line.to_string())?;
                }
            }
        }
        Ok(())
    }

    /// All JSON lines have been written, even if the command fails after this.
    pub fn whole(&self) {
        self.whole.set(true);
    }

    /// Gives the file of JSON lines its name if the lines are complete.
    pub fn finish(&self, done: bool) -> Result<()> {
        let Lines::File(path, part) = &self.lines else { return Ok(()) };
        let Some(part) = part.borrow_mut().take() else { return Ok(()) };
        if done || self.whole.get() {
            part.finish()?;
            self.note(format_args!("wrote {}", path.display()));
        } else if part.leave()? {
            self.note(format_args!("lines so far are in {}", Part::beside(path).display()));
        }
        Ok(())
    }

    /// Reads a file of text, or stdin for `-`.
    pub fn read(&self, path: &Path) -> Result<String> {
        if !is_standard(path) {
            return std::fs::read_to_string(path).map_err(|e| Error::io(path, e));
        }
        let mut text = String::new();
        let read = stdin().read_to_string(&mut text);
        read.map_err(|e| Error::io(Path::new("stdin"), e))?;
        Ok(text)
    }

    /// From here on tables go to stderr if `path` is `-`, because stdout carries its data.
    pub fn expect_data(&self, path: Option<&Path>) -> Result<()> {
        if path.is_some_and(is_standard) {
            if matches!(self.lines, Lines::Stdout) {
                return Err(Error::config("two results cannot both go to stdout; give one of them a file"));
            }
            self.data.set(true);
        }
        Ok(())
    }

    /// Writes a file of text completely or not at all, or stdout for `-`.
    pub fn write(&self, path: &Path, text: &str) -> Result<()> {
        if is_standard(path) {
            write(stdout(), text);
        } else {
            files::replace_with(path, text)?;
            self.note(format_args!("wrote {}", path.display()));
        }
        Ok(())
    }

    /// A bar or spinner on stderr, which shows nothing if remarks are not wanted or nobody is looking.
    pub fn bar(&self, length: Option<u64>, template: &str) -> ProgressBar {
        if self.quiet {
            return ProgressBar::hidden();
        }
        let bar = length.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }
}

/// Writes to stdout or stderr. If the reader has gone away, the process ends quietly, with the code of a process that SIGPIPE ends.
fn write(mut stream: impl Write, text: &str) {
    if let Err(error) = stream.write_all(text.as_bytes()).and_then(|()| stream.flush()) {
        if error.kind() != ErrorKind::BrokenPipe {
            // This fails too if the lost stream is stderr itself.
            let _ = writeln!(stderr(), "error: cannot write: {error}");
        }
        let code = if error.kind() == ErrorKind::BrokenPipe { 141 } else { 1 };
        tiebeam::exit::at_once(code);
    }
}

/// Logs go to stderr: warnings of Tiebeam and errors of others, or what `RUST_LOG` asks for.
fn log(global: &Global) {
    let filter = match (global.quiet, global.verbose) {
        (true, _) => "error",
        (_, 0) => "error,tiebeam=warn",
        (_, 1) => "warn,tiebeam=info",
        _ => "info,tiebeam=debug",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| filter.into());
    let colours = stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    // A second subscriber in one process is an error, which only tests could cause.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_target(global.verbose > 0)
        .without_time()
        .with_writer(stderr)
        .try_init();
}

/// Set by the first Ctrl-C. The second ends the program.
pub fn on_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            tiebeam::exit::at_once(130);
        }
    })
    .map_err(|e| Error::config(format!("Ctrl-C cannot be caught: {e}")))?;
    Ok(stop)
}
