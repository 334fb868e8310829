//! Labels: the energies, forces and stresses of a file under the names that programs give them.

use super::pairs::{numbers, scalar};
use super::{Column, Kind};
use crate::geometry::space::neighbours::Cell;
use crate::geometry::space::vectors::{DMat3, DVec3, Mat3};
use std::collections::BTreeMap;
use std::fmt::{self, Display};

/// What a label says of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Quantity {
    /// The energy of the whole frame, in eV.
    Energy,
    /// The force on each atom, in eV per angstrom.
    Forces,
    /// The stress, in eV per cubic angstrom, positive under tension.
    Stress,
    /// The virial, in eV, positive under compression: `stress = -virial / volume`. Source of the sign: the specification of the
    /// format, <https://github.com/libAtoms/extxyz>, and QUIP.
    Virial,
}

impl Quantity {
    /// All quantities, in the order of tables.
    pub const ALL: [Quantity; 4] = [Quantity::Energy, Quantity::Forces, Quantity::Stress, Quantity::Virial];
}

impl Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Quantity::Energy => "energy",
            Quantity::Forces => "forces",
            Quantity::Stress => "stress",
            Quantity::Virial => "virial",
        })
    }
}

/// The names under which labels are looked for. Without a name for a quantity, the first that a frame has of a fixed list is
/// used, where capital and small letters are the same:
///
/// | quantity | names, in this order |
/// |---|---|
/// | energy | `energy`, `REF_energy`, `dft_energy`, `free_energy`, `total_energy`, `potential_energy` |
/// | forces | `forces`, `force`, `REF_forces`, `REF_force`, `dft_forces`, `dft_force` |
/// | stress | `stress`, `REF_stress`, `dft_stress`, then as virials: `virial`, `virials`, `REF_virial`, `REF_virials`, `dft_virial`, `dft_virials` |
///
/// ```
/// use tiebeam::geometry::xyz::{self, Keys};
///
/// let text = "1\nProperties=species:S:1:pos:R:3 energy=-1 dft_energy=-2\nCu 0 0 0\n";
/// assert_eq!(xyz::parse(text).unwrap()[0].energy, Some(-1.0));
/// let keys = Keys::default().energy(Some("dft_energy".into()));
/// let frames: Vec<_> = xyz::Reader::new(text.as_bytes()).keys(keys).collect::<Result<_, _>>()?;
/// assert_eq!(frames[0].energy, Some(-2.0));
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Keys {
    /// The only key that is read as the energy, exactly as the file spells it.
    pub energy: Option<String>,
    /// The only column that is read as forces.
    pub forces: Option<String>,
    /// The only key that is read as the stress, or as the virial if `virial` is a part of the name.
    pub stress: Option<String>,
}

crate::setters::setters!(Keys { energy: Option<String>, forces: Option<String>, stress: Option<String> });

const ENERGY: [&str; 6] =
    ["energy", "REF_energy", "dft_energy", "free_energy", "total_energy", "potential_energy"];
const FORCES: [&str; 6] = ["forces", "force", "REF_forces", "REF_force", "dft_forces", "dft_force"];
const STRESS: [&str; 9] = [
    "stress",
    "REF_stress",
    "dft_stress",
    "virial",
    "virials",
    "REF_virial",
    "REF_virials",
    "dft_virial",
    "dft_virials",
];

/// Keys and columns in which other programs store what a potential predicts, besides the fields of a frame. They would be beside
/// numbers that are not theirs.
pub(super) const RESULTS: [&str; 7] =
    ["free_energy", "total_energy", "energies", "force", "virial", "virials", "stresses"];

/// A name under which a file has a label.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Label {
    /// What the name stands for.
    pub quantity: Quantity,
    /// The key or column, as the file spells it.
    pub name: String,
    /// Number of frames that have it.
    pub frames: usize,
    /// Number of frames whose energy, forces or stress were taken from it.
    pub used: usize,
}

/// The most names and remarks that are kept. A file that gives every frame names of its own must not fill the memory.
const MOST: usize = 256;

/// What a [`super::Reader`] has found so far: labels by name, and what was odd. Printed, it is a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Labels {
    /// Number of frames read.
    pub frames: usize,
    /// The labels, in the order in which they were found.
    pub found: Vec<Label>,
    /// Texts by kind, with the number of frames or lines that they are true of.
    odd: BTreeMap<String, (String, usize)>,
}

impl Labels {
    /// Number of frames that have this quantity in their fields. A virial becomes a stress.
    pub fn used(&self, quantity: Quantity) -> usize {
        self.of(quantity).map(|label| label.used).sum()
    }

    /// The names found for a quantity.
    pub fn of(&self, quantity: Quantity) -> impl Iterator<Item = &Label> {
        self.found.iter().filter(move |label| label.quantity == quantity)
    }

    /// What was odd in the file, and how it was read. Each kind of oddity has one sentence, with the place where it came first.
    pub fn remarks(&self) -> impl Iterator<Item = String> + '_ {
        self.odd.values().map(|(text, count)| match count {
            1 => text.clone(),
            n => format!("{text} ({n} times in all)"),
        })
    }

    /// Returns one line about a quantity: which names are used in how many frames, and which are not.
    pub fn line(&self, quantity: Quantity) -> String {
        let one = |label: &Label| {
            let Label { name, frames, used, .. } = label;
            match (*used, *frames) {
                (0, n) => format!("`{name}` found in {n} and not used"),
                (used, n) if used == n => format!("`{name}` used in {used} of {}", self.frames),
                (used, n) => format!("`{name}` used in {used} of {}, found in {n}", self.frames),
            }
        };
        let all: Vec<String> = self.of(quantity).map(one).collect();
        if all.is_empty() { "absent".into() } else { all.join("; ") }
    }

    pub(super) fn note(&mut self, kind: &str, text: impl FnOnce() -> String) {
        if let Some((_, count)) = self.odd.get_mut(kind) {
            *count += 1;
        } else if self.odd.len() < MOST {
            self.odd.insert(kind.into(), (text(), 1));
        }
    }

    fn count(&mut self, quantity: Quantity, name: &str, used: bool) {
        let known = self.found.iter().position(|l| l.quantity == quantity && l.name == name);
        if known.is_none() && self.found.len() >= MOST && !used {
            return;
        }
        let at = known.unwrap_or_else(|| {
            self.found.push(Label { quantity, name: name.into(), frames: 0, used: 0 });
            self.found.len() - 1
        });
        self.found[at].frames += 1;
        self.found[at].used += usize::from(used);
    }
}

impl Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, quantity) in Quantity::ALL.into_iter().enumerate() {
            let end = if i == 0 { "" } else { "\n" };
            write!(f, "{end}{quantity:<8} {}", self.line(quantity))?;
        }
        Ok(())
    }
}

/// The position of a name in a list, for sorting: exact spellings come before others.
fn rank(list: &[&str], name: &str) -> Option<(usize, bool)> {
    let place = list.iter().position(|known| known.eq_ignore_ascii_case(name))?;
    Some((place, list[place] != name))
}

/// Chooses one of the names that a frame has.
fn choose<'a>(names: impl Iterator<Item = &'a str>, list: &[&str], asked: Option<&str>) -> Option<&'a str> {
    match asked {
        Some(asked) => { names }.find(|name| *name == asked),
        None => names.filter_map(|name| Some((rank(list, name)?, name))).min().map(|(_, name)| name),
    }
}

/// The labels of one frame, taken from its keys and columns.
pub(super) struct Taken {
    pub energy: Option<f64>,
    pub stress: Option<Mat3>,
}

/// Reads energy and stress from the keys of a frame, and counts what it finds. The format's own names leave `keys`, because the
/// frame has fields for them. Other names stay.
pub(super) fn take(
    keys: &mut BTreeMap<String, String>,
    cell: Option<&Cell>,
    asked: &Keys,
    line: usize,
    labels: &mut Labels,
) -> Result<Taken, String> {
    let energy = energy(keys, asked, line, labels)?;
    let stress = stress(keys, cell, asked, line, labels)?;
    keys.remove("energy");
    keys.remove("stress");
    Ok(Taken { energy, stress })
}

fn energy(
    keys: &BTreeMap<String, String>,
    asked: &Keys,
    line: usize,
    labels: &mut Labels,
) -> Result<Option<f64>, String> {
    let number = |name: &str| scalar(name, &keys[name]);
    let strict =
        |name: &str| name == "energy" && asked.energy.is_none() || asked.energy.as_deref() == Some(name);
    // Other names than the format's own may stand for anything, so what has no number is no label.
    let good = |name: &str| strict(name) || number(name).is_ok();
    let names = || keys.keys().map(String::as_str);
    let used = choose(names().filter(|name| good(name)), &ENERGY, asked.energy.as_deref());
    let value = used.map(number).transpose()?;
    for name in names() {
        let like = rank(&ENERGY, name).is_some() || name.to_ascii_lowercase().contains("energy");
        if used == Some(name) || like && number(name).is_ok() {
            labels.count(Quantity::Energy, name, used == Some(name));
        } else if rank(&ENERGY, name).is_some() {
            labels.note(&format!("no number {name}"), || {
                format!("line {line}: `{name}` is `{}`, no finite number, and was not used", keys[name])
            });
        }
    }
    Ok(value)
}

fn stress(
    keys: &BTreeMap<String, String>,
    cell: Option<&Cell>,
    asked: &Keys,
    line: usize,
    labels: &mut Labels,
) -> Result<Option<Mat3>, String> {
    let strict =
        |name: &str| name == "stress" && asked.stress.is_none() || asked.stress.as_deref() == Some(name);
    let read = |name: &str| -> Result<Mat3, String> {
        let stress = symmetric(name, &keys[name])?;
        if quantity(name) == Quantity::Stress {
            return Ok(stress);
        }
        let volume = cell.map_or(0.0, |c| DMat3::from_cols_array_2d(&c.vectors).determinant().abs());
        let sides: f64 = cell.map_or(0.0, |c| c.vectors.iter().map(|v| DVec3::from(*v).length()).product());
        // The vectors of a flat cell have a volume by rounding alone.
        if volume <= 1e-9 * sides {
            return Err(format!("`{name}` is a virial, whose stress needs the volume of a cell"));
        }
        Ok(stress.map(|row| row.map(|x| -x / volume)))
    };
    let names = || keys.keys().map(String::as_str);
    let good = |name: &str| strict(name) || read(name).is_ok();
    let used = choose(names().filter(|name| good(name)), &STRESS, asked.stress.as_deref());
    let value = used.map(read).transpose()?;
    for name in names() {
        let lower = name.to_ascii_lowercase();
        let known = rank(&STRESS, name).is_some();
        let is = used == Some(name);
        if !(is || known || lower.contains("stress") || lower.contains("virial")) {
            continue;
        }
        if is || symmetric(name, &keys[name]).is_ok() {
            labels.count(quantity(name), name, is);
        }
        if let (true, true, Err(why)) = (known, used.is_none(), read(name)) {
            labels.note(&format!("no stress {name}"), || format!("line {line}: {why}; it was not used"));
        }
    }
    if let Some(name) = used {
        if quantity(name) == Quantity::Virial {
            labels.note("virial", || {
                format!("line {line}: `{name}` became a stress, which is -virial / volume (positive under tension)")
            });
        }
        if numbers(name, &keys[name]).is_ok_and(|all| all.len() == 6) {
            labels.note("voigt", || {
                format!("line {line}: `{name}` has 6 numbers, read in the order xx yy zz yz xz xy of Voigt and ASE")
            });
        }
    }
    Ok(value)
}

fn quantity(name: &str) -> Quantity {
    match name.to_ascii_lowercase().contains("virial") {
        true => Quantity::Virial,
        false => Quantity::Stress,
    }
}

/// Parses nine numbers, column by column as ASE and QUIP write them, or six in Voigt's order.
fn symmetric(name: &str, text: &str) -> Result<Mat3, String> {
    let all = numbers(name, text)?;
    match all[..] {
        [xx, yy, zz, yz, xz, xy] => Ok([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]),
        _ if all.len() == 9 => Ok(std::array::from_fn(|a| std::array::from_fn(|b| all[3 * b + a]))),
        _ => Err(format!(
            "`{name}` has {} numbers; it needs 9, or 6 in the order xx yy zz yz xz xy",
            all.len()
        )),
    }
}

/// Chooses the column of the forces, and counts what it finds.
pub(super) fn forces(columns: &[Column], asked: &Keys, labels: &mut Labels) -> Result<Option<usize>, String> {
    let vectors = |c: &Column| (c.kind, c.width) == (Kind::Real, 3);
    if let Some(asked) = &asked.forces
        && let Some(column) = columns.iter().find(|c| c.name == *asked && !vectors(c))
    {
        return Err(format!("the column `{}` must be 3 of R to be forces", column.declared()));
    }
    let fits = columns.iter().filter(|c| vectors(c)).map(|c| c.name.as_str());
    let used = choose(fits, &FORCES, asked.forces.as_deref());
    for column in columns.iter().filter(|c| vectors(c)) {
        let is = used == Some(column.name.as_str());
        if is || column.name.to_ascii_lowercase().contains("force") {
            labels.count(Quantity::Forces, &column.name, is);
        }
    }
    Ok(columns.iter().position(|c| used == Some(c.name.as_str())))
}
