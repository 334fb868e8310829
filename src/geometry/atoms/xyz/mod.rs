//! Extended XYZ: frames of atoms as text, with cell, energy, forces and stress.
//!
//! A frame is a line with the number of atoms, a line of `key=value` pairs, and one line per atom whose columns
//! `Properties` names. The keys that are read are `Lattice` (nine numbers: the three cell vectors one after the other),
//! `pbc` (three of T and F; all periodic if there is a lattice and no `pbc`), an energy and a stress. The columns that are
//! read are `species` (symbols or atomic numbers), `Z`, `pos` and forces. Energies, forces and stresses have other names in files
//! of other programs: see [`Keys`]. Other keys and columns are kept. What programs write beyond the format is read as ASE reads
//! it, or refused by line. [`Labels`] tells which labels a file has and what was odd in it.
//!
//! Units are those of ASE: angstrom, eV, eV per angstrom, and eV per cubic angstrom for stress, which is
//! positive under tension. Source of the format: <https://github.com/libAtoms/extxyz>.
//!
//! [`read()`] and [`write()`] take whole files. [`Reader`] and [`Writer`] take one frame at a time, so that memory does not grow with
//! the file.

mod choice;
mod labels;
mod misspelt;
mod pairs;
mod reader;
mod writer;

pub use labels::{Keys, Label, Labels, Quantity};
pub use reader::Reader;
pub use writer::Writer;

use crate::error::{Error, Result};
use crate::files;
use crate::geometry::space::neighbours::Cell;
use crate::geometry::space::vectors::{Mat3, Vec3};
use reader::Fault;
use std::collections::BTreeMap;
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
    /// Other keys of the line of keys, with their values as read. A plain comment, which has words beside its keys and none that is
    /// known, is the value of `comment`. If the energy or stress were taken from another name, or are not finite, a key `energy` or
    /// `stress` of the file stays here.
    pub other: BTreeMap<String, String>,
    /// How the file spells values of `other` where they would be written in another way, such as `[1,2]`. A spelling that is not that of the
    /// value is not used.
    pub spelling: BTreeMap<String, String>,
    /// Other columns, with their text as read. Columns `forces` that are not the frame's forces are among them.
    pub columns: Vec<Column>,
}

/// A column that the format lets programs add, with a text for each atom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// The name, without blanks and colons.
    pub name: String,
    /// The type of its words.
    pub kind: Kind,
    /// Number of words for each atom.
    pub width: usize,
    /// The words of each atom, with one blank between them.
    pub rows: Vec<String>,
}

impl Column {
    /// The column as `Properties` names it.
    fn declared(&self) -> String {
        format!("{}:{}:{}", self.name, self.kind.letter(), self.width)
    }
}

/// The type of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `S`, words.
    Text,
    /// `I`, whole numbers.
    Integer,
    /// `R`, real numbers.
    Real,
    /// `L`, T or F.
    Logical,
}

impl Kind {
    /// The letter in `Properties`.
    pub fn letter(self) -> char {
        match self {
            Kind::Text => 'S',
            Kind::Integer => 'I',
            Kind::Real => 'R',
            Kind::Logical => 'L',
        }
    }

    fn of(letter: &str) -> Option<Kind> {
        [Kind::Text, Kind::Integer, Kind::Real, Kind::Logical]
            .into_iter()
            .find(|kind| letter.chars().eq([kind.letter()]))
    }
}

/// Reads every frame of a file.
///
/// # Errors
/// When the file cannot be read or is not extended XYZ. The message names the line and the reason.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<Frame>> {
    read_with(path, &Keys::default()).map(|(frames, _)| frames)
}

/// Reads every frame of a file with labels under these names, and tells which labels there are.
///
/// # Errors
/// As [`read()`].
pub fn read_with(path: impl AsRef<Path>, keys: &Keys) -> Result<(Vec<Frame>, Labels)> {
    let mut reader = Reader::open(path)?.keys(keys.clone());
    let frames = reader.by_ref().collect::<Result<_>>()?;
    Ok((frames, reader.labels().clone()))
}

/// Reads every frame of a text. An error is a line number and a reason.
pub fn parse(text: &str) -> std::result::Result<Vec<Frame>, (usize, String)> {
    let mut reader = Reader::new(text.as_bytes());
    let mut frames = Vec::new();
    loop {
        match reader.frame() {
            Ok(Some(frame)) => frames.push(frame),
            Ok(None) => return Ok(frames),
            Err(Fault::Wrong(line, why)) => return Err((line, why)),
            Err(Fault::Io(error)) => return Err((0, error.to_string())),
        }
    }
}

/// Writes frames to a file, completely or not at all. Numbers are written so that they read back as the same bits.
///
/// # Errors
/// When the file cannot be written, a frame's lists differ in length, a number is not finite, or a key, value or column cannot be
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

impl Frame {
    /// Number of atoms.
    pub fn len(&self) -> usize {
        self.species.len()
    }

    /// Whether there is no atom.
    pub fn is_empty(&self) -> bool {
        self.species.is_empty()
    }

    /// Returns the atoms, their cell and other keys and columns, without energy, forces and stress, of the frame and of single atoms. They
    /// are left out under all plain names that programs have for them (`free_energy`, `virial`, `local_energy` and the like, in
    /// capital or small letters), if they have as many numbers as such a result. Those of references (`REF_energy`, `dft_forces` and
    /// the like) are kept.
    pub fn without_results(&self) -> Frame {
        let Frame { species, positions, cell, .. } = self;
        let kept = |(key, value): &(&String, &String)| !choice::is_result(key, value, self.len());
        let other: BTreeMap<String, String> =
            self.other.iter().filter(kept).map(|(key, value)| (key.clone(), value.clone())).collect();
        let spelling = self.spelling.iter().filter(|(key, _)| other.contains_key(*key));
        Frame {
            species: species.clone(),
            positions: positions.clone(),
            cell: *cell,
            spelling: spelling.map(|(key, raw)| (key.clone(), raw.clone())).collect(),
            other,
            columns: self
                .columns
                .iter()
                .filter(|column| !choice::is_result_column(column))
                .cloned()
                .collect(),
            ..Frame::default()
        }
    }

    /// Whether [`Frame::without_results`] has no stress or virial left of those that this frame has.
    pub fn loses_stress(&self) -> bool {
        let has = |name: &str| choice::is_like_stress(name);
        let all = || self.other.iter().filter(|(key, _)| has(key));
        let kept = all().any(|(key, value)| !choice::is_result(key, value, self.len()));
        !kept && (self.stress.is_some() || all().next().is_some())
    }
}
