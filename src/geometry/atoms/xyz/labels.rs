//! Labels: the energies, forces and stresses of a file under the names that programs give them.

use std::collections::{BTreeMap, BTreeSet};
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

/// The names under which labels are looked for. Energy, forces and stress belong to one computation, so the names of one family are
/// used where a frame has both energy and forces in it: the plain names first, then `REF_`, then `dft_`. A quantity that
/// this family lacks, or every one if no family has both, has the first name of its row that the frame has. Capital and small letters are
/// the same.
///
/// | quantity | names, in this order | family |
/// |---|---|---|
/// | energy | `energy`, `REF_energy`, `dft_energy`, `free_energy`, `potential_energy`, `total_energy` | plain but for `REF_` and `dft_` |
/// | forces | `forces`, `force`, `REF_forces`, `REF_force`, `dft_forces`, `dft_force` | as above |
/// | stress | `stress`, `REF_stress`, `dft_stress`, then as virials: `virial`, `virials`, `REF_virial`, `REF_virials`, `dft_virial`, `dft_virials` | as above |
///
/// A name that is given here is the only one of its quantity, and its family is preferred for the others. Where names of several
/// families are used, [`Labels::remarks`] says so.
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
    /// Number of frames in which it is no label: not finite, of another type or width, or a virial without a volume.
    pub unfit: usize,
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
    /// How often a frame had a name beyond those that are kept.
    unlisted: usize,
}

impl Labels {
    /// Number of frames that have this quantity in their fields. A stress that was a virial in the file is counted as
    /// [`Quantity::Virial`], so frames with a stress are those of both.
    pub fn used(&self, quantity: Quantity) -> usize {
        self.of(quantity).map(|label| label.used).sum()
    }

    /// The names found for a quantity.
    pub fn of(&self, quantity: Quantity) -> impl Iterator<Item = &Label> {
        self.found.iter().filter(move |label| label.quantity == quantity)
    }

    /// The names of `keys` under which no frame had a label, with what they were to be.
    pub fn missing<'a>(&'a self, keys: &'a Keys) -> impl Iterator<Item = (Quantity, &'a str)> {
        let asked = [
            (Quantity::Energy, &keys.energy),
            (Quantity::Forces, &keys.forces),
            (Quantity::Stress, &keys.stress),
        ];
        let names = asked.into_iter().filter_map(|(quantity, name)| Some((quantity, name.as_deref()?)));
        names.filter(|(_, name)| !self.found.iter().any(|l| l.name == *name && l.used > 0))
    }

    /// What was odd in the file, and how it was read. Each kind of oddity has one sentence, with the place where it came first.
    pub fn remarks(&self) -> impl Iterator<Item = String> + '_ {
        let found = self.odd.values().map(|(text, count)| match count {
            1 => text.clone(),
            n => format!("{text} ({n} times in all)"),
        });
        let more = (self.unlisted > 0).then(|| {
            format!(
                "names beyond the first {MOST} are not listed; frames had such names {} times",
                self.unlisted
            )
        });
        found.chain(self.several()).chain(more)
    }

    /// Quantities that have names of several families, whose numbers may not be those of one computation.
    fn several(&self) -> Vec<String> {
        let mut all = Vec::new();
        for (what, of) in [
            ("energies", &[Quantity::Energy][..]),
            ("forces", &[Quantity::Forces]),
            ("stresses", &[Quantity::Stress, Quantity::Virial]),
        ] {
            let used: Vec<&Label> =
                self.found.iter().filter(|l| l.used > 0 && of.contains(&l.quantity)).collect();
            let kinds: BTreeSet<String> = used
                .iter()
                .map(|l| match l.quantity {
                    // Energies of one family differ too: with and without electronic entropy or kinetic energy.
                    Quantity::Energy => l.name.to_ascii_lowercase(),
                    _ => family(&l.name).unwrap_or_else(|| l.name.clone()),
                })
                .collect();
            if kinds.len() > 1 {
                let each: Vec<String> = used.iter().map(|l| format!("`{}` in {}", l.name, l.used)).collect();
                all.push(format!(
                    "the {what} are from several names, which may stand for different computations: {}; name one to take it alone",
                    each.join(", ")
                ));
            }
        }
        all
    }

    /// Returns one line about a quantity: which names are used in how many frames, and which are not.
    pub fn line(&self, quantity: Quantity) -> String {
        let one = |label: &Label| {
            let Label { name, frames, used, unfit, .. } = label;
            let unfit = if *unfit > 0 { format!(", unfit in {unfit}") } else { String::new() };
            match (*used, *frames) {
                (0, n) => format!("`{name}` found in {n} and not used{unfit}"),
                (used, n) if used == n => format!("`{name}` used in {used} of {}", self.frames),
                (used, n) => format!("`{name}` used in {used} of {}, found in {n}{unfit}", self.frames),
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

    /// Counts a frame with a name that is used, is not used, or is unfit.
    pub(super) fn count(&mut self, quantity: Quantity, name: &str, used: bool, unfit: bool) {
        let known = self.found.iter().position(|l| l.quantity == quantity && l.name == name);
        if known.is_none() && self.found.len() >= MOST && !used {
            self.unlisted += 1;
            return;
        }
        let at = known.unwrap_or_else(|| {
            self.found.push(Label { quantity, name: name.into(), frames: 0, used: 0, unfit: 0 });
            self.found.len() - 1
        });
        self.found[at].frames += 1;
        self.found[at].used += usize::from(used);
        self.found[at].unfit += usize::from(unfit);
    }

    /// Takes back that a frame's forces are used, which are found to be unfit only as they are read.
    pub(super) fn spoilt(&mut self, name: &str) {
        let known = self.found.iter_mut().find(|l| l.quantity == Quantity::Forces && l.name == name);
        if let Some(label) = known {
            label.used = label.used.saturating_sub(1);
            label.unfit += 1;
        }
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

/// The computation that a label is from, by what precedes the quantity in its name: nothing in `energy`, `ref` in `REF_energy`. `None` if
/// the name does not end with a quantity.
pub(super) fn family(name: &str) -> Option<String> {
    let lower = name.to_ascii_lowercase();
    let ends = ["energy", "forces", "force", "stress", "virials", "virial"];
    let before = ends.into_iter().find_map(|end| lower.strip_suffix(end))?;
    let before = before.trim_end_matches(['_', '-']);
    // These are energies of the same computation.
    Some(if ["free", "potential", "total"].contains(&before) { "" } else { before }.to_string())
}
