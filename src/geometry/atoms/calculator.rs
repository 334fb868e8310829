//! Energies, forces and stress of atoms from a trained potential, for simulations.

use super::parts::in_parts;
use super::potential::{Atoms, Joined, ONE_POINT, Potential};
use super::xyz::Frame;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::space::neighbours::Cell;
use crate::geometry::space::vectors::{DMat3, DVec3, Mat3, Vec3, rotation, turned};
use crate::gpu::Gpu;
use crate::rng::Rng;
use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Computes energies, forces and stress of atoms with a potential.
///
/// Energies of atoms are f32, their sum is f64. Forces are the exact gradient of that energy (to f32 rounding): they sum
/// to zero and do no work around a loop. The same input gives the same bits on one adapter. Energies are exactly
/// invariant under translations, permutations and the rotations and reflections that permute the network's grid. Under
/// other rotations they are approximately invariant, so angular momentum is not exactly conserved.
/// [`Calculator::rotations`] reduces this error by averages, which are then exactly invariant under translations and
/// permutations only.
///
/// ```no_run
/// use tiebeam::Gpu;
/// use tiebeam::geometry::{Calculator, Cell};
///
/// let calculator = Calculator::load(&Gpu::open()?, "model.safetensors")?;
/// let positions = [[0.0, 0.0, 0.0], [0.0, 0.0, 2.5]];
/// let result = calculator.energy_forces(&positions, &[29, 29], Some(Cell::cuboid([8.0; 3])))?;
/// println!("{} eV, {:?} eV per angstrom", result.energy, result.forces);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct Calculator {
    potential: Potential,
    rotations: usize,
    most_atoms: Option<usize>,
    stop: Option<Arc<AtomicBool>>,
}

/// Why a call has no results, with the number of the system at fault if it is one system's.
type Fault = (Option<usize>, Error);

/// The seed of the rotations over which results are averaged.
const SEED: u64 = 0x0074_7572_6e73;

/// The results of a calculator, in the units of its potential: eV and angstrom.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Properties {
    /// The total energy.
    pub energy: f64,
    /// The energy of each atom.
    pub atom_energies: Vec<f64>,
    /// `F = -dE/dx` of each atom.
    pub forces: Vec<Vec3>,
    /// `1/V dE/dstrain`, symmetric and positive under tension. `None` unless the cell is periodic along all three
    /// vectors.
    pub stress: Option<Mat3>,
    /// The two atoms that are nearest to each other, if any are neighbours.
    pub nearest: Option<Nearest>,
}

impl Properties {
    /// All of it as numbers, in a form of this version, to be sent to another process of it.
    pub fn numbers(&self) -> Vec<f64> {
        let Properties { energy, atom_energies, forces, stress, nearest } = self;
        let mut all = vec![atom_energies.len() as f64, forces.len() as f64, *energy];
        all.extend(atom_energies);
        all.extend(forces.iter().flatten());
        all.push(f64::from(u8::from(stress.is_some())));
        all.extend(stress.iter().flatten().flatten());
        if let Some(Nearest { distance, atoms }) = nearest {
            all.extend([*distance, atoms[0] as f64, atoms[1] as f64]);
        }
        all
    }

    /// What [`Properties::numbers`] returned. `None` if these are no such numbers.
    pub fn of_numbers(numbers: &[f64]) -> Option<Properties> {
        let mut rest = numbers;
        let mut take = |n: usize| {
            let (taken, left) = rest.split_at_checked(n)?;
            rest = left;
            Some(taken)
        };
        let &[atoms, forces, energy] = take(3)? else { return None };
        let atom_energies = take(atoms as usize)?.to_vec();
        let forces = take(3 * forces as usize)?.as_chunks::<3>().0.to_vec();
        let stress = match take(1)? {
            [0.0] => None,
            _ => Some(std::array::from_fn({
                let stress = take(9)?;
                move |row| [0, 1, 2].map(|column| stress[3 * row + column])
            })),
        };
        let nearest = match *rest {
            [] => None,
            [distance, a, b] => Some(Nearest { distance, atoms: [a as usize, b as usize] }),
            _ => return None,
        };
        Some(Properties { energy, atom_energies, forces, stress, nearest })
    }
}

/// Two atoms, or an atom and its own image, that are nearer to each other than all others.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Nearest {
    /// Their distance.
    pub distance: f64,
    /// Their numbers, from 0.
    pub atoms: [usize; 2],
}

impl Nearest {
    /// Whether the atoms are at one point: nearer than 1e-3 angstrom, which no potential can know anything of.
    pub fn is_one_point(&self) -> bool {
        self.distance < ONE_POINT
    }
}

impl Calculator {
    /// Makes a calculator of this potential.
    pub fn new(potential: Potential) -> Calculator {
        Calculator { potential, rotations: 1, most_atoms: None, stop: None }
    }

    /// Averages results over `count` rotations of the atoms and their cell, at `count` times the work:
    /// `E(x) = 1/k sum_i e(R_i x)`, forces `1/k sum_i R_i^T f(R_i x)` and stress `1/k sum_i R_i^T s(R_i x) R_i`, where `k` is
    /// `count`. Forces and stress remain exact derivatives of the energy. `R_1` is the identity. The others are drawn
    /// uniformly and are the same every time. The change of the results when the input is rotated falls as `1/sqrt(k)`. A
    /// new calculator has a count of 1. The authors of PONITA test with 5.
    ///
    /// # Panics
    /// When `count` is 0.
    #[track_caller]
    pub fn rotations(mut self, count: usize) -> Calculator {
        self.set_rotations(count);
        self
    }

    /// Sets [`Calculator::rotations`] of an existing calculator.
    ///
    /// # Panics
    /// When `count` is 0.
    #[track_caller]
    pub fn set_rotations(&mut self, count: usize) {
        assert!(
            count > 0,
            "Calculator::rotations: 0 rotations have no average; 1 takes the atoms as they are given"
        );
        self.rotations = count;
    }

    /// Returns this calculator with a flag that ends its work. It is looked at before every graph, so also between orientations and
    /// between the parts of a large system. Calls then return [`Error::Stopped`], and the calculator can be used again.
    pub fn stop(mut self, flag: Arc<AtomicBool>) -> Calculator {
        self.stop = Some(flag);
        self
    }

    fn unless_stopped(&self) -> Result<()> {
        match self.stop.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            true => Err(Error::stopped("calculator: stopped, without results")),
            false => Ok(()),
        }
    }

    /// Makes a calculator of the potential in a file.
    ///
    /// # Errors
    /// As [`Potential::load`].
    pub fn load(gpu: &Gpu, path: impl AsRef<Path>) -> Result<Calculator> {
        Potential::load(gpu, path).map(Calculator::new)
    }

    /// The potential.
    pub fn potential(&self) -> &Potential {
        &self.potential
    }

    /// Computes energy and forces of atoms at `positions` with atomic numbers `species`, in free space or in a periodic
    /// cell.
    ///
    /// # Errors
    /// As [`Potential::graph`]; when a result is not finite or the device fails.
    pub fn energy_forces(
        &self,
        positions: &[Vec3],
        species: &[u8],
        cell: Option<Cell>,
    ) -> Result<Properties> {
        let found = self.averaged(&[Atoms { positions, species, cell }]).map_err(|(_, error)| error);
        found?.pop().ok_or_else(|| Error::config("calculator: no result"))
    }

    /// Computes energies and forces of several systems. Small ones share a graph, which takes a fraction of the time that they
    /// take one by one.
    ///
    /// The results of a system are those of [`Calculator::energy_forces`] to f32 rounding. The last bits may depend on the systems
    /// beside it, because the device sums in another order in graphs of another size. The same call gives the same bits.
    ///
    /// ```no_run
    /// use tiebeam::Gpu;
    /// use tiebeam::geometry::{Atoms, Calculator, xyz};
    ///
    /// let calculator = Calculator::load(&Gpu::open()?, "model.safetensors")?;
    /// let frames = xyz::read("frames.xyz")?;
    /// let atoms: Vec<Atoms> = frames.iter().map(Atoms::of).collect();
    /// for found in calculator.energies_forces(&atoms)? {
    ///     println!("{} eV", found.energy);
    /// }
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Calculator::energy_forces`] for the first system that has no result. If there are several, the message names its number
    /// from 0 as `frame`.
    pub fn energies_forces(&self, all: &[Atoms]) -> Result<Vec<Properties>> {
        self.energies_forces_at(all).map_err(|(at, error)| match (at, error) {
            (Some(i), Error::Config { message, .. }) if all.len() > 1 => {
                Error::config(format!("frame {i}: {message}"))
            }
            (_, error) => error,
        })
    }

    /// [`Calculator::energies_forces`] with the number of the system at fault beside its error, for callers who count in a larger file.
    /// A lost device and a stop have no such number.
    ///
    /// # Errors
    /// As [`Calculator::energy_forces`] for the first system that has no result.
    pub fn energies_forces_at(
        &self,
        all: &[Atoms],
    ) -> std::result::Result<Vec<Properties>, (Option<usize>, Error)> {
        self.averaged(all)
    }

    /// Evaluates every system in each orientation. Orientations of small systems share graphs, as systems do.
    fn averaged(&self, all: &[Atoms]) -> std::result::Result<Vec<Properties>, Fault> {
        let mut means: Vec<Properties> = Vec::with_capacity(all.len());
        let mut waiting = Waiting::default();
        for (i, &Atoms { positions, species, cell }) in all.iter().enumerate() {
            // Every system has the same rotations. They are drawn when they are needed, as there may be very many.
            let mut rng = Rng::new(SEED);
            let weight = self.weight(species.len());
            let count = if species.is_empty() { 1 } else { self.rotations };
            for k in 0..count {
                let by = (k > 0).then(|| rotation(&mut rng));
                let (positions, cell) = match &by {
                    None => (Cow::Borrowed(positions), cell),
                    Some(r) => (Cow::Owned(turned(r, positions)), cell.map(|cell| cell.turned(r))),
                };
                if waiting.weight + weight > BATCH && !waiting.systems.is_empty() {
                    self.evaluate(&mut waiting, &mut means)?;
                }
                waiting.weight += weight;
                waiting.systems.push(Turned { of: i, positions, species, cell, by });
            }
        }
        self.evaluate(&mut waiting, &mut means)?;
        means.iter_mut().for_each(|mean| mean.scale(1.0 / self.rotations as f64));
        Ok(means)
    }

    /// The share of a system in a graph, in atoms.
    fn weight(&self, atoms: usize) -> usize {
        // Without a radius all pairs of a system are edges, and the work is by edges.
        let pairs =
            if self.potential.net.config.radius.is_none() { atoms.saturating_mul(atoms) / 32 } else { 0 };
        atoms.saturating_add(pairs).max(1)
    }

    /// Computes what waits, and adds it to the means of the systems.
    fn evaluate(&self, waiting: &mut Waiting, means: &mut Vec<Properties>) -> std::result::Result<(), Fault> {
        let Waiting { systems, .. } = std::mem::take(waiting);
        let atoms: Vec<Atoms> = systems
            .iter()
            .map(|s| Atoms { positions: &s.positions, species: s.species, cell: s.cell })
            .collect();
        let mut found = Vec::with_capacity(atoms.len());
        self.halved(&atoms, &mut found).map_err(|(at, error)| (at.map(|at| systems[at].of), error))?;
        for (system, found) in systems.iter().zip(found) {
            match &system.by {
                // The first orientation of a system is its own.
                None => means.push(found),
                Some(r) => means[system.of].add(&found, r),
            }
        }
        Ok(())
    }

    /// Computes systems in one graph. If that fails, one of them is at fault, or all of them together are too much for the device:
    /// halves of them find the first at fault, and need less memory.
    fn halved(&self, all: &[Atoms], found: &mut Vec<Properties>) -> std::result::Result<(), Fault> {
        let first = found.len();
        let error = match self.evaluated(all) {
            Ok(more) => {
                found.extend(more);
                return Ok(());
            }
            Err(error) => error,
        };
        // A system that is too large or not finite leaves a fault on the device. The weights have not changed, so the fault is cleared
        // for the next systems.
        self.potential.net.embed.gpu().take_fault();
        if matches!(error.kind(), ErrorKind::Lost | ErrorKind::Timeout | ErrorKind::Stopped) {
            return Err((None, error));
        }
        if all.len() <= 1 {
            return Err((Some(first), error));
        }
        let (low, high) = all.split_at(all.len() / 2);
        self.halved(low, found)?;
        self.halved(high, found)
    }

    /// Computes systems in one graph. One that is too large for a graph is computed in parts.
    fn evaluated(&self, all: &[Atoms]) -> Result<Vec<Properties>> {
        self.unless_stopped()?;
        let there: Vec<Atoms> =
            all.iter().filter(|of| !(of.positions.is_empty() && of.species.is_empty())).copied().collect();
        let mut found = match there[..] {
            [] => Vec::new(),
            [one] => vec![self.alone(&one)?],
            _ => self.together(&there)?,
        }
        .into_iter();
        let each = |of: &Atoms| match of.positions.is_empty() && of.species.is_empty() {
            true => Ok(Properties { stress: of.volume().map(|_| [[0.0; 3]; 3]), ..Properties::default() }),
            false => found.next().ok_or_else(|| Error::config("calculator: a system has no result")),
        };
        all.iter().map(each).collect()
    }

    fn together(&self, all: &[Atoms]) -> Result<Vec<Properties>> {
        let joined = self.potential.joined(all)?;
        self.whole(&joined, all)
    }

    /// Computes a graph as a whole.
    fn whole(&self, of: &Joined, all: &[Atoms]) -> Result<Vec<Properties>> {
        let graph = match all.iter().any(|of| of.volume().is_some()) {
            false => of.graph.clone(),
            // One strain for all edges is less work, and a system of this size has the graph for itself.
            true if of.graph.nodes() > BATCH && all.len() == 1 => of.graph.strained(),
            true => of.graph.strained_each(),
        };
        let found = self.potential.net.energy_forces(&graph, &of.input)?;
        let shortest = graph.shortest(&of.positions);
        let mut first = 0;
        let each = |(i, of): (usize, &Atoms)| {
            let own = first..first + of.species.len();
            let forces = found.forces[3 * own.start..3 * own.end].iter().map(|&f| f as f64).collect();
            let strain = found.strain.as_ref().map(|all| std::array::from_fn(|k| all[9 * i + k] as f64));
            let nearest = shortest[i].map(|(distance, nodes)| Nearest {
                distance,
                atoms: nodes.map(|node| node as usize - own.start),
            });
            first = own.end;
            let one = Raw { node_energies: &found.node_energies[own], forces, strain, nearest };
            self.properties(of, one)
        };
        all.iter().enumerate().map(each).collect()
    }

    /// Computes one system as a whole, or in parts if it is too large for the memory.
    fn alone(&self, of: &Atoms) -> Result<Properties> {
        let joined = self.potential.joined(std::slice::from_ref(of))?;
        let (atoms, net) = (of.species.len(), &self.potential.net);
        let array = net.grid.len() * net.config.channels * atoms;
        let bytes = NODE * array * net.layers.len().max(1) + EDGE * joined.graph.edges().len();
        // A part takes about twice the memory of its own atoms, because of those around it.
        let mut most = match self.most_atoms {
            Some(most) => most,
            None if bytes <= LARGE => atoms,
            None => (atoms / (2 * bytes.div_ceil(LARGE))).max(LEAST),
        };
        // Without a radius every atom is around every other.
        let splits = net.config.radius.is_some();
        loop {
            let found = match splits && most < atoms {
                true => self.parts(&joined, of, most),
                false => self.whole(&joined, std::slice::from_ref(of)).and_then(|mut all| {
                    all.pop().ok_or_else(|| Error::config("calculator: a system has no result"))
                }),
            };
            match found {
                Err(Error::Limit { .. } | Error::OutOfMemory { .. }) if splits && most.min(atoms) > LEAST => {
                    net.embed.gpu().take_fault();
                    most = (most.min(atoms) / 2).max(LEAST);
                }
                found => return found,
            }
        }
    }

    fn parts(&self, joined: &Joined, of: &Atoms, most: usize) -> Result<Properties> {
        let sums = in_parts(&self.potential, joined, of.species, most, of.volume().is_some(), &|| {
            self.unless_stopped()
        })?;
        let nearest = joined.graph.shortest(&joined.positions)[0]
            .map(|(distance, nodes)| Nearest { distance, atoms: nodes.map(|node| node as usize) });
        let (forces, strain) = (sums.forces, Some(sums.strain));
        self.properties(of, Raw { node_energies: &sums.node_energies, forces, strain, nearest })
    }

    /// Converts a system's results into units of its potential.
    fn properties(&self, of: &Atoms, raw: Raw) -> Result<Properties> {
        let scale = self.potential.scale;
        let reference = |z: &u8| self.potential.reference_energy(std::slice::from_ref(z));
        let own =
            of.species.iter().zip(raw.node_energies).map(|(z, &e)| Ok(reference(z)? + scale * e as f64));
        let atom_energies: Vec<f64> = own.collect::<Result<_>>()?;
        let forces: Vec<Vec3> =
            raw.forces.chunks_exact(3).map(|f| std::array::from_fn(|k| scale * f[k])).collect();
        let sum: f64 = raw.node_energies.iter().map(|&e| e as f64).sum();
        let energy = self.potential.reference_energy(of.species)? + scale * sum;
        if !energy.is_finite() || forces.iter().flatten().any(|f| !f.is_finite()) {
            return Err(Error::config(format!(
                "calculator: the energy is {energy} or a force is not finite; atoms may lie farther apart or nearer than the \
                 potential was trained for"
            )));
        }
        let stress = raw.strain.zip(of.volume()).map(|(strain, volume)| {
            let s = |a: usize, b: usize| strain[3 * a + b];
            std::array::from_fn(|a| std::array::from_fn(|b| scale * 0.5 * (s(a, b) + s(b, a)) / volume))
        });
        Ok(Properties { energy, atom_energies, forces, stress, nearest: raw.nearest })
    }

    /// Computes systems of more than `count` atoms in parts of at most that many, with the atoms around them. Results are those of
    /// the whole to f32 rounding. Smaller parts take less memory and more time, as the atoms around parts are computed more
    /// than once. A new calculator takes the whole where about 1 GiB suffices, else parts, and smaller parts when the device
    /// has no memory for them. A network without a radius has no parts.
    ///
    /// # Panics
    /// When `count` is 0.
    #[track_caller]
    pub fn most_atoms(mut self, count: usize) -> Calculator {
        assert!(count > 0, "Calculator::most_atoms: a part needs an atom");
        self.most_atoms = Some(count);
        self
    }

    /// Returns `frame` with this potential's energy, forces and stress. Columns and keys of other programs' names for the
    /// same quantities are removed.
    ///
    /// # Errors
    /// As [`Calculator::energy_forces`].
    pub fn predict(&self, frame: &Frame) -> Result<Frame> {
        Ok(self.energy_forces(&frame.positions, &frame.species, frame.cell)?.fill(frame))
    }

    /// [`Calculator::predict`] of several frames, as [`Calculator::energies_forces`] computes them.
    ///
    /// # Errors
    /// As [`Calculator::energies_forces`].
    pub fn predict_batch(&self, frames: &[Frame]) -> Result<Vec<Frame>> {
        let atoms: Vec<Atoms> = frames.iter().map(Atoms::of).collect();
        let found = self.energies_forces(&atoms)?;
        Ok(found.into_iter().zip(frames).map(|(found, frame)| found.fill(frame)).collect())
    }
}

/// The most atoms of a graph of several systems. On llvmpipe, 10 000 frames of 4 atoms took 5.3 s by graphs of 64 atoms, 2.9 by 256,
/// and 2.3 to 3.1 by 512 to 4096.
const BATCH: usize = 1024;
/// The memory of a graph that is not cut into parts, in bytes.
const LARGE: usize = 1 << 30;
/// Bytes of device memory for each atom, orientation, channel and layer, and for each edge, with gradients. Measured as the peak of
/// `Gpu::memory_stats` with 10 648 atoms, 292 080 edges, 12 orientations, 8 to 32 channels and 2 to 4 layers.
const NODE: usize = 32;
const EDGE: usize = 256;
/// The smallest part that is tried when memory is short.
const LEAST: usize = 64;

/// A system in one of the orientations over which its results are averaged.
struct Turned<'a> {
    of: usize,
    positions: Cow<'a, [Vec3]>,
    species: &'a [u8],
    cell: Option<Cell>,
    by: Option<DMat3>,
}

/// Systems that wait for others to share their graph.
#[derive(Default)]
struct Waiting<'a> {
    systems: Vec<Turned<'a>>,
    weight: usize,
}

/// The results of one system, in the network's units.
struct Raw<'a> {
    node_energies: &'a [f32],
    forces: Vec<f64>,
    strain: Option<[f64; 9]>,
    nearest: Option<Nearest>,
}

impl Atoms<'_> {
    /// The volume of a cell that is periodic along all three vectors.
    fn volume(&self) -> Option<f64> {
        let cell = self.cell.filter(|cell| cell.periodic == [true; 3])?;
        Some(DMat3::from_cols_array_2d(&cell.vectors).determinant().abs())
    }
}

impl Properties {
    /// Returns a frame with these results in place of its own, see [`Frame::without_results`].
    pub fn fill(self, frame: &Frame) -> Frame {
        let (energy, forces) = (Some(self.energy), Some(self.forces));
        Frame { energy, forces, stress: self.stress, ..frame.without_results() }
    }

    /// Adds the results for atoms that `r` has rotated.
    fn add(&mut self, found: &Properties, r: &DMat3) {
        let back = r.transpose();
        self.energy += found.energy;
        self.atom_energies.iter_mut().zip(&found.atom_energies).for_each(|(sum, e)| *sum += e);
        for (sum, f) in self.forces.iter_mut().zip(&found.forces) {
            *sum = (DVec3::from(*sum) + back * DVec3::from(*f)).into();
        }
        if let Some((sum, stress)) = self.stress.as_mut().zip(found.stress) {
            // R^T s R: R is applied along rows, then along columns. The average with the transpose makes it symmetric to
            // the last bit.
            let s = back * DMat3::from_cols_array_2d(&stress) * *r;
            *sum = (DMat3::from_cols_array_2d(sum) + 0.5 * (s + s.transpose())).to_cols_array_2d();
        }
    }

    fn scale(&mut self, by: f64) {
        self.energy *= by;
        let stress = self.stress.iter_mut().flatten();
        let all = self.atom_energies.iter_mut().chain(self.forces.iter_mut().chain(stress).flatten());
        all.for_each(|x| *x *= by);
    }
}
