//! Writing frames as text.

use super::pairs::{named, pair, reads_as};
use super::reader::{COLUMNS, WIDEST, is_name};
use super::{Column, Frame, append};
use crate::error::{Error, Result};
use crate::geometry::atoms::elements::symbol;
use crate::geometry::space::vectors::Mat3;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Writes frames one at a time.
///
/// ```
/// use tiebeam::geometry::xyz::{Frame, Writer};
///
/// let mut text = Vec::new();
/// let mut writer = Writer::new(&mut text, "out.xyz");
/// let frame = Frame { species: vec![29], positions: vec![[0.0; 3]], ..Frame::default() };
/// writer.write(&frame)?;
/// assert_eq!(String::from_utf8(text).unwrap(), "1\nProperties=species:S:1:pos:R:3\nCu 0 0 0\n");
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct Writer<W> {
    output: W,
    path: PathBuf,
    frames: usize,
    text: String,
}

impl<W: Write> Writer<W> {
    /// Makes a writer to `output`. `path` is its name in errors.
    pub fn new(output: W, path: impl AsRef<Path>) -> Writer<W> {
        Writer { output, path: path.as_ref().to_path_buf(), frames: 0, text: String::new() }
    }

    /// Writes a frame with one call of the output. Numbers are written so that they read back as the same bits.
    ///
    /// # Errors
    /// As [`super::write()`]. A frame that cannot be written leaves nothing in the output.
    pub fn write(&mut self, frame: &Frame) -> Result<()> {
        self.text.clear();
        append(&self.path, self.frames, frame, &mut self.text)?;
        self.output.write_all(self.text.as_bytes()).map_err(|e| Error::io(&self.path, e))?;
        self.frames += 1;
        Ok(())
    }

    /// Passes what the output has buffered on. An output that is dropped without this cannot tell of an error.
    ///
    /// # Errors
    /// When the output cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        self.output.flush().map_err(|e| Error::io(&self.path, e))
    }

    /// Number of frames written.
    pub fn frames(&self) -> usize {
        self.frames
    }
}

/// The keys and columns that a frame has fields for.
const KEYS: [&str; 5] = ["Lattice", "pbc", "Properties", "energy", "stress"];
const OWN: [&str; 4] = ["species", "Z", "pos", "forces"];

/// A number as text that reads back as the same bits, which has an exponent where it would be long without.
fn text_of(x: f64) -> String {
    if x == 0.0 || (1e-9..1e16).contains(&x.abs()) { x.to_string() } else { format!("{x:e}") }
}

impl Frame {
    /// Appends this frame's lines to `text`. An error leaves the text as it was.
    pub(super) fn append(&self, text: &mut String) -> std::result::Result<(), String> {
        self.check()?;
        let keys = self.keys()?;
        // Writing to a string does not fail.
        let _ = writeln!(text, "{}\n{}", self.len(), keys.join(" "));
        for i in 0..self.len() {
            let [x, y, z] = self.positions[i].map(text_of);
            let _ = write!(text, "{} {x} {y} {z}", symbol(self.species[i]));
            if let Some([x, y, z]) = self.forces.as_ref().map(|f| f[i].map(text_of)) {
                let _ = write!(text, " {x} {y} {z}");
            }
            for column in &self.columns {
                text.push(' ');
                text.push_str(&column.rows[i]);
            }
            text.push('\n');
        }
        Ok(())
    }

    /// Checks lengths, numbers and columns.
    fn check(&self) -> std::result::Result<(), String> {
        let n = self.len();
        let forces = self.forces.as_deref();
        if self.positions.len() != n || forces.is_some_and(|f| f.len() != n) {
            let (p, f) = (self.positions.len(), forces.map_or(n, <[_]>::len));
            return Err(format!("{n} species, {p} positions, {f} forces"));
        }
        let numbers = self.positions.iter().chain(forces.into_iter().flatten()).flatten();
        let numbers = numbers.chain(self.stress.iter().flatten().flatten()).chain(&self.energy);
        let cell = self.cell.iter().flat_map(|cell| cell.vectors.iter().flatten());
        if numbers.chain(cell).any(|x| !x.is_finite()) {
            return Err("a number is not finite, which could not be read again".into());
        }
        if self.columns.len() + OWN.len() > COLUMNS {
            return Err(format!(
                "{} other columns; the most are {}",
                self.columns.len(),
                COLUMNS - OWN.len()
            ));
        }
        let mut names = HashSet::new();
        for column in &self.columns {
            let Column { name, width, rows, .. } = column;
            if !is_name(name) {
                return Err(format!("the column `{name}` needs a name without blanks, quotes and brackets"));
            }
            // Forces of the file that are not those of the field may be written where the field is empty.
            if OWN.contains(&name.as_str()) && (name != "forces" || forces.is_some()) {
                return Err(format!(
                    "`{name}` cannot be another column, as the frame has a field for it; empty the field, or take the column out"
                ));
            }
            if !names.insert(name) {
                return Err(format!("the column `{name}` comes twice"));
            }
            if !(1..=WIDEST).contains(width) || rows.len() != n {
                return Err(format!("the column `{name}`: {} rows of {width} for {n} atoms", rows.len()));
            }
            if let Some(i) = rows.iter().position(|row| {
                !row.split_whitespace().eq(row.split(' ')) || row.split(' ').count() != *width
            }) {
                return Err(format!(
                    "the column `{name}` is `{}` at atom {i}; it needs {width} words",
                    rows[i]
                ));
            }
        }
        Ok(())
    }

    /// Returns the pairs of the line of keys.
    fn keys(&self) -> std::result::Result<Vec<String>, String> {
        let mut keys = Vec::new();
        // Matrices are written column by column, as ASE does; the vectors of a cell are columns there.
        let joined =
            |numbers: &mut dyn Iterator<Item = f64>| numbers.map(text_of).collect::<Vec<_>>().join(" ");
        if let Some(cell) = &self.cell {
            keys.push(format!("Lattice=\"{}\"", joined(&mut cell.vectors.iter().flatten().copied())));
            let flags = cell.periodic.map(|p| if p { "T" } else { "F" });
            keys.push(format!("pbc=\"{}\"", flags.join(" ")));
        }
        let mut columns = "species:S:1:pos:R:3".to_string();
        if self.forces.is_some() {
            columns.push_str(":forces:R:3");
        }
        for column in &self.columns {
            let _ = write!(columns, ":{}", column.declared());
        }
        keys.push(format!("Properties={columns}"));
        keys.extend(self.energy.map(|e| format!("energy={}", text_of(e))));
        let turned = |m: &Mat3| joined(&mut (0..9).map(|i| m[i % 3][i / 3]));
        keys.extend(self.stress.as_ref().map(|s| format!("stress=\"{}\"", turned(s))));
        for (key, value) in &self.other {
            // An energy of the file that is not that of the field may be written where the field is empty.
            let empty = key == "energy" && self.energy.is_none() || key == "stress" && self.stress.is_none();
            if KEYS.contains(&key.as_str()) && !empty {
                return Err(format!(
                    "`{key}` is among the other keys, and the frame has a field for it; empty the field, or take the key out"
                ));
            }
            match self.spelling.get(key).filter(|raw| reads_as(raw, value)) {
                Some(raw) if !key.is_empty() => keys.push(format!("{}={raw}", named(key))),
                _ => keys.push(pair(key, value)?),
            }
        }
        Ok(keys)
    }
}
