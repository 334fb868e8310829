//! What all commands share: the options that every command takes, and where results, remarks and JSON lines go.

use clap::ArgAction;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Display;
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufRead, BufReader, BufWriter, ErrorKind, IsTerminal, Read, Write, stderr, stdin, stdout};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tiebeam::bench::Part;
use tiebeam::ranks::{Ranks, agree, all_done, on_first};
use tiebeam::store::Shards;
use tiebeam::{Error, Gpu, Options, Result, files};
use tracing_subscriber::EnvFilter;

/// Options that every command takes.
#[derive(clap::Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Index or part of the name of the adapter, as `tiebeam adapters` lists them [default: the best]
    #[arg(long, global = true, value_name = "ADAPTER")]
    pub gpu: Option<String>,
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
    /// The file and its part, which is made with the first line, so that a command without lines changes no file.
    File(PathBuf, RefCell<Option<Part>>),
}

/// The surroundings of a command.
pub struct Context {
    pub options: Options,
    pub ranks: Arc<dyn Ranks>,
    quiet: bool,
    lines: Lines,
    /// Whether stdout carries data, so that tables go to stderr.
    data: Cell<bool>,
    /// Whether all JSON lines have been written, although the command fails.
    whole: Cell<bool>,
    stdin_read: Cell<bool>,
}

impl Context {
    /// Of several ranks, only the first one prints.
    pub fn new(global: &Global, ranks: Arc<dyn Ranks>) -> Result<Context> {
        log(global);
        let lines = match &global.json {
            _ if ranks.rank() > 0 => Lines::Nowhere,
            None => Lines::Nowhere,
            Some(path) if is_standard(path) => Lines::Stdout,
            Some(path) => {
                files::check(path)?;
                check_lines(path)?;
                Lines::File(path.clone(), RefCell::default())
            }
        };
        let data = Cell::new(matches!(lines, Lines::Stdout));
        let options = Options::default().adapter(global.gpu.clone()).memory(global.memory);
        Ok(Context {
            options,
            quiet: global.quiet || ranks.rank() > 0,
            ranks,
            lines,
            data,
            whole: Cell::default(),
            stdin_read: Cell::default(),
        })
    }

    /// Opens a model's weights, and says what was chosen where its files leave a choice.
    pub fn shards(&self, path: &Path) -> Result<Shards> {
        let shards = Shards::open(path)?;
        shards.notes().iter().for_each(|note| self.note(format_args!("{}: {note}", path.display())));
        Ok(shards)
    }

    /// Opens the device that the options name. A rank takes the one of its number on its machine, if nothing names another.
    pub fn open(&self) -> Result<Gpu> {
        match self.ranks.size() {
            1 => Gpu::open_with(self.options.clone()),
            _ => {
                let chosen = Gpu::adapter_of(self.ranks.local(), &self.options)?;
                Gpu::open_with(self.options.clone().adapter(Some(chosen.index.to_string())))
            }
        }
    }

    /// Whether this is rank 0, which prints and writes.
    pub fn is_first(&self) -> bool {
        self.ranks.rank() == 0
    }

    /// A result that all ranks have found, each for itself: if one has failed, all fail, and it is said once.
    pub fn all_done<T>(&self, own: Result<T>) -> Result<T> {
        all_done(&*self.ranks, own)
    }

    /// Checks that all ranks run this version and say the same.
    pub fn agree<N: Into<String>>(&self, said: impl IntoIterator<Item = (N, String)>) -> Result<()> {
        let mut said: BTreeMap<String, String> =
            said.into_iter().map(|(name, value)| (name.into(), value)).collect();
        said.insert("version".to_string(), env!("CARGO_PKG_VERSION").to_string());
        agree(&*self.ranks, &said)
    }

    /// Says how many ranks there are.
    pub fn describe_ranks(&self) {
        match self.ranks.size() {
            1 => self.note("1 rank; `mpirun -n 4 tiebeam-mpi ..` starts 4"),
            size => self.note(format_args!("{size} ranks")),
        }
    }

    /// Prints lines of a result for people.
    pub fn result(&self, text: impl Display) {
        if self.ranks.rank() > 0 {
            return;
        }
        match self.data.get() {
            false => write(stdout(), &format!("{text}\n")),
            true => self.note(text),
        }
    }

    /// Prints a part of a result at once, without ending the line.
    pub fn print(&self, text: &str) {
        if self.ranks.rank() > 0 {
            return;
        }
        match (self.data.get(), self.quiet) {
            (false, _) => write(stdout(), text),
            (true, false) => write(stderr(), text),
            (true, true) => {}
        }
    }

    /// Prints a remark: what is being done, and what is worth knowing about the result.
    pub fn note(&self, text: impl Display) {
        if !self.quiet {
            write(stderr(), &format!("{text}\n"));
        }
    }

    /// Prints an error, which `-q` does not leave out, of a part of the work after which the rest goes on.
    pub fn error(&self, error: &Error) {
        write(stderr(), &format!("error: {error}\n"));
    }

    /// Writes a result as a JSON line, if lines are wanted.
    pub fn record(&self, line: &Value) -> Result<()> {
        match &self.lines {
            Lines::Nowhere => {}
            Lines::Stdout => write(stdout(), &format!("{line}\n")),
            Lines::File(path, part) => {
                let mut part = part.borrow_mut();
                if part.is_none() {
                    let beside = Part::beside(path);
                    if beside.exists() {
                        self.note(format_args!(
                            "replacing {}, which a run left that did not end",
                            beside.display()
                        ));
                    }
                    *part = Some(Part::create(path)?);
                }
                part.as_mut().map_or(Ok(()), |part| part.line(&line.to_string()))?;
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

    /// Reads a file of text, or stdin for `-`, which is rank 0's.
    pub fn read(&self, path: &Path) -> Result<String> {
        if !is_standard(path) {
            self.keep(path)?;
            return std::fs::read_to_string(path).map_err(|e| Error::io(path, e));
        }
        if self.stdin_read.replace(true) {
            return Err(Error::config("`-` is given twice, but stdin can be read once"));
        }
        let text = on_first(&*self.ranks, || {
            let mut text = String::new();
            let read = stdin().read_to_string(&mut text);
            read.map(|_| text).map_err(|e| Error::io(Path::new("stdin"), e))
        })?;
        let mut bytes = text.unwrap_or_default().into_bytes();
        self.ranks.broadcast(&mut bytes)?;
        String::from_utf8(bytes).map_err(|e| Error::config(format!("stdin: {e}")))
    }

    /// Opens a file of text, or stdin for `-`, to be read as it comes. Returns the number of bytes too, if it is known. Stdin is rank
    /// 0's, which tells the others what it reads.
    pub fn input(&self, path: &Path) -> Result<(Box<dyn BufRead>, Option<u64>)> {
        if !is_standard(path) {
            self.keep(path)?;
            let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
            let length = file.metadata().ok().filter(|found| found.is_file()).map(|found| found.len());
            return Ok((Box::new(BufReader::with_capacity(1 << 16, file)), length));
        }
        if self.stdin_read.replace(true) {
            return Err(Error::config("`-` is given twice, but stdin can be read once"));
        }
        match self.ranks.size() {
            1 => Ok((Box::new(BufReader::new(stdin())), None)),
            _ => Ok((Box::new(BufReader::with_capacity(1 << 16, Told(self.ranks.clone()))), None)),
        }
    }

    /// Checks that the file of JSON lines is not one that the command reads, or writes as something else.
    pub fn keep(&self, path: &Path) -> Result<()> {
        let Lines::File(lines, _) = &self.lines else { return Ok(()) };
        // What is still to be written has no canonical path.
        let whole = |path: &Path| path.canonicalize().or_else(|_| std::path::absolute(path)).ok();
        let same = |a: &Path| whole(a).is_some() && whole(a) == whole(path);
        match same(lines) || same(&Part::beside(lines)) {
            true => Err(Error::config(format!(
                "--json={} would replace a file that is read or written",
                lines.display()
            ))),
            false => Ok(()),
        }
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

    /// Calls `content` to write a file as it comes, completely or not at all, or stdout for `-`. What `content` has captured is
    /// dropped before the file gets its name.
    pub fn stream<T>(&self, path: &Path, content: impl FnOnce(&mut dyn Write) -> Result<T>) -> Result<T> {
        if is_standard(path) {
            return content(&mut Stdout);
        }
        let mut found = None;
        files::replace(path, |file| {
            let mut output = BufWriter::with_capacity(1 << 16, file);
            found = Some(content(&mut output)?);
            output.flush().map_err(|e| Error::io(path, e))
        })?;
        self.note(format_args!("wrote {}", path.display()));
        found.ok_or_else(|| Error::config("nothing was written"))
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

/// Rank 0's stdin, on every rank. All read it in the same way.
struct Told(Arc<dyn Ranks>);

impl Read for Told {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let own = on_first(&*self.0, || {
            let read = stdin().read(into);
            read.map(|n| into[..n].to_vec()).map_err(|e| Error::io(Path::new("stdin"), e))
        });
        let told = own.and_then(|bytes| {
            let mut bytes = bytes.unwrap_or_default();
            self.0.broadcast(&mut bytes).map(|()| bytes)
        });
        let bytes = told.map_err(std::io::Error::other)?;
        let n = bytes.len().min(into.len());
        into[..n].copy_from_slice(&bytes[..n]);
        Ok(n)
    }
}

/// Stdout, which ends the process as [`write`] does.
struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        put(stdout(), bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Writes to stdout or stderr. If the reader has gone away, the process ends quietly, with the code of a process that SIGPIPE ends.
fn write(stream: impl Write, text: &str) {
    put(stream, text.as_bytes());
}

fn put(mut stream: impl Write, bytes: &[u8]) {
    if let Err(error) = stream.write_all(bytes).and_then(|()| stream.flush()) {
        if error.kind() != ErrorKind::BrokenPipe {
            // This fails too if the lost stream is stderr itself.
            let _ = writeln!(stderr(), "error: cannot write: {error}");
        }
        let code = if error.kind() == ErrorKind::BrokenPipe { 141 } else { 1 };
        tiebeam::exit::at_once(code);
    }
}

/// What tells files apart: the length, and a hash of the first 64 MiB.
pub fn summaries(paths: &[&Path]) -> BTreeMap<String, String> {
    let files = paths.iter().filter(|path| !is_standard(path));
    files.map(|path| (path.display().to_string(), summary(path))).collect()
}

fn summary(path: &Path) -> String {
    let read = || -> std::io::Result<String> {
        // Opening a pipe would wait for its writer.
        if !std::fs::metadata(path)?.is_file() {
            return Ok(String::new());
        }
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        let (mut hasher, mut part) = (DefaultHasher::new(), vec![0; 1 << 16]);
        for _ in 0..1024 {
            let n = file.read(&mut part)?;
            if n == 0 {
                break;
            }
            hasher.write(&part[..n]);
        }
        Ok(format!("{length} bytes, {:016x}", hasher.finish()))
    };
    read().unwrap_or_default()
}

/// Refuses to replace a file that has something else than JSON lines, such as a model that was named by mistake.
fn check_lines(path: &Path) -> Result<()> {
    let mut first = [0u8];
    let read = match std::fs::File::open(path) {
        // What is no file, such as a pipe, must not be read from.
        Ok(mut file) if file.metadata().is_ok_and(|found| found.is_file()) => file.read(&mut first),
        _ => return Ok(()),
    };
    match (read, first) {
        (Ok(1), [b'{']) | (Ok(0), _) => Ok(()),
        _ => Err(Error::config(format!(
            "--json={}: this file has no JSON lines; name another",
            path.display()
        ))),
    }
}

/// Logs go to stderr: what `-q` or `-v` says, else what `RUST_LOG` asks for, else warnings of Tiebeam and errors of others.
fn log(global: &Global) {
    let asked = std::env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
    let filter = match (global.quiet, global.verbose, asked) {
        (true, ..) => "error".into(),
        (_, 0, Some(asked)) => asked,
        (_, 0, None) => "error,tiebeam=warn".into(),
        (_, 1, _) => "warn,tiebeam=info".into(),
        _ => "info,tiebeam=debug".into(),
    };
    let filter = EnvFilter::new(filter);
    let colours = is_coloured(stderr().is_terminal(), std::env::var_os("NO_COLOR").as_deref());
    // A second subscriber in one process is an error, which only tests could cause.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_target(global.verbose > 0)
        .without_time()
        .with_writer(stderr)
        .try_init();
}

/// Whether logs have colours: only for people, and not if `NO_COLOR` is set to anything (<https://no-color.org>).
fn is_coloured(terminal: bool, no_color: Option<&OsStr>) -> bool {
    terminal && no_color.is_none_or(OsStr::is_empty)
}

/// Set by the first Ctrl-C. The second ends the program.
pub fn on_interrupt() -> Result<Arc<AtomicBool>> {
    catch(Arc::new(AtomicBool::new(false)), None)
}

/// Sets the flag at the first Ctrl-C, and says something.
fn catch(stop: Arc<AtomicBool>, said: Option<String>) -> Result<Arc<AtomicBool>> {
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::SeqCst) {
            tiebeam::exit::at_once(130);
        }
        if let Some(said) = &said {
            // A closed stderr must not end the program here.
            let _ = stderr().write_all(said.as_bytes());
        }
    })
    .map_err(|e| Error::config(format!("Ctrl-C cannot be caught: {e}")))?;
    Ok(stop)
}

/// [`on_interrupt`] of a training. Rank 0 of several says what happens, also if it is ended because another rank has died.
pub fn on_interrupt_of(context: &Context, checkpoint: &Path) -> Result<Arc<AtomicBool>> {
    let said = (context.ranks.size() > 1 && context.is_first()).then(|| {
        format!(
            "told to end: first the present step is done and {path} written. If a rank has died, or MPI does not wait so long, {path} is as \
             it was at the last point; the same command with --resume goes on from it\n",
            path = checkpoint.display()
        )
    });
    let stop = Arc::new(AtomicBool::new(false));
    catch(stop, said)
}

/// An error if Ctrl-C was pressed. `left` says what has become of the work.
pub fn unless_stopped(stopped: &AtomicBool, left: &str) -> Result<()> {
    match stopped.load(Ordering::Relaxed) {
        true => Err(Error::stopped(format!("stopped; {left}"))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_people_who_want_them() {
        assert!(is_coloured(true, None) && is_coloured(true, Some("".as_ref())));
        assert!(!is_coloured(true, Some("1".as_ref())) && !is_coloured(false, None));
    }
}
