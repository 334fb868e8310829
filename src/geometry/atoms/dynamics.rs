//! Molecular dynamics at constant energy, in f64 on the host, with any source of forces.

use super::elements::mass;
use crate::error::{Error, Result};
use crate::geometry::space::vectors::{DVec3, Vec3};
use crate::rng::Rng;

/// Acceleration in angstrom per fs^2 of one dalton under one eV per angstrom.
const ACCELERATION: f64 = 9.648_533_212e-3;
/// Boltzmann's constant in eV per kelvin.
const BOLTZMANN: f64 = 8.617_333_262e-5;

/// Atoms that move by velocity Verlet: `v += dt/2 F/m; x += dt v; F = F(x); v += dt/2 F/m`. The method is reversible in
/// time and preserves phase-space volume, so the energy of a smooth potential stays within a band whose width falls with
/// `dt^2`. Source: Swope, Andersen, Berens, Wilson 1982, "A computer simulation method for the calculation of equilibrium
/// constants".
///
/// Units: angstrom, fs, eV, daltons.
#[derive(Clone, Debug, PartialEq)]
pub struct Verlet {
    /// Positions of the atoms, in angstrom.
    pub positions: Vec<Vec3>,
    /// Velocities, in angstrom per fs.
    pub velocities: Vec<Vec3>,
    /// Masses, in daltons.
    pub masses: Vec<f64>,
    /// The potential energy at these positions.
    pub potential: f64,
    forces: Vec<Vec3>,
}

impl Verlet {
    /// Makes atoms at rest. `field` returns the energy and forces at given positions.
    ///
    /// # Errors
    /// When a species is not an element or lists do not fit each other, and when `field` fails.
    pub fn new(
        positions: &[Vec3],
        species: &[u8],
        field: impl FnOnce(&[Vec3]) -> Result<(f64, Vec<Vec3>)>,
    ) -> Result<Verlet> {
        let unknown =
            |&z: &u8| mass(z).ok_or_else(|| Error::config(format!("dynamics: no element has number {z}")));
        let masses: Vec<f64> = species.iter().map(unknown).collect::<Result<_>>()?;
        let (potential, forces) = field(positions)?;
        let n = positions.len();
        if masses.len() != n || forces.len() != n {
            let (m, f) = (masses.len(), forces.len());
            return Err(Error::config(format!("dynamics: {n} positions, {m} species, {f} forces")));
        }
        Ok(Verlet { positions: positions.to_vec(), velocities: vec![[0.0; 3]; n], masses, potential, forces })
    }

    /// Draws velocities at this temperature in kelvin, and removes the total momentum.
    pub fn heat(&mut self, temperature: f64, rng: &mut Rng) {
        let mut draws = vec![0.0f32; 3 * self.masses.len()];
        rng.fill_normal(&mut draws);
        for ((v, m), z) in self.velocities.iter_mut().zip(&self.masses).zip(draws.chunks_exact(3)) {
            let spread = (BOLTZMANN * temperature * ACCELERATION / m).sqrt();
            *v = std::array::from_fn(|k| spread * z[k] as f64);
        }
        let total: f64 = self.masses.iter().sum();
        if total > 0.0 {
            let momenta = self.velocities.iter().zip(&self.masses).map(|(v, m)| *m * DVec3::from(*v));
            let drift = momenta.sum::<DVec3>() / total;
            self.velocities.iter_mut().for_each(|v| *v = (DVec3::from(*v) - drift).into());
        }
    }

    /// Advances by `dt` fs. If there is an error, nothing changes.
    ///
    /// # Errors
    /// When `field` fails, or an energy or force is not finite.
    pub fn step(&mut self, dt: f64, field: impl FnOnce(&[Vec3]) -> Result<(f64, Vec<Vec3>)>) -> Result<()> {
        let mut velocities = self.velocities.clone();
        self.kick(&mut velocities, &self.forces, 0.5 * dt);
        let moved = |(x, v): (&Vec3, &Vec3)| (DVec3::from(*x) + dt * DVec3::from(*v)).into();
        let positions: Vec<Vec3> = self.positions.iter().zip(&velocities).map(moved).collect();
        let (potential, forces) = field(&positions)?;
        if !potential.is_finite() || forces.iter().flatten().any(|f| !f.is_finite()) {
            return Err(Error::config(format!(
                "dynamics: the energy is {potential}; use a smaller step or a start nearer to what the potential knows"
            )));
        }
        self.kick(&mut velocities, &forces, 0.5 * dt);
        *self = Verlet { positions, velocities, potential, forces, masses: std::mem::take(&mut self.masses) };
        Ok(())
    }

    fn kick(&self, velocities: &mut [Vec3], forces: &[Vec3], dt: f64) {
        for ((v, f), m) in velocities.iter_mut().zip(forces).zip(&self.masses) {
            *v = (DVec3::from(*v) + dt * ACCELERATION * DVec3::from(*f) / *m).into();
        }
    }

    /// Kinetic energy, in eV.
    pub fn kinetic(&self) -> f64 {
        let one = |(v, m): (&Vec3, &f64)| 0.5 * m * DVec3::from(*v).length_squared() / ACCELERATION;
        self.velocities.iter().zip(&self.masses).map(one).sum()
    }

    /// Kinetic and potential energy, in eV.
    pub fn total(&self) -> f64 {
        self.kinetic() + self.potential
    }

    /// Temperature in kelvin. The three degrees of freedom of the total momentum do not count.
    pub fn temperature(&self) -> f64 {
        2.0 * self.kinetic() / (BOLTZMANN * (3 * self.masses.len()).saturating_sub(3).max(1) as f64)
    }
}
