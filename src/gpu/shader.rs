//! WGSL from files: typed constants that the host replaces, imports and slots, unrolling. Nothing else.
//!
//! A file is plain WGSL but for lines that start with `#` and for `$`, neither of which WGSL uses:
//!
//! ```wgsl
//! #import lhs = lhs_plain                  // a slot and its default, lib/lhs_plain.wgsl
//! #import activation                       // the same without a choice
//! const ROWS: u32 = 8u;                    // in column 0, on one line: the host may replace the value
//! alias Elem = f32;                        // likewise
//! fn store(at: u32) {
//! #unroll i ROWS/4                         // i is 0, then 1
//! #unroll j 4
//!     y[at + ${i*4+j}u] = acc$i.$xyzw{j};
//! #end
//! #end
//! }
//! ```
//!
//! Fragments are appended after the file, once each (order is free at module scope). So line numbers stay the same up
//! to the file's first `#unroll`, and [`Assembled::locate`] maps later lines back to the files. Debug builds read
//! `shaders/` from the disk, release builds embed it.

mod expression;
mod lines;
#[cfg(test)]
mod tests;

use crate::error::{Error, Result};
use expression::Scope;
use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The files of `shaders/` when the crate was built: names such as `matmul` and `lib/lhs_plain`, paths, texts.
static EMBEDDED: &[(&str, &str, &str)] = include!(concat!(env!("OUT_DIR"), "/shaders.rs"));

/// The kinds of declarations whose value the host may replace.
const KINDS: [&str; 5] = ["u32", "i32", "f32", "bool", "alias"];

/// More lines than this are a mistake in a count, not a kernel.
const MOST_LINES: usize = 100_000;

/// A name that the host writes: nearly always a literal.
pub(crate) type Name = Cow<'static, str>;

/// A kernel before assembly: a file or a generated text, and the host's choices for it.
///
/// ```
/// use tiebeam::gpu::shader::Source;
///
/// let text = "const LANES: u32 = 4u;\n@compute @workgroup_size(LANES) fn forward() {}\n";
/// let assembled = Source::text("nothing", text).u32("LANES", 64).assemble()?;
/// assert!(assembled.text().starts_with("const LANES: u32 = 64u;"));
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    name: Name,
    text: Option<String>,
    // Sorted, without repeats: the same choices in another order must find the same pipeline.
    constants: Vec<(Name, Value)>,
    slots: Vec<(Name, Fragment)>,
    enables: Vec<(Name, ())>,
    /// For a generated text, the lines of its pieces in the list of variants.
    pieces: Vec<String>,
    /// Whether some of its text comes from outside of the crate. Then it runs with bounds checks.
    foreign: bool,
}

/// One of [`KINDS`], and the WGSL that replaces the default.
#[derive(Clone, Debug, PartialEq)]
struct Value {
    kind: &'static str,
    wgsl: String,
}

#[derive(Clone, Debug, PartialEq)]
enum Fragment {
    /// The file `NAME.wgsl` of a folder `lib`.
    File(Name),
    /// Code made by the host, and what errors call it.
    Text(Name, String),
}

fn put<T>(list: &mut Vec<(Name, T)>, name: Name, value: T) {
    match list.binary_search_by(|(n, _)| n.cmp(&name)) {
        Ok(at) => list[at].1 = value,
        Err(at) => list.insert(at, (name, value)),
    }
}

fn get<'a, T>(list: &'a [(Name, T)], name: &str) -> Option<&'a T> {
    list.binary_search_by(|(n, _)| (**n).cmp(name)).ok().map(|at| &list[at].1)
}

impl Source {
    /// The kernel of the file `NAME.wgsl`, whichever room of `shaders/` it is in.
    pub(crate) fn file(name: impl Into<Name>) -> Source {
        let (constants, slots, enables, pieces) = Default::default();
        Source { name: name.into(), text: None, constants, slots, enables, pieces, foreign: false }
    }

    /// A kernel that the crate itself has written, under the same rules as a file.
    pub(crate) fn generated(name: impl Into<Name>, text: impl Into<String>) -> Source {
        Source { text: Some(text.into()), ..Source::file(name) }
    }

    /// A kernel of your own, under the same rules as a file. Errors call it `name`. It runs with bounds checks, so that no
    /// mistake in it reaches memory of others.
    pub fn text(name: impl Into<Name>, text: impl Into<String>) -> Source {
        Source { foreign: true, ..Source::generated(name, text) }
    }

    /// Whether some of its text comes from outside of the crate.
    pub(crate) fn is_foreign(&self) -> bool {
        self.foreign
    }

    fn set(mut self, name: impl Into<Name>, kind: &'static str, wgsl: String) -> Source {
        put(&mut self.constants, name.into(), Value { kind, wgsl });
        self
    }

    /// Replaces the value of `const NAME: u32`.
    pub fn u32(self, name: impl Into<Name>, value: u32) -> Source {
        self.set(name, "u32", format!("{value}u"))
    }

    /// Replaces the value of `const NAME: i32`.
    pub fn i32(self, name: impl Into<Name>, value: i32) -> Source {
        // The lowest value's literal would overflow before its minus sign applies.
        let wgsl = if value == i32::MIN { "i32(-2147483648)".into() } else { format!("{value}i") };
        self.set(name, "i32", wgsl)
    }

    /// Replaces the value of `const NAME: f32`. WGSL has no constants that are not finite.
    pub fn f32(self, name: impl Into<Name>, value: f32) -> Source {
        self.set(name, "f32", format!("{value:?}f"))
    }

    /// Replaces the value of `const NAME: bool`.
    pub fn bool(self, name: impl Into<Name>, value: bool) -> Source {
        self.set(name, "bool", value.to_string())
    }

    /// Replaces the type behind `alias NAME`.
    pub fn alias(self, name: impl Into<Name>, ty: impl Into<String>) -> Source {
        // Without blanks, so that a line of the list of variants can be cut at them.
        self.set(name, "alias", ty.into().replace(' ', ""))
    }

    /// Fills a slot with the fragment of the file `lib/FRAGMENT.wgsl`, of any room, instead of its default.
    pub fn slot(mut self, slot: impl Into<Name>, fragment: impl Into<Name>) -> Source {
        put(&mut self.slots, slot.into(), Fragment::File(fragment.into()));
        self
    }

    /// Fills a slot with code of your own, which may import fragments. Errors call it `name`. The kernel then runs with bounds
    /// checks.
    pub fn slot_text(
        mut self,
        slot: impl Into<Name>,
        name: impl Into<Name>,
        text: impl Into<String>,
    ) -> Source {
        put(&mut self.slots, slot.into(), Fragment::Text(name.into(), text.into()));
        Source { foreign: true, ..self }
    }

    /// Puts `enable EXTENSION;` on line 1.
    pub fn enable(mut self, extension: impl Into<Name>) -> Source {
        put(&mut self.enables, extension.into(), ());
        self
    }

    /// Gives the file's `MatrixA`, `MatrixB` and `MatrixC` this size: cooperative matrices of f16, summed in f32.
    pub(crate) fn matrices(self, size: usize) -> Source {
        let matrix = |of: &str| format!("coop_mat{size}x{size}<{of}>");
        let source = self.alias("MatrixA", matrix("f16, A")).alias("MatrixB", matrix("f16, B"));
        source.alias("MatrixC", matrix("f32, C")).enable("f16").enable("wgpu_cooperative_matrix")
    }

    /// The file's name without folder and ending, or the generated kernel's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The `u32` constants that the host sets, by name: tiles, lanes and the like.
    pub fn numbers(&self) -> impl Iterator<Item = (&str, &str)> {
        let whole = self.constants.iter().filter(|(_, value)| value.kind == "u32");
        whole.map(|(name, value)| (&**name, value.wgsl.trim_end_matches('u')))
    }

    /// A text that two sources share only if they assemble to the same code. Reads no file.
    pub fn key(&self) -> String {
        let mut key = self.name.to_string();
        let mut add = |mark: char, name: &str, value: &str| {
            // The length keeps a text from imitating the fields after it.
            let _ = write!(key, "\n{mark} {name} {} {value}", value.len());
        };
        if let Some(text) = &self.text {
            add('t', "", text);
        }
        for (name, value) in &self.constants {
            add('c', name, &value.wgsl);
        }
        for (slot, fragment) in &self.slots {
            match fragment {
                Fragment::File(name) => add('s', slot, name),
                Fragment::Text(_, text) => add('i', slot, text),
            }
        }
        for (extension, ()) in &self.enables {
            add('e', extension, "");
        }
        key
    }

    /// Assembles the kernel's text. With `TIEBEAM_DUMP_SHADERS=DIR` the result is also written to that folder.
    ///
    /// # Errors
    /// [`Error::Shader`] with the line at fault. [`Error::Io`] if the dump cannot be written.
    pub fn assemble(&self) -> Result<Assembled> {
        let assembled = self.assemble_with(&load)?;
        if let Some(folder) = std::env::var_os("TIEBEAM_DUMP_SHADERS").filter(|v| !v.is_empty()) {
            self.dump(&assembled, Path::new(&folder))?;
        }
        Ok(assembled)
    }

    fn dump(&self, assembled: &Assembled, folder: &Path) -> Result<PathBuf> {
        let mut hash = DefaultHasher::new();
        self.key().hash(&mut hash);
        let stem = self.name.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        let path = folder.join(format!("{stem}-{:016x}.wgsl", hash.finish()));
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        std::fs::write(&path, &assembled.text).map_err(|e| Error::io(&path, e))?;
        Ok(path)
    }

    fn assemble_with(&self, load: &Load) -> Result<Assembled> {
        let root = match &self.text {
            Some(text) => Unit::new(self.name.to_string(), text, true),
            None => {
                let (file, text) = load(&self.name).map_err(fault(&format!("{}.wgsl", self.name), 0))?;
                Unit::new(file.into_owned(), &text, true)
            }
        };
        let whole = fault(&root.file, 0);
        let (seen, slots, knobs, scope) = Default::default();
        let queue = VecDeque::from([root]);
        let mut assembly = Assembly { source: self, load, queue, seen, slots, knobs, scope };
        let mut units = Vec::new();
        while let Some(mut unit) = assembly.queue.pop_front() {
            for i in 0..unit.lines.len() {
                assembly.scan(&mut unit, i).map_err(fault(&unit.file, i + 1))?;
            }
            if let Some(start) = unit.open.pop() {
                return Err(fault(&unit.file, start + 1)("#unroll without #end".into()));
            }
            units.push(unit);
        }
        if let Some(problem) = assembly.left_over() {
            return Err(whole(problem));
        }
        let mut out = Assembled { name: self.name.to_string(), ..Assembled::default() };
        for (extension, ()) in &self.enables {
            out.text += &format!("enable {extension}; ");
        }
        for unit in &units {
            out.files.push(unit.file.clone());
            unit.expand(0..unit.lines.len(), &mut assembly.scope, &mut out)?;
        }
        Ok(out)
    }
}

/// A file's path and its text.
type Loaded = (Cow<'static, str>, Cow<'static, str>);

/// Finds the file and text of a name such as `matmul` or `lib/lhs_plain`.
type Load = dyn Fn(&str) -> Result<Loaded, String>;

fn load(name: &str) -> Result<Loaded, String> {
    let found = EMBEDDED.binary_search_by(|(n, _, _)| (*n).cmp(name));
    let (_, file, text) = found.map(|at| EMBEDDED[at]).map_err(|_| "no such file in shaders/")?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = match cfg!(debug_assertions) && root.join("shaders").is_dir() {
        true => {
            std::fs::read_to_string(root.join(file)).map(Cow::Owned).map_err(|e| format!("{file}: {e}"))?
        }
        false => Cow::Borrowed(text),
    };
    Ok((Cow::Borrowed(file), text))
}

/// Every kernel file, fragments excluded, for the test that translates them all.
pub fn names() -> Vec<&'static str> {
    EMBEDDED.iter().map(|(name, _, _)| *name).filter(|name| !name.contains('/')).collect()
}

/// Every fragment, without its folder, for the same test.
pub fn fragments() -> Vec<&'static str> {
    EMBEDDED.iter().filter_map(|(name, _, _)| name.strip_prefix("lib/")).collect()
}

/// The file of a kernel, or of a fragment as `lib/NAME`.
pub fn file(name: &str) -> Option<&'static str> {
    EMBEDDED.iter().find(|(n, _, _)| *n == name).map(|(_, file, _)| *file)
}

/// Returns a function that makes errors at one line. Line 0 means the whole file.
fn fault(file: &str, line: usize) -> impl Fn(String) -> Error + use<> {
    let file = file.to_string();
    move |message| Error::shader(file.clone(), line as u32, message)
}

/// One text that is being assembled.
struct Unit {
    file: String,
    lines: Vec<String>,
    imports: bool,
    /// Lines of `#unroll` whose `#end` has not been found yet. `ends` has the others, with their `#end`.
    open: Vec<usize>,
    ends: HashMap<usize, usize>,
}

impl Unit {
    fn new(file: String, text: &str, imports: bool) -> Unit {
        let lines = text.lines().map(String::from).collect();
        Unit { file, lines, imports, open: vec![], ends: HashMap::new() }
    }

    fn expand(&self, lines: Range<usize>, scope: &mut Scope, out: &mut Assembled) -> Result<()> {
        let mut i = lines.start;
        while i < lines.end {
            let at = fault(&self.file, i + 1);
            // After the scan, the only directives left are balanced unrolls.
            let Some((_, what)) = directive(&self.lines[i]) else {
                if out.lines.len() == MOST_LINES {
                    return Err(at(format!("unrolls to more than {MOST_LINES} lines")));
                }
                out.text += &scope.substitute(&self.lines[i]).map_err(at)?;
                out.text.push('\n');
                out.lines.push((out.files.len() as u32 - 1, i as u32 + 1));
                i += 1;
                continue;
            };
            let Some(&end) = self.ends.get(&i) else { break };
            let (name, count) = what.split_once(char::is_whitespace).unwrap_or((what, ""));
            if !is_word(name) || count.trim().is_empty() {
                return Err(at(format!("cannot read '#unroll {what}': write '#unroll i COUNT'")));
            }
            if scope.variable(name).is_some() || scope.constants.contains_key(name) {
                return Err(at(format!("#unroll {name}: the name is taken")));
            }
            for value in 0..scope.evaluate(count).map_err(at)? {
                scope.variables.push((name.to_string(), value));
                self.expand(i + 1..end, scope, out)?;
                scope.variables.pop();
            }
            i = end + 1;
        }
        Ok(())
    }
}

/// Parses a line that starts with `#`, such as into `("import", "lhs = lhs_plain")`.
fn directive(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_start().strip_prefix('#')?;
    let line = line.split("//").next().unwrap_or(line).trim();
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    Some((word, rest.trim()))
}

fn is_word(s: &str) -> bool {
    s.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && s.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Parses `const NAME: u32 = 1u;` or `alias NAME = f32;`, in column 0, into name, kind and the range of the value.
fn knob(line: &str) -> Option<(&str, &'static str, Range<usize>)> {
    let start = line.find('=')? + 1;
    let end = start + line[start..].find(';')?;
    let start = end - line[start..end].trim_start().len();
    let head = line[..start].trim_end().strip_suffix('=')?;
    let (name, kind) = match head.strip_prefix("alias ") {
        Some(name) => (name, "alias"),
        None => head.strip_prefix("const ")?.split_once(':')?,
    };
    let (name, kind) = (name.trim(), kind.trim());
    let kind = KINDS.into_iter().find(|k| *k == kind)?;
    is_word(name).then_some((name, kind, start..end))
}

/// The first pass: finds imports, checks that unrolls balance, replaces constants.
struct Assembly<'a> {
    source: &'a Source,
    load: &'a Load,
    queue: VecDeque<Unit>,
    seen: Vec<Fragment>,
    slots: Vec<String>,
    knobs: Vec<String>,
    scope: Scope,
}

impl Assembly<'_> {
    fn scan(&mut self, unit: &mut Unit, i: usize) -> Result<(), String> {
        let Some((word, what)) = directive(&unit.lines[i]) else {
            // A line inside an unroll is repeated, so no constant can be declared there.
            return if unit.open.is_empty() { self.replace(&mut unit.lines[i]) } else { Ok(()) };
        };
        match word {
            "import" if !unit.imports => Err("#import in a fragment: imports go one level deep".into()),
            "import" if !unit.open.is_empty() => Err("#import inside #unroll".into()),
            "import" => {
                let what = what.to_string();
                unit.lines[i].clear();
                self.import(&what)
            }
            "unroll" => {
                unit.open.push(i);
                Ok(())
            }
            "end" => {
                let start = unit.open.pop().ok_or("#end without #unroll")?;
                unit.ends.insert(start, i);
                Ok(())
            }
            _ => Err(format!("there is no #{word}; there are #import, #unroll and #end")),
        }
    }

    fn replace(&mut self, line: &mut String) -> Result<(), String> {
        let Some((name, kind, at)) = knob(line) else { return Ok(()) };
        let name = name.to_string();
        let mut value = line[at.clone()].trim().to_string();
        if let Some(new) = get(&self.source.constants, &name) {
            if new.kind != kind {
                return Err(format!("{name} is {kind}, the host gives {}", new.kind));
            }
            if kind == "f32" && !new.wgsl.contains(|c: char| c.is_ascii_digit()) {
                return Err(format!("{name}: WGSL has no constant {}", new.wgsl.trim_end_matches('f')));
            }
            value.clone_from(&new.wgsl);
            line.replace_range(at, &value);
        }
        if matches!(kind, "u32" | "i32") {
            self.scope.constants.insert(name.clone(), value);
        }
        self.knobs.push(name);
        Ok(())
    }

    fn import(&mut self, what: &str) -> Result<(), String> {
        let (slot, default) = match what.split_once('=') {
            Some((slot, default)) => (Some(slot.trim()), default.trim()),
            None => (None, what),
        };
        if !is_word(default) || slot.is_some_and(|s| !is_word(s)) {
            let forms = "write '#import name' or '#import slot = name'";
            return Err(format!("cannot read '#import {what}': {forms}"));
        }
        let mut fragment = Fragment::File(default.to_string().into());
        if let Some(slot) = slot {
            if self.slots.iter().any(|s| s == slot) {
                return Err(format!("slot {slot} is declared twice"));
            }
            self.slots.push(slot.to_string());
            if let Some(chosen) = get(&self.source.slots, slot) {
                fragment = chosen.clone();
            }
        }
        if self.seen.contains(&fragment) {
            return Ok(());
        }
        self.seen.push(fragment.clone());
        self.queue.push_back(match fragment {
            Fragment::File(name) => {
                let (file, text) =
                    (self.load)(&format!("lib/{name}")).map_err(|e| format!("{name}.wgsl: {e}"))?;
                Unit::new(file.into_owned(), &text, false)
            }
            Fragment::Text(name, text) => Unit::new(name.into(), &text, true),
        });
        Ok(())
    }

    /// Returns an error message if the host set a constant or slot that no line declares, or an extension whose name is
    /// invalid.
    fn left_over(&self) -> Option<String> {
        let Source { constants, slots, enables, .. } = self.source;
        let have = |names: &[String]| if names.is_empty() { "none".into() } else { names.join(", ") };
        if let Some((name, _)) = constants.iter().find(|(n, _)| !self.knobs.iter().any(|k| k == n)) {
            let knobs = have(&self.knobs);
            return Some(format!("no typed constant or alias {name} in column 0; there are: {knobs}"));
        }
        if let Some((name, _)) = slots.iter().find(|(n, _)| !self.slots.iter().any(|s| s == n)) {
            return Some(format!("no slot {name}; there are: {}", have(&self.slots)));
        }
        let bad = enables.iter().find(|(n, ())| !is_word(n))?;
        Some(format!("'{}' is no extension to enable", bad.0))
    }
}

/// A kernel's finished text, and where each line came from.
#[derive(Clone, Debug, Default)]
pub struct Assembled {
    name: String,
    text: String,
    files: Vec<String>,
    /// The file and the line that each line of the text came from.
    lines: Vec<(u32, u32)>,
}

impl Assembled {
    /// The source's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Plain WGSL.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Every file and generated text that went into it, the kernel first.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// The file and the line that a line of the text came from, both counted from 1. Line 0 means unknown.
    pub fn locate(&self, line: u32) -> (&str, u32) {
        match self.lines.get((line as usize).wrapping_sub(1)) {
            Some(&(file, line)) => (&self.files[file as usize], line),
            None => (self.files.first().map_or(&self.name, |file| file), 0),
        }
    }

    /// Parses and validates for a device with `capabilities`.
    ///
    /// # Errors
    /// [`Error::Shader`] with the line in the file that it came from.
    pub fn check(
        &self,
        capabilities: naga::valid::Capabilities,
    ) -> Result<(naga::Module, naga::valid::ModuleInfo)> {
        let module = naga::front::wgsl::parse_str(&self.text).map_err(|e| {
            let labels: Vec<_> = e.labels().map(|(span, label)| (span, label.to_string())).collect();
            self.report(vec![e.message().to_string()], &labels, e.notes().map(String::from).collect())
        })?;
        let mut validator = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities);
        let info = validator.validate(&module).map_err(|e| {
            let mut words = vec![e.to_string()];
            let mut cause = std::error::Error::source(e.as_inner());
            while let Some(inner) = cause {
                words.push(inner.to_string());
                cause = inner.source();
            }
            let mut labels: Vec<_> = e.spans().cloned().collect();
            // An expression, whose span is shorter, says more than the function around it.
            labels.sort_by_key(|(span, _)| span.to_range().map_or(usize::MAX, |r| r.len()));
            self.report(words, &labels, vec![])
        })?;
        Ok((module, info))
    }

    /// Makes an error of naga's message. Each label is shown with its own place, and the first label's place is the
    /// error's.
    fn report(&self, mut words: Vec<String>, labels: &[(naga::Span, String)], notes: Vec<String>) -> Error {
        let mut place = (self.locate(0).0.to_string(), 0);
        for (i, (span, label)) in labels.iter().filter(|(span, _)| span.is_defined()).enumerate() {
            let number = span.location(&self.text).line_number;
            let (file, line) = self.locate(number);
            let code = self.text.lines().nth(number as usize - 1).unwrap_or("").trim();
            let label = if label.is_empty() { "here" } else { label };
            words.push(format!("\n    {file}:{line}: {label}: {code}"));
            if i == 0 {
                place = (file.to_string(), line);
            }
        }
        words.extend(notes.into_iter().map(|note| format!("\n    note: {note}")));
        let message = words.join(": ").replace(": \n", "\n");
        Error::shader(place.0, place.1, message)
    }
}
