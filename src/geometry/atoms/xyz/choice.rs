//! Which of a frame's keys and columns are its energy, forces and stress, and which are results that a new prediction replaces.

use super::labels::{Keys, Labels, Quantity, family};
use super::pairs::{is_numeric, is_unfit, numbers, scalar, words};
use super::{Column, Kind};
use crate::geometry::space::neighbours::Cell;
use crate::geometry::space::vectors::{DMat3, DVec3, Mat3};
use std::collections::BTreeMap;

const ENERGY: [&str; 6] =
    ["energy", "REF_energy", "dft_energy", "free_energy", "potential_energy", "total_energy"];
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
/// The families of these names, in the order in which they are looked for.
const FAMILIES: [&str; 3] = ["", "ref", "dft"];
/// Energies and stresses of single atoms, under the names that programs give them.
const ATOM_ENERGY: [&str; 6] =
    ["energies", "local_energy", "atom_energy", "atom_energies", "atomic_energy", "atomic_energies"];
const ATOM_STRESS: [&str; 4] = ["stresses", "local_stress", "local_virial", "atomic_virial"];

/// The position of a name in a list, for sorting: exact spellings come before others.
fn rank(list: &[&str], name: &str) -> Option<(usize, bool)> {
    let place = list.iter().position(|known| known.eq_ignore_ascii_case(name))?;
    Some((place, list[place] != name))
}

/// Chooses one of the names that a frame has, of this family if there is one.
fn choose<'a>(
    names: &[&'a str],
    list: &[&str],
    asked: Option<&str>,
    prefer: Option<&str>,
) -> Option<&'a str> {
    let mut names = names.iter().copied();
    if let Some(asked) = asked {
        return names.find(|name| *name == asked);
    }
    let other = |name: &str| prefer.is_some() && family(name).as_deref() != prefer;
    names.filter_map(|name| Some((other(name), rank(list, name)?, name))).min().map(|(.., name)| name)
}

/// The labels of one frame, taken from its keys and columns.
pub(super) struct Taken {
    pub energy: Option<f64>,
    pub stress: Option<Mat3>,
    /// The column of the forces.
    pub forces: Option<usize>,
}

/// Where a frame's keys are, for remarks and for what is asked.
struct Look<'a> {
    keys: &'a BTreeMap<String, String>,
    asked: &'a Keys,
    line: usize,
}

/// Chooses energy, stress and forces of a frame, and counts what it finds. `energy` and `stress` leave `keys` if they are used, because
/// the frame has fields for them. All other names stay.
pub(super) fn take(
    keys: &mut BTreeMap<String, String>,
    columns: &[Column],
    cell: Option<&Cell>,
    asked: &Keys,
    line: usize,
    labels: &mut Labels,
) -> Result<Taken, String> {
    let look = Look { keys, asked, line };
    let fits: Vec<&str> = columns.iter().filter(|c| vectors(c)).map(|c| c.name.as_str()).collect();
    let numbers = look.energies();
    let has = |list: &[&str], names: &[&str], of: &str| {
        names.iter().any(|name| rank(list, name).is_some() && family(name).as_deref() == Some(of))
    };
    let prefer = match (&asked.energy, &asked.forces) {
        (Some(name), _) | (None, Some(name)) => family(name),
        (None, None) => FAMILIES
            .into_iter()
            .find(|of| has(&ENERGY, &numbers, of) && has(&FORCES, &fits, of))
            .map(String::from),
    };
    let energy = choose(&numbers, &ENERGY, asked.energy.as_deref(), prefer.as_deref());
    let forces = choose(&fits, &FORCES, asked.forces.as_deref(), prefer.as_deref());
    let prefer = energy.or(forces).and_then(family).or(prefer);
    let good: Vec<&str> = look.names().filter(|name| look.is_stress(name, cell)).collect();
    let stress = choose(&good, &STRESS, asked.stress.as_deref(), prefer.as_deref());
    let taken = Taken {
        energy: energy.map(|name| scalar(name, &keys[name])).transpose()?,
        stress: stress.map(|name| look.stress(name, cell)).transpose()?,
        forces: columns.iter().position(|c| forces == Some(c.name.as_str())),
    };
    look.note_energies(energy, labels);
    look.note_stresses(stress, cell, labels);
    look.note_forces(columns, forces, labels);
    let used = [("energy", energy), ("forces", forces), ("stress", stress)];
    let used: Vec<(&str, &str)> = used.into_iter().filter_map(|(what, name)| Some((what, name?))).collect();
    let mut families: Vec<String> = used.iter().filter_map(|(_, name)| family(name)).collect();
    families.dedup();
    if families.len() > 1 {
        let each: Vec<String> = used.iter().map(|(what, name)| format!("{what} by `{name}`")).collect();
        let each = each.join(", ");
        labels.note(&format!("mixed {each}"), || {
            format!(
                "line {line}: the frame has {each}, which may stand for different computations; name those of one by --energy-key, \
                 --forces-key and --stress-key"
            )
        });
    }
    let is_own = |used: Option<&str>, own: &str| used == Some(own);
    let own = [("energy", is_own(energy, "energy")), ("stress", is_own(stress, "stress"))];
    own.iter().filter(|(_, used)| *used).for_each(|(name, _)| drop(keys.remove(*name)));
    Ok(taken)
}

fn vectors(column: &Column) -> bool {
    (column.kind, column.width) == (Kind::Real, 3)
}

impl Look<'_> {
    fn names(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    /// Keys that can be an energy. The format's own name and the one that was asked for must be numbers, if not finite ones: other
    /// names may stand for anything, so what has no number is no label.
    fn energies(&self) -> Vec<&str> {
        let asked = self.asked.energy.as_deref();
        let strict = |name: &str| asked.unwrap_or("energy") == name && !is_unfit(&self.keys[name]);
        self.names().filter(|name| strict(name) || scalar(name, &self.keys[*name]).is_ok()).collect()
    }

    fn note_energies(&self, used: Option<&str>, labels: &mut Labels) {
        let Look { keys, asked, line } = self;
        for name in self.names() {
            let lower = name.to_ascii_lowercase();
            let known = rank(&ENERGY, name).is_some() || asked.energy.as_deref() == Some(name);
            let like = lower.contains("energy") && !lower.contains("kinetic") && !lower.contains("cutoff");
            let is_number = scalar(name, &keys[name]).is_ok();
            if used == Some(name) || known || like && is_number {
                labels.count(Quantity::Energy, name, used == Some(name), !is_number);
            }
            if known && !is_number {
                labels.note(&format!("no number {name}"), || {
                    format!("line {line}: `{name}` is `{}`, no finite number, and was not used", keys[name])
                });
            }
        }
        if let Some(name) =
            used.filter(|name| name.eq_ignore_ascii_case("total_energy") && asked.energy.is_none())
        {
            labels.note("total", || {
                format!(
                    "line {line}: the energy is `{name}`, which in frames of dynamics may hold kinetic energy; if it does, name the \
                     potential energy by --energy-key"
                )
            });
        }
    }

    /// Whether a key can be the stress.
    fn is_stress(&self, name: &str, cell: Option<&Cell>) -> bool {
        let asked = self.asked.stress.as_deref();
        let text = &self.keys[name];
        let strict = asked.unwrap_or("stress") == name && !is_unfit(text) && symmetric(name, text).is_err();
        strict || self.stress(name, cell).is_ok()
    }

    /// Reads a stress, or a virial as a stress.
    fn stress(&self, name: &str, cell: Option<&Cell>) -> Result<Mat3, String> {
        let stress = symmetric(name, &self.keys[name])?;
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
    }

    fn note_stresses(&self, used: Option<&str>, cell: Option<&Cell>, labels: &mut Labels) {
        let Look { keys, asked, line } = self;
        for name in self.names() {
            let lower = name.to_ascii_lowercase();
            let known = rank(&STRESS, name).is_some() || asked.stress.as_deref() == Some(name);
            let is = used == Some(name);
            if !(is || known || lower.contains("stress") || lower.contains("virial")) {
                continue;
            }
            let read = self.stress(name, cell);
            if is || known || symmetric(name, &keys[name]).is_ok() {
                labels.count(quantity(name), name, is, read.is_err());
            }
            if let (true, true, Err(why)) = (known, used.is_none(), read) {
                labels.note(&format!("no stress {name}"), || format!("line {line}: {why}; it was not used"));
            }
        }
        let Some(name) = used else { return };
        if quantity(name) == Quantity::Virial {
            let box_only = cell.is_some_and(|c| c.periodic != [true; 3]);
            let more = if box_only { ", here of a cell that is not periodic along all axes" } else { "" };
            labels.note(if box_only { "virial of a box" } else { "virial" }, || {
                format!("line {line}: `{name}` became a stress, which is -virial / volume (positive under tension){more}")
            });
        }
        let Ok(all) = numbers(name, &keys[name]) else { return };
        if all.len() == 6 {
            labels.note("voigt", || {
                format!("line {line}: `{name}` has 6 numbers, read in the order xx yy zz yz xz xy of Voigt and ASE")
            });
        } else {
            let most = all.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            if [(1, 3), (2, 6), (5, 7)].iter().any(|&(a, b)| (all[a] - all[b]).abs() > 1e-3 * most) {
                labels.note("not symmetric", || {
                    format!(
                        "line {line}: `{name}` is not symmetric, as a stress must be; it was read as it is"
                    )
                });
            }
        }
    }

    fn note_forces(&self, columns: &[Column], used: Option<&str>, labels: &mut Labels) {
        let Look { asked, line, .. } = self;
        for column in columns {
            let name = column.name.as_str();
            let (is, fits) = (used == Some(name), vectors(column));
            let known = rank(&FORCES, name).is_some() || asked.forces.as_deref() == Some(name);
            if is || known || fits && name.to_ascii_lowercase().contains("force") {
                labels.count(Quantity::Forces, name, is, !fits);
            }
            if known && !fits {
                labels.note(&format!("no forces {name}"), || {
                    format!(
                        "line {line}: the column `{}` was not used as forces, which must be 3 of R; declare it as `{name}:R:3` if \
                         it has them",
                        column.declared()
                    )
                });
            }
        }
    }
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

/// Whether a name is in a list, and of the plain family. Names of references are kept beside predictions.
fn plain(list: &[&str], name: &str) -> bool {
    rank(list, name).is_some() && family(name).is_none_or(|family| !["ref", "dft"].contains(&family.as_str()))
}

/// Whether a key of a frame of so many atoms has a result that a prediction replaces. Its value must have as many numbers as the
/// result, since a key `force=0.5` may be anything.
pub(super) fn is_result(name: &str, value: &str, atoms: usize) -> bool {
    if ["energy", "stress"].contains(&name) {
        return true;
    }
    let count = words(value).count();
    is_numeric(value)
        && (plain(&ENERGY, name) && count == 1
            || plain(&FORCES, name) && atoms > 0 && count == 3 * atoms
            || plain(&STRESS, name) && [6, 9].contains(&count)
            || plain(&ATOM_ENERGY, name) && count == atoms
            || plain(&ATOM_STRESS, name) && atoms > 0 && [6 * atoms, 9 * atoms].contains(&count))
}

/// Whether a column has a result that a prediction replaces, of each atom.
pub(super) fn is_result_column(column: &Column) -> bool {
    let Column { name, kind, width, .. } = column;
    name == "forces"
        || matches!(kind, Kind::Real | Kind::Integer)
            && ((plain(&ENERGY, name) || plain(&ATOM_ENERGY, name)) && *width == 1
                || plain(&FORCES, name) && *width == 3
                || (plain(&STRESS, name) || plain(&ATOM_STRESS, name)) && [6, 9].contains(width))
}

/// Whether a key stands for a stress or virial.
pub(super) fn is_like_stress(name: &str) -> bool {
    rank(&STRESS, name).is_some()
}
