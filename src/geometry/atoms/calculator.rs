//! Energies, forces and stress of atoms from a trained potential, for simulations.

use super::potential::{Atoms, Potential};
use super::xyz::Frame;
use crate::error::{Error, Result};
use crate::geometry::space::neighbours::Cell;
use crate::geometry::space::vectors::{DMat3, DVec3, Mat3, Vec3, rotation, turned};
use crate::gpu::Gpu;
use crate::rng::Rng;
use std::path::Path;

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
}

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
}

impl Calculator {
    /// Makes a calculator of this potential.
    pub fn new(potential: Potential) -> Calculator {
        Calculator { potential, rotations: 1 }
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
        let found = self.averaged(positions, species, cell);
        if found.is_err() {
            // A system that is too large or not finite leaves a fault on the device. The weights have not changed, so the fault
            // is cleared for the next system.
            self.potential.net.embed.gpu().take_fault();
        }
        found
    }

    fn averaged(&self, positions: &[Vec3], species: &[u8], cell: Option<Cell>) -> Result<Properties> {
        let mut mean = self.evaluated(positions, species, cell)?;
        let mut rng = Rng::new(SEED);
        for _ in 1..self.rotations {
            let r = rotation(&mut rng);
            let cell = cell.map(|cell| cell.turned(&r));
            mean.add(&self.evaluated(&turned(&r, positions), species, cell)?, &r);
        }
        mean.scale(1.0 / self.rotations as f64);
        Ok(mean)
    }

    fn evaluated(&self, positions: &[Vec3], species: &[u8], cell: Option<Cell>) -> Result<Properties> {
        if positions.is_empty() && species.is_empty() {
            let stress = cell.filter(|cell| cell.periodic == [true; 3]).map(|_| [[0.0; 3]; 3]);
            return Ok(Properties { stress, ..Properties::default() });
        }
        let Potential { net, scale, .. } = &self.potential;
        let volume = cell
            .filter(|cell| cell.periodic == [true; 3])
            .map(|cell| DMat3::from_cols_array_2d(&cell.vectors).determinant().abs());
        let (graph, input) = self.potential.graph(&[Atoms { positions, species, cell }])?;
        let graph = if volume.is_some() { graph.strained() } else { graph };
        let found = net.energy_forces(&graph, &input)?;
        let reference = |z: &u8| self.potential.reference_energy(std::slice::from_ref(z));
        let own =
            species.iter().zip(&found.node_energies).map(|(z, &e)| Ok(reference(z)? + scale * e as f64));
        let atom_energies: Vec<f64> = own.collect::<Result<_>>()?;
        let forces: Vec<Vec3> =
            found.forces.chunks_exact(3).map(|f| std::array::from_fn(|k| scale * f[k] as f64)).collect();
        let energy = self.potential.reference_energy(species)? + scale * found.energies[0];
        if !energy.is_finite() || forces.iter().flatten().any(|f| !f.is_finite()) {
            return Err(Error::config(format!(
                "calculator: the energy is {energy} or a force is not finite; atoms may lie farther apart or nearer than the \
                 potential was trained for"
            )));
        }
        let stress = found.strain.zip(volume).map(|(strain, volume)| {
            let s = |a: usize, b: usize| strain[3 * a + b] as f64;
            std::array::from_fn(|a| std::array::from_fn(|b| scale * 0.5 * (s(a, b) + s(b, a)) / volume))
        });
        Ok(Properties { energy, atom_energies, forces, stress })
    }

    /// Returns `frame` with this potential's energy, forces and stress. Columns and keys of other programs' names for the
    /// same quantities are removed.
    ///
    /// # Errors
    /// As [`Calculator::energy_forces`].
    pub fn predict(&self, frame: &Frame) -> Result<Frame> {
        let found = self.energy_forces(&frame.positions, &frame.species, frame.cell)?;
        Ok(Frame {
            energy: Some(found.energy),
            forces: Some(found.forces),
            stress: found.stress,
            ..frame.without_results()
        })
    }
}

impl Properties {
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
