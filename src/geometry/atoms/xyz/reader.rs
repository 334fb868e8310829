//! Reading frames one after the other, in memory that does not grow with the file.

use super::choice;
use super::labels::{Keys, Labels};
use super::misspelt::{FIXED, alone, corrected};
use super::pairs::{Value, flags, is_unfit, number, numbers, pairs, reads_as, spelt};
use super::{Column, Frame, Kind};
use crate::error::{Error, Result};
use crate::geometry::atoms::elements::{atomic_number, symbol};
use crate::geometry::space::neighbours::Cell;
use crate::geometry::space::vectors::Vec3;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// The most words of a column.
pub(super) const WIDEST: usize = 1024;
/// The most columns.
pub(super) const COLUMNS: usize = 4096;
/// The longest line in bytes, so that a file without line ends is refused before it fills the memory.
const LONGEST: usize = 16 << 20;

/// Whether a column can have this name. Readers take some characters for the begin or end of a value.
pub(super) fn is_name(name: &str) -> bool {
    let odd = |c: char| c.is_whitespace() || c.is_control() || "\"'{}[]\\=:".contains(c);
    !name.is_empty() && !name.contains(odd)
}

/// Why there is no frame.
pub(super) enum Fault {
    Io(io::Error),
    /// The number of a line, counted from 1, and what is wrong there.
    Wrong(usize, String),
}

/// Reads frames one at a time.
///
/// ```
/// use tiebeam::geometry::xyz::{Quantity, Reader};
///
/// let text = "1\nREF_energy=-3.5 Properties=species:S:1:pos:R:3\nCu 0 0 0\n";
/// let mut reader = Reader::new(text.as_bytes());
/// for frame in reader.by_ref() {
///     assert_eq!(frame?.energy, Some(-3.5));
/// }
/// assert_eq!(reader.labels().line(Quantity::Energy), "`REF_energy` used in 1 of 1");
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// After an error there are no more frames.
pub struct Reader<R> {
    lines: Lines<R>,
    name: PathBuf,
    keys: Keys,
    labels: Labels,
    over: bool,
}

impl Reader<BufReader<File>> {
    /// Opens a file.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        Ok(Reader::new(BufReader::new(file)).named(path))
    }
}

impl<R: BufRead> Reader<R> {
    /// Makes a reader of any text.
    pub fn new(input: R) -> Reader<R> {
        Reader {
            lines: Lines { input, number: 0, bytes: 0, buffer: Vec::new() },
            name: PathBuf::from("extended XYZ"),
            keys: Keys::default(),
            labels: Labels::default(),
            over: false,
        }
    }

    /// Returns this reader with another name in its errors.
    #[must_use]
    pub fn named(mut self, name: impl AsRef<Path>) -> Self {
        self.name = name.as_ref().to_path_buf();
        self
    }

    /// Returns this reader with other names of labels.
    #[must_use]
    pub fn keys(mut self, keys: Keys) -> Self {
        self.keys = keys;
        self
    }

    /// The labels of the frames so far, and what was odd in them.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// Number of bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.lines.bytes
    }

    /// Reads the next frame.
    pub(super) fn frame(&mut self) -> std::result::Result<Option<Frame>, Fault> {
        if self.over {
            return Ok(None);
        }
        let found = self.following();
        self.over = !matches!(found, Ok(Some(_)));
        self.labels.frames += usize::from(!self.over);
        found
    }

    fn following(&mut self) -> std::result::Result<Option<Frame>, Fault> {
        let Reader { lines, keys, labels, .. } = self;
        let Some(count) = count(lines, labels)? else { return Ok(None) };
        let at = lines.number + 1;
        let wrong = |at: usize| move |message: String| Fault::Wrong(at, message);
        let Some(comment) = lines.next()? else {
            return Err(Fault::Wrong(at, "the file ends before the line of keys".into()));
        };
        let (mut frame, layout) = header(comment, at, keys, labels).map_err(wrong(at))?;
        // Nothing is allocated by the number of atoms, because a file may claim any.
        for i in 0..count {
            let Some(line) = lines.next()? else {
                let message = format!("the file ends after {i} of {count} atoms");
                return Err(Fault::Wrong(at + i + 1, message));
            };
            let at = at + i + 1;
            let had = frame.forces.is_some();
            let more = layout.atom(&mut frame, line).map_err(wrong(at))?;
            if let (true, None, Some((name, _))) = (had, &frame.forces, &layout.forces) {
                labels.spoilt(name);
                labels.note(&format!("spoilt {name}"), || {
                    format!("line {at}: `{name}` is not finite here; the frame's forces were not used")
                });
            }
            if more > 0 {
                let need = layout.need;
                labels.note("more columns", || {
                    format!("line {at} has {more} words after the {need} that `Properties` names, which were not read")
                });
            }
        }
        Ok(Some(frame))
    }
}

impl<R: BufRead> Iterator for Reader<R> {
    type Item = Result<Frame>;

    fn next(&mut self) -> Option<Result<Frame>> {
        let frame = self.frame().map_err(|fault| match fault {
            Fault::Io(error) => Error::io(&self.name, error),
            Fault::Wrong(line, message) => Error::format(&self.name, format!("line {line}: {message}")),
        });
        frame.transpose()
    }
}

/// Reads lines, which it counts.
struct Lines<R> {
    input: R,
    /// Number of lines read.
    number: usize,
    bytes: u64,
    buffer: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    /// Returns the next line without its end.
    fn next(&mut self) -> std::result::Result<Option<&str>, Fault> {
        self.buffer.clear();
        let mut limited = (&mut self.input).take(LONGEST as u64 + 1);
        let read = limited.read_until(b'\n', &mut self.buffer).map_err(Fault::Io)?;
        if read == 0 {
            return Ok(None);
        }
        self.number += 1;
        self.bytes += read as u64;
        if read > LONGEST {
            return Err(Fault::Wrong(
                self.number,
                "the line is longer than 16 MiB, so this is no text of frames".into(),
            ));
        }
        let text = std::str::from_utf8(&self.buffer).map_err(|e| {
            let message =
                format!("byte {} of the line is not UTF-8; save the file as UTF-8", e.valid_up_to());
            Fault::Wrong(self.number, message)
        })?;
        let text = text.strip_suffix('\n').unwrap_or(text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        // Windows' editors put this mark before the text of a file.
        let text = if self.number == 1 { text.strip_prefix('\u{feff}').unwrap_or(text) } else { text };
        Ok(Some(text))
    }
}

/// Reads the number of atoms, after blank lines if there are any. `None` at the end of the file.
fn count<R: BufRead>(lines: &mut Lines<R>, labels: &mut Labels) -> std::result::Result<Option<usize>, Fault> {
    let mut blank = None;
    loop {
        let at = lines.number + 1;
        let Some(line) = lines.next()?.map(str::trim) else { return Ok(None) };
        if line.is_empty() {
            blank.get_or_insert(at);
            continue;
        }
        let count = line.parse().map_err(|_| {
            let message = match line.starts_with("VEC") {
                true => format!("`{line}` is a cell vector after the atoms; give the cell as `Lattice` in the line of keys"),
                false => format!("`{line}` is no number of atoms"),
            };
            Fault::Wrong(at, message)
        })?;
        if let Some(at) = blank {
            labels.note("blank", || {
                format!("line {at} is blank and comes before a frame, where ASE stops; the frames after it were read")
            });
        }
        return Ok(Some(count));
    }
}

/// Reads the line of keys. Returns the frame without its atoms, and how their lines are read.
fn header(
    comment: &str,
    at: usize,
    asked: &Keys,
    labels: &mut Labels,
) -> std::result::Result<(Frame, Layout), String> {
    if comment.contains('\r') {
        return Err("a line end of old computers (carriage return) is within the line; take it out".into());
    }
    let mut frame = Frame::default();
    let mut keys = Split::default();
    match split(comment) {
        Ok(found) => keys = found,
        // Plain XYZ has a free comment, in which a quote may stand alone.
        Err(_) if is_free(comment) => keys.words.push(String::new()),
        Err(message) => return Err(message),
    }
    let Split { mut keys, words, twice, mut raws } = keys;
    corrected(&mut keys, at, labels)?;
    let mut fixed = FIXED.iter().any(|key| keys.contains_key(*key));
    frame.cell = cell(&mut keys)?;
    let properties = keys.remove("Properties");
    let columns = columns(properties.as_deref().unwrap_or("species:S:1:pos:R:3"))?;
    let found = choice::take(&mut keys, &columns, frame.cell.as_ref(), asked, at, labels)?;
    (frame.energy, frame.stress) = (found.energy, found.stress);
    fixed |= found.energy.is_some() || found.stress.is_some();
    // A comment that has nothing but keys and values is not free either.
    if fixed || words.is_empty() && twice.is_none() {
        if let Some(key) = twice.or_else(|| words.iter().find(|word| keys.contains_key(*word)).cloned()) {
            return Err(format!("the key `{key}` comes twice"));
        }
        alone(&words, false)?;
        keys.extend(words.into_iter().map(|word| (word, "T".to_string())));
        raws.retain(|key, raw| {
            keys.get(key).is_some_and(|value| spelt(value) != *raw && reads_as(raw, value))
        });
        (frame.other, frame.spelling) = (keys, raws);
    } else if !comment.trim().is_empty() {
        alone(&words, true)?;
        frame.other.insert("comment".into(), comment.trim().into());
    }
    let layout = Layout::new(columns, found.forces, &mut frame);
    Ok((frame, layout))
}

/// A line of keys.
#[derive(Default)]
struct Split {
    keys: BTreeMap<String, String>,
    words: Vec<String>,
    /// A key that comes twice.
    twice: Option<String>,
    /// How the line spells the values.
    raws: BTreeMap<String, String>,
}

fn split(comment: &str) -> std::result::Result<Split, String> {
    let mut all = Split::default();
    for (key, value) in pairs(comment)? {
        let Some(Value { text, raw }) = value else {
            all.words.push(key);
            continue;
        };
        all.raws.insert(key.clone(), raw.into());
        if all.keys.insert(key.clone(), text).is_some() {
            all.twice = Some(key);
        }
    }
    Ok(all)
}

/// Whether a line has nothing in it that may be meant as a key that is known.
fn is_free(comment: &str) -> bool {
    let lower = comment.to_lowercase();
    !["lattice", "properties", "pbc", "energy", "stress", "virial"].iter().any(|word| lower.contains(word))
}

/// Takes the cell out of the keys.
fn cell(keys: &mut BTreeMap<String, String>) -> std::result::Result<Option<Cell>, String> {
    let periodic = keys.remove("pbc").map(|text| flags("pbc", &text)).transpose()?;
    let Some(text) = keys.remove("Lattice") else {
        return match periodic.is_some_and(|p| p != [false; 3]) {
            true => Err("`pbc` without `Lattice`; give the cell".into()),
            false => Ok(None),
        };
    };
    let all = numbers("Lattice", &text)?;
    if all.len() != 9 {
        return Err(format!("`Lattice` has {} numbers; it needs 9", all.len()));
    }
    let vectors = std::array::from_fn(|i| std::array::from_fn(|k| all[3 * i + k]));
    Ok(Some(Cell { vectors, periodic: periodic.unwrap_or([true; 3]) }))
}

/// Reads the names, types and widths of columns.
fn columns(text: &str) -> std::result::Result<Vec<Column>, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let mut columns: Vec<Column> = Vec::new();
    let mut names = HashSet::new();
    if parts.len() / 3 > COLUMNS {
        return Err(format!("`Properties` has {} columns; the most are {COLUMNS}", parts.len() / 3));
    }
    for part in parts.chunks(3) {
        let &[name, kind, width] = part else {
            return Err(format!("`Properties` is `{text}`; use name:kind:width for every column"));
        };
        if !is_name(name) {
            return Err(format!("the column `{name}` needs a name without blanks, quotes and brackets"));
        }
        let width: usize = width
            .parse()
            .ok()
            .filter(|w| (1..=WIDEST).contains(w))
            .ok_or_else(|| format!("the column `{name}` is `{width}` wide; use 1 to {WIDEST}"))?;
        let (kinds, need) = match name {
            "species" => ("SI", 1),
            "Z" => ("I", 1),
            "pos" => ("R", 3),
            _ => ("SIRL", width),
        };
        let Some(kind) = Kind::of(kind).filter(|kind| kinds.contains(kind.letter()) && width == need) else {
            return Err(format!("the column `{name}:{kind}:{width}` must be {need} of {kinds}"));
        };
        if !names.insert(name) {
            return Err(format!("the column `{name}` comes twice"));
        }
        columns.push(Column { name: name.into(), kind, width, rows: Vec::new() });
    }
    let has = |name: &str| names.contains(name);
    if !has("pos") || !(has("species") || has("Z")) {
        let name = if has("pos") { "species" } else { "pos" };
        return Err(format!("`Properties` has no `{name}`"));
    }
    Ok(columns)
}

/// Where the words of an atom's line go.
#[derive(Clone, Copy, PartialEq)]
enum Field {
    Species,
    Number,
    Position,
    /// A column of the frame, by index.
    Other(usize),
    /// Forces under a name of the format's own, which the frame has a field for.
    Nowhere,
}

struct Layout {
    /// Field and width of each column.
    fields: Vec<(Field, usize)>,
    /// Name and first word of the forces.
    forces: Option<(String, usize)>,
    /// Number of words in all.
    need: usize,
}

impl Layout {
    /// Gives each column a field, and the frame its other columns.
    fn new(columns: Vec<Column>, used: Option<usize>, frame: &mut Frame) -> Layout {
        let widths: Vec<usize> = columns.iter().map(|c| c.width).collect();
        let forces = used.map(|at| (columns[at].name.clone(), widths[..at].iter().sum()));
        frame.forces = used.map(|_| Vec::new());
        let field = |(i, column): (usize, Column)| match column.name.as_str() {
            "species" => Field::Species,
            "Z" => Field::Number,
            "pos" => Field::Position,
            // These are the field's own names. Names of references are kept beside the field.
            "forces" | "force" if used == Some(i) => Field::Nowhere,
            _ => {
                frame.columns.push(column);
                Field::Other(frame.columns.len() - 1)
            }
        };
        let fields: Vec<Field> = columns.into_iter().enumerate().map(field).collect();
        let need = widths.iter().sum();
        Layout { fields: fields.into_iter().zip(widths).collect(), forces, need }
    }

    /// Reads an atom's line. Returns the number of words beyond those that are named.
    fn atom(&self, frame: &mut Frame, line: &str) -> std::result::Result<usize, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.len() < self.need {
            return Err(format!("{} columns, `Properties` names {}", words.len(), self.need));
        }
        let triple = |name: &str, at: usize| -> std::result::Result<Vec3, String> {
            Ok([number(name, words[at])?, number(name, words[at + 1])?, number(name, words[at + 2])?])
        };
        let (mut at, mut species, mut z) = (0, None, None);
        for &(field, width) in &self.fields {
            match field {
                Field::Species => species = Some(element(words[at])?),
                Field::Number => z = Some(whole(words[at])?),
                Field::Position => frame.positions.push(triple("pos", at)?),
                Field::Other(i) => frame.columns[i].rows.push(words[at..at + width].join(" ")),
                Field::Nowhere => {}
            }
            at += width;
        }
        if let (Some(forces), Some((name, at))) = (&mut frame.forces, &self.forces) {
            if words[*at..at + 3].iter().any(|word| is_unfit(word)) {
                frame.forces = None;
            } else {
                forces.push(triple(name, *at)?);
            }
        }
        if let (Some(species), Some(z)) = (species, z)
            && species != z
        {
            let (i, s) = (frame.species.len(), symbol(species));
            return Err(format!(
                "atom {i} is {s} by `species` and number {z} ({}) by `Z`; correct one of them",
                symbol(z)
            ));
        }
        frame.species.extend(z.or(species));
        Ok(words.len() - self.need)
    }
}

/// Reads a symbol in capital or small letters, or an atomic number.
fn element(word: &str) -> std::result::Result<u8, String> {
    let mut letters = word.chars();
    let first = letters.next().map(|c| c.to_ascii_uppercase());
    let capital: String = first.into_iter().chain(letters.map(|c| c.to_ascii_lowercase())).collect();
    atomic_number(word).or_else(|| atomic_number(&capital)).ok_or_else(|| format!("`{word}` is no element"))
}

fn whole(word: &str) -> std::result::Result<u8, String> {
    let number = word.parse().ok().and_then(|z: u8| atomic_number(&z.to_string()));
    number.ok_or_else(|| format!("`Z` is `{word}`, no number of an element"))
}
