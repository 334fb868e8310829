//! Charged particles in free space: the simulation behind the N-body benchmark, in f64 on the host.

use crate::geometry::space::vectors::{DVec3, Vec3};
use crate::rng::Rng;

/// One system of charged particles.
///
/// `F_i = sum_j q_i q_j (x_i - x_j) / |x_i - x_j|^3`, each component clipped to `+-clip`. A leapfrog step is `x += dt v`,
/// then `v += dt F(x)`, after one `v += dt F(x)` at the start.
/// Source: Kipf et al. 2018, "Neural Relational Inference"; Satorras et al. 2021, "E(n) Equivariant Graph Neural Networks".
#[derive(Clone, Debug, PartialEq)]
pub struct Nbody {
    /// Charges.
    pub charge: Vec<f64>,
    /// Positions.
    pub position: Vec<Vec3>,
    /// Velocities.
    pub velocity: Vec<Vec3>,
    /// Time of one step.
    pub dt: f64,
    /// Largest component of a force.
    pub clip: f64,
    started: bool,
}

impl Nbody {
    /// Makes a system that has not advanced yet, with `dt` 0.001 and `clip` 100.
    ///
    /// # Panics
    /// When the three lists differ in length.
    #[track_caller]
    pub fn new(charge: Vec<f64>, position: Vec<Vec3>, velocity: Vec<Vec3>) -> Nbody {
        let n = charge.len();
        assert!(
            position.len() == n && velocity.len() == n,
            "Nbody: {n} charges, {} positions, {} velocities",
            position.len(),
            velocity.len()
        );
        Nbody { charge, position, velocity, dt: 0.001, clip: 100.0, started: false }
    }

    /// The benchmark's initial state: charges +-1, normal positions times `(n/5)^(1/3)`, velocities of length 0.5 in
    /// uniform directions, and one reflection into the box `|x| <= 5`.
    pub fn random(particles: usize, rng: &mut Rng) -> Nbody {
        let mut signs = vec![0.0f32; particles];
        let [mut x, mut v] = [vec![0.0f32; 3 * particles], vec![0.0f32; 3 * particles]];
        rng.fill_uniform(&mut signs);
        rng.fill_normal(&mut x);
        rng.fill_normal(&mut v);
        let spread = (particles as f64 / 5.0).cbrt();
        let mut position: Vec<Vec3> = triples(&x).map(|p| p.map(|x| x * spread)).collect();
        let mut velocity: Vec<Vec3> = triples(&v)
            .map(|v| {
                let v = DVec3::from(v);
                (0.5 * v / v.length().max(1e-12)).into()
            })
            .collect();
        for (x, v) in position.iter_mut().flatten().zip(velocity.iter_mut().flatten()) {
            if x.abs() > 5.0 {
                *v = -v.abs() * x.signum();
                *x = (10.0 - x.abs()) * x.signum();
            }
        }
        let charge = signs.iter().map(|&u| if u < 0.5 { -1.0 } else { 1.0 }).collect();
        Nbody::new(charge, position, velocity)
    }

    /// Advances by `steps` updates of the positions.
    pub fn advance(&mut self, steps: usize) {
        if !std::mem::replace(&mut self.started, true) {
            self.kick();
        }
        for _ in 0..steps {
            for (x, v) in self.position.iter_mut().flatten().zip(self.velocity.iter().flatten()) {
                *x += self.dt * v;
            }
            self.kick();
        }
    }

    /// Returns the velocities right after the last update of the positions, before the forces there act. The benchmark
    /// records these.
    pub fn recorded_velocity(&self) -> Vec<Vec3> {
        if !self.started {
            return self.velocity.clone();
        }
        let back = |(v, f): (&Vec3, Vec3)| (DVec3::from(*v) - self.dt * DVec3::from(f)).into();
        self.velocity.iter().zip(self.forces()).map(back).collect()
    }

    fn kick(&mut self) {
        let forces = self.forces();
        for (v, f) in self.velocity.iter_mut().flatten().zip(forces.iter().flatten()) {
            *v += self.dt * f;
        }
    }

    /// Returns the clipped forces at the present positions.
    pub fn forces(&self) -> Vec<Vec3> {
        let n = self.position.len();
        let one = |i: usize| {
            let mut f = DVec3::ZERO;
            for j in (0..n).filter(|&j| j != i) {
                let d = DVec3::from(self.position[i]) - DVec3::from(self.position[j]);
                let square = d.length_squared();
                // Two particles in the same place exert no force on each other.
                let scale =
                    if square > 0.0 { self.charge[i] * self.charge[j] / square.powf(1.5) } else { 0.0 };
                f += scale * d;
            }
            f.to_array().map(|x| x.clamp(-self.clip, self.clip))
        };
        (0..n).map(one).collect()
    }
}

fn triples(flat: &[f32]) -> impl Iterator<Item = [f64; 3]> {
    flat.chunks_exact(3).map(|c| [c[0] as f64, c[1] as f64, c[2] as f64])
}
