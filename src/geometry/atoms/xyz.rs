//! Extended XYZ: frames of atoms as text, with cell, energy, forces and stress.
//!
//! A frame is a line with the number of atoms, a line of `key=value` pairs, and one line per atom whose columns
//! `Properties` names. The keys that are read are `Lattice` (nine numbers: the three cell vectors one after the other),
//! `pbc` (three of T and F; all periodic if there is a lattice and no `pbc`), `energy` and `stress`. The columns that are
//! read are `species` (symbols or atomic numbers), `pos`, and `forces` or `force`. Other keys are kept, other columns are
//! skipped. Units are those of ASE: angstrom, eV, eV per angstrom, and eV per cubic angstrom for stress, which is
//! positive under tension. Source of the format: <https://github.com/libAtoms/extxyz>.

use super::elements::{atomic_number, symbol};
use crate::error::{Error, Result};
use crate::files;
use crate::geometry::space::neighbours::Cell;
use crate::geometry::space::vectors::{Mat3, Vec3};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// Atoms at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Frame {
    /// Atomic numbers. 0 is written as `X`.
    pub species: Vec<u8>,
    /// Positions of the atoms.
    pub positions: Vec<Vec3>,
    /// The cell and its periodic axes.
    pub cell: Option<Cell>,
    /// Energy of the whole frame.
    pub energy: Option<f64>,
    /// Force on each atom.
    pub forces: Option<Vec<Vec3>>,
    /// Derivative of the energy with respect to strain, divided by the volume.
    pub stress: Option<Mat3>,
    /// Other keys of the comment line, with their values as read.
    pub other: BTreeMap<String, String>,
}

/// Reads every frame of a file.
///
/// # Errors
/// When the file cannot be read or is not extended XYZ. The message names the line and the reason.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<Frame>> {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    parse(&text).map_err(|(line, message)| Error::format(path, format!("line {line}: {message}")))
}

/// Writes frames to a file, completely or not at all. Numbers are written so that they read back as the same bits.
///
/// # Errors
/// When the file cannot be written, a frame's lists differ in length, a number is not finite, or a key or value cannot be
/// written so that it reads back.
pub fn write(path: impl AsRef<Path>, frames: &[Frame]) -> Result<()> {
    let path = path.as_ref();
    files::replace_with(path, text(path, frames)?)
}

/// Returns the text that [`write()`] writes. `path` is its name in errors.
///
/// # Errors
/// As [`write()`], for frames that cannot be written.
pub fn text(path: impl AsRef<Path>, frames: &[Frame]) -> Result<String> {
    let mut text = String::new();
    for (i, frame) in frames.iter().enumerate() {
        append(path.as_ref(), i, frame, &mut text)?;
    }
    Ok(text)
}

/// Returns the error that [`write()`] would return for these frames now, and writes nothing. Long computations can check
/// before they begin.
///
/// # Errors
/// As [`write()`].
pub fn check(path: impl AsRef<Path>, frames: impl IntoIterator<Item = Frame>) -> Result<()> {
    let path = path.as_ref();
    files::check(path)?;
    frames.into_iter().enumerate().try_for_each(|(i, frame)| append(path, i, &frame, &mut String::new()))
}

fn append(path: &Path, i: usize, frame: &Frame, text: &mut String) -> Result<()> {
    frame.append(text).map_err(|message| Error::format(path, format!("frame {i}: {message}")))
}

/// Names under which other programs store results, besides energy, forces and stress.
const RESULTS: [&str; 6] = ["free_energy", "virial", "virials", "total_energy", "energies", "magmom"];

/// The line number of an error, and its reason.
type Wrong = (usize, String);

/// Lines with their numbers, counted from 0.
type Lines<'a> = std::iter::Peekable<std::iter::Enumerate<std::str::Lines<'a>>>;

/// Reads every frame of a text. An error is a line number and a reason.
pub fn parse(text: &str) -> std::result::Result<Vec<Frame>, Wrong> {
    let mut lines = text.lines().enumerate().peekable();
    let mut frames = Vec::new();
    while let Some(&(at, line)) = lines.peek() {
        if line.trim().is_empty() {
            // Blank lines may end a file. Between frames, one would be taken for a comment line.
            lines.next();
            if let Some((later, text)) = lines.clone().find(|(_, l)| !l.trim().is_empty()) {
                return Err((
                    later + 1,
                    format!("`{}` after the blank line {}; end the file there", text.trim(), at + 1),
                ));
            }
            break;
        }
        frames.push(frame(&mut lines)?);
    }
    Ok(frames)
}

fn frame(lines: &mut Lines) -> std::result::Result<Frame, Wrong> {
    let Some((at, line)) = lines.next() else { return Err((0, "no frame".into())) };
    let count: usize =
        line.trim().parse().map_err(|_| (at + 1, format!("`{}` is no number of atoms", line.trim())))?;
    let Some((comment_at, comment)) = lines.next() else {
        return Err((at + 2, "the file ends before the line of keys".into()));
    };
    let mut keys = pairs(comment).map_err(|message| (comment_at + 1, message))?;
    let (mut frame, columns) = header(&mut keys).map_err(|message| (comment_at + 1, message))?;
    frame.other = keys;
    for i in 0..count {
        let Some((at, line)) = lines.next() else {
            return Err((comment_at + i + 2, format!("the file ends after {i} of {count} atoms")));
        };
        atom(&mut frame, &columns, line).map_err(|message| (at + 1, message))?;
    }
    Ok(frame)
}

/// The content of a column.
#[derive(Clone, Copy, PartialEq)]
enum Column {
    Species,
    Position,
    Force,
    Other,
}

/// Returns the frame without its atoms, and the columns with their widths. Removes the keys that it reads from `keys`.
fn header(keys: &mut BTreeMap<String, String>) -> std::result::Result<(Frame, Vec<(Column, usize)>), String> {
    let mut frame = Frame::default();
    let periodic = keys.remove("pbc").map(|text| flags(&text)).transpose()?;
    match keys.remove("Lattice") {
        Some(text) => {
            let vectors = matrix("Lattice", &text)?;
            frame.cell = Some(Cell { vectors, periodic: periodic.unwrap_or([true; 3]) });
        }
        None if periodic.is_some_and(|p| p != [false; 3]) => {
            return Err("`pbc` without `Lattice`; give the cell".into());
        }
        None => {}
    }
    if let Some(text) = keys.remove("energy") {
        frame.energy = Some(number("energy", &text)?);
    }
    if let Some(text) = keys.remove("stress") {
        frame.stress = Some(matrix("stress", &text)?);
    }
    let text = keys.remove("Properties").unwrap_or_else(|| "species:S:1:pos:R:3".into());
    let columns = columns(&text)?;
    if columns.iter().any(|c| c.0 == Column::Force) {
        frame.forces = Some(Vec::new());
    }
    Ok((frame, columns))
}

fn columns(text: &str) -> std::result::Result<Vec<(Column, usize)>, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let mut columns = Vec::new();
    for part in parts.chunks(3) {
        let &[name, kind, width] = part else {
            return Err(format!("`Properties` is `{text}`; use name:kind:width for every column"));
        };
        let width: usize = width
            .parse()
            .ok()
            .filter(|w| (1..=1024).contains(w))
            .ok_or_else(|| format!("the column `{name}` is `{width}` wide; use 1 to 1024"))?;
        let (column, fixed) = match name {
            "species" => (Column::Species, ("SI", 1)),
            "pos" => (Column::Position, ("R", 3)),
            "forces" | "force" => (Column::Force, ("R", 3)),
            _ => (Column::Other, ("SIRL", width)),
        };
        if !fixed.0.contains(kind) || kind.len() != 1 || fixed.1 != width {
            return Err(format!("the column `{name}:{kind}:{width}` must be {} of {}", fixed.1, fixed.0));
        }
        if column != Column::Other && columns.iter().any(|c: &(Column, usize)| c.0 == column) {
            return Err(format!("the column `{name}` comes twice"));
        }
        columns.push((column, width));
    }
    for (column, name) in [(Column::Species, "species"), (Column::Position, "pos")] {
        if !columns.iter().any(|c| c.0 == column) {
            return Err(format!("`Properties` has no `{name}`"));
        }
    }
    Ok(columns)
}

fn atom(frame: &mut Frame, columns: &[(Column, usize)], line: &str) -> std::result::Result<(), String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let need = columns.iter().map(|c| c.1).sum::<usize>();
    if words.len() != need {
        return Err(format!("{} columns, `Properties` names {need}", words.len()));
    }
    let mut at = 0;
    for &(column, width) in columns {
        let part = &words[at..at + width];
        at += width;
        let triple = |name: &str| -> std::result::Result<Vec3, String> {
            Ok([number(name, part[0])?, number(name, part[1])?, number(name, part[2])?])
        };
        match column {
            Column::Species => frame
                .species
                .push(atomic_number(part[0]).ok_or_else(|| format!("`{}` is no element", part[0]))?),
            Column::Position => frame.positions.push(triple("pos")?),
            Column::Force => frame.forces.get_or_insert_default().push(triple("forces")?),
            Column::Other => {}
        }
    }
    Ok(())
}

/// Parses a finite number, also in Fortran's form `1d-3`.
fn number(name: &str, text: &str) -> std::result::Result<f64, String> {
    let parsed = text.parse().or_else(|_| text.replace(['d', 'D'], "e").parse::<f64>());
    match parsed {
        Ok(x) if x.is_finite() => Ok(x),
        _ => Err(format!("`{name}` is `{text}`, no finite number")),
    }
}

/// Parses nine numbers: three vectors one after the other.
fn matrix(name: &str, text: &str) -> std::result::Result<Mat3, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    if words.len() != 9 {
        return Err(format!("`{name}` has {} numbers; it needs 9", words.len()));
    }
    let mut m = [[0.0; 3]; 3];
    for (i, word) in words.iter().enumerate() {
        m[i / 3][i % 3] = number(name, word)?;
    }
    Ok(m)
}

fn flags(text: &str) -> std::result::Result<[bool; 3], String> {
    let one = |word: &str| match word {
        "T" | "True" | "true" | "1" => Some(true),
        "F" | "False" | "false" | "0" => Some(false),
        _ => None,
    };
    let all: Option<Vec<bool>> = text.split_whitespace().map(one).collect();
    all.and_then(|all| all.try_into().ok()).ok_or_else(|| format!("`pbc` is `{text}`; use three of T and F"))
}

/// Parses `key=value` pairs. A value with blanks is in quotes, braces or brackets; a key alone means T.
fn pairs(line: &str) -> std::result::Result<BTreeMap<String, String>, String> {
    let mut all = BTreeMap::new();
    let mut rest = line.trim_start();
    while !rest.is_empty() {
        let end = rest.find(|c: char| c == '=' || c.is_whitespace()).unwrap_or(rest.len());
        let (key, after) = rest.split_at(end);
        if key.is_empty() {
            return Err("a value without a key".into());
        }
        let (value, after) = match after.strip_prefix('=') {
            Some(after) => value(key, after)?,
            None => ("T", after),
        };
        if all.insert(key.to_string(), value.to_string()).is_some() {
            return Err(format!("the key `{key}` comes twice"));
        }
        rest = after.trim_start();
    }
    Ok(all)
}

/// Splits a value from the rest of the text: a word, or the content of quotes, braces or brackets, which may be nested.
fn value<'a>(key: &str, text: &'a str) -> std::result::Result<(&'a str, &'a str), String> {
    let (open, close) = match text.chars().next() {
        Some('"') => ('"', '"'),
        Some('{') => ('{', '}'),
        Some('[') => ('[', ']'),
        _ => return Ok(text.split_at(text.find(char::is_whitespace).unwrap_or(text.len()))),
    };
    let (mut depth, mut escaped) = (1, false);
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => {}
            c if c == close => depth -= 1,
            c if c == open => depth += 1,
            _ => {}
        }
        escaped = c == '\\' && !escaped;
        if depth == 0 {
            return Ok((&text[1..at], &text[at + 1..]));
        }
    }
    Err(format!("the value of `{key}` has no closing `{close}`"))
}

/// Whether a value in quotes would end exactly at its closing quote.
fn fits_quotes(text: &str) -> bool {
    let quoted = format!("\"{text}\"");
    !text.contains(['\n', '\r']) && value("", &quoted) == Ok((text, ""))
}

impl Frame {
    /// Number of atoms.
    pub fn len(&self) -> usize {
        self.species.len()
    }

    /// Whether there is no atom.
    pub fn is_empty(&self) -> bool {
        self.species.is_empty()
    }

    /// Returns the atoms, their cell and other keys, without energy, forces and stress under any name.
    pub fn without_results(&self) -> Frame {
        let Frame { species, positions, cell, .. } = self;
        let kept = self.other.iter().filter(|(key, _)| !RESULTS.contains(&key.as_str()));
        let other = kept.map(|(key, value)| (key.clone(), value.clone())).collect();
        Frame {
            species: species.clone(),
            positions: positions.clone(),
            cell: *cell,
            other,
            ..Frame::default()
        }
    }

    fn append(&self, text: &mut String) -> std::result::Result<(), String> {
        let n = self.len();
        let forces = self.forces.as_deref();
        if self.positions.len() != n || forces.is_some_and(|f| f.len() != n) {
            let (p, f) = (self.positions.len(), forces.map_or(n, <[_]>::len));
            return Err(format!("{n} species, {p} positions, {f} forces"));
        }
        let numbers = self.positions.iter().chain(forces.into_iter().flatten()).flatten();
        let numbers = numbers.chain(self.stress.iter().flatten().flatten()).chain(&self.energy);
        if numbers
            .chain(self.cell.iter().flat_map(|cell| cell.vectors.iter().flatten()))
            .any(|x| !x.is_finite())
        {
            return Err("a number is not finite, which could not be read again".into());
        }
        let mut keys = Vec::new();
        let joined = |m: &Mat3| m.iter().flatten().map(f64::to_string).collect::<Vec<_>>().join(" ");
        if let Some(cell) = &self.cell {
            keys.push(format!("Lattice=\"{}\"", joined(&cell.vectors)));
            let flags = cell.periodic.map(|p| if p { "T" } else { "F" });
            keys.push(format!("pbc=\"{}\"", flags.join(" ")));
        }
        let last = if forces.is_some() { ":forces:R:3" } else { "" };
        keys.push(format!("Properties=species:S:1:pos:R:3{last}"));
        keys.extend(self.energy.map(|e| format!("energy={e}")));
        keys.extend(self.stress.as_ref().map(|s| format!("stress=\"{}\"", joined(s))));
        for (key, value) in &self.other {
            if key.is_empty() || key.contains(|c: char| c.is_whitespace() || "=\"".contains(c)) {
                return Err(format!("`{key}` cannot be a key: use a word without blanks, quotes and `=`"));
            }
            if ["Lattice", "pbc", "Properties", "energy", "stress"].contains(&key.as_str()) {
                return Err(format!("`{key}` among the other keys: it has a field of its own"));
            }
            if !fits_quotes(value) {
                return Err(format!("the value of `{key}` has a quote or a line end; leave it out"));
            }
            keys.push(format!("{key}=\"{value}\""));
        }
        // Writing to a string does not fail.
        let _ = writeln!(text, "{n}\n{}", keys.join(" "));
        for i in 0..n {
            let [x, y, z] = self.positions[i];
            let _ = write!(text, "{} {x} {y} {z}", symbol(self.species[i]));
            if let Some([x, y, z]) = forces.map(|f| f[i]) {
                let _ = write!(text, " {x} {y} {z}");
            }
            text.push('\n');
        }
        Ok(())
    }
}
