//! Frames of a copper cluster of 13 atoms under a Morse potential, with exact energies and forces.
//!
//! `E = sum over pairs D ((1 - exp(-a (r - r0)))^2 - 1)`. Source of the constants: Girifalco, Weizer 1959,
//! "Application of the Morse potential function to cubic metals".

use tiebeam::geometry::Grid;
use tiebeam::geometry::dynamics::Verlet;
use tiebeam::geometry::vectors::{DVec3, Vec3};
use tiebeam::geometry::xyz::Frame;
use tiebeam::{Result, Rng};

const DEPTH: f64 = 0.3429;
const WIDTH: f64 = 1.3588;
const LENGTH: f64 = 2.866;
const COPPER: u8 = 29;
/// Number of dynamics runs, and of frames from each.
const RUNS: usize = 10;
const EACH: usize = 35;

/// Computes energy and forces.
pub fn field(x: &[Vec3]) -> (f64, Vec<Vec3>) {
    let (mut energy, mut forces) = (0.0, vec![DVec3::ZERO; x.len()]);
    for i in 0..x.len() {
        for j in 0..i {
            let d = DVec3::from(x[i]) - DVec3::from(x[j]);
            let r = d.length();
            let decay = (-WIDTH * (r - LENGTH)).exp();
            energy += DEPTH * ((1.0 - decay).powi(2) - 1.0);
            let push = -2.0 * DEPTH * WIDTH * (1.0 - decay) * decay / r;
            forces[i] += push * d;
            forces[j] -= push * d;
        }
    }
    (energy, forces.into_iter().map(Vec3::from).collect())
}

/// Returns frames of several runs at constant energy, in random order, so that held-out frames come from all runs. Each run
/// starts from a heated icosahedron. Its frames begin after 400 fs and are 40 fs apart.
pub fn frames(seed: u64) -> Result<Vec<Frame>> {
    let mut rng = Rng::new(seed);
    // The radius of the icosahedron of least energy is a little smaller than the bond length.
    let shell =
        Grid::icosahedron().vectors().iter().map(|v| v.map(|x| 0.95 * LENGTH * x)).collect::<Vec<_>>();
    let start: Vec<Vec3> = [[0.0; 3]].into_iter().chain(shell).collect();
    let species = vec![COPPER; start.len()];
    let mut frames = Vec::new();
    for run in 0..RUNS {
        let mut atoms = Verlet::new(&start, &species, |x| Ok(field(x)))?;
        // About half of this energy becomes potential energy.
        atoms.heat(400.0 + 80.0 * run as f64, &mut rng);
        for taken in 0..EACH {
            let steps = if taken == 0 { 200 } else { 20 };
            for _ in 0..steps {
                atoms.step(2.0, |x| Ok(field(x)))?;
            }
            let (energy, forces) = field(&atoms.positions);
            frames.push(Frame {
                species: species.clone(),
                positions: atoms.positions.clone(),
                energy: Some(energy),
                forces: Some(forces),
                ..Frame::default()
            });
        }
    }
    rng.shuffle(&mut frames);
    Ok(frames)
}
