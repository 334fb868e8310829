//! Systems of charged particles by the published procedure, simulated in f64 and stored in a file.

use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use tiebeam::geometry::nbody::Nbody;
use tiebeam::store::{Entry, File, save};
use tiebeam::{Error, Result, Rng};

/// Particles per system.
pub const PARTICLES: usize = 5;
const WIDTH: usize = 3 * PARTICLES;
/// The input is the state after this many steps of 0.001. The target is the positions [`AHEAD`] steps later.
const START: usize = 3100;
pub const AHEAD: usize = 1000;
/// Validation and test systems.
const HELD_OUT: usize = 2000;
/// Random streams per system.
const STREAMS: u64 = 3;

/// Systems with positions relative to their centres of mass, row-major.
#[derive(Clone, Default)]
pub struct Split {
    /// Index of the first system under the seed.
    pub first: u64,
    pub seed: u64,
    pub charge: Vec<f32>,
    pub position: Vec<f32>,
    pub velocity: Vec<f32>,
    pub target: Vec<f32>,
}

pub struct Data {
    pub train: Split,
    pub validation: Split,
    pub test: Split,
}

/// Creates system `index` in its initial state. It does not depend on the other systems.
fn system(seed: u64, index: u64) -> Nbody {
    Nbody::random(PARTICLES, &mut Rng::from_state([seed, STREAMS * index]))
}

impl Split {
    pub fn len(&self) -> usize {
        self.charge.len() / PARTICLES
    }

    /// Mean squared error over systems, particles and coordinates.
    pub fn error(&self, predicted: &[f32]) -> f64 {
        let square = |(&a, &b): (&f32, &f32)| (a as f64 - b as f64).powi(2);
        self.target.iter().zip(predicted).map(square).sum::<f64>() / self.target.len() as f64
    }

    /// The error of the prediction `x + a v`.
    pub fn error_along(&self, a: f64) -> f64 {
        let moved = |(&x, &v): (&f32, &f32)| (x as f64 + a * v as f64) as f32;
        self.error(&self.position.iter().zip(&self.velocity).map(moved).collect::<Vec<_>>())
    }

    /// The `a` with the smallest error of `x + a v`.
    pub fn best_slope(&self) -> f64 {
        let dot = |a: &dyn Fn(usize) -> f64| (0..self.velocity.len()).map(a).sum::<f64>();
        let v = |i: usize| self.velocity[i] as f64;
        dot(&|i| v(i) * (self.target[i] as f64 - self.position[i] as f64)) / dot(&|i| v(i) * v(i))
    }

    /// Simulates the true path of a system from input to target and returns the positions at every `every`th step, relative to
    /// the input's centre of mass.
    pub fn path(&self, system_index: usize, every: usize) -> Vec<Vec<[f64; 3]>> {
        let mut system = system(self.seed, self.first + system_index as u64);
        system.advance(START);
        let centre = centre(&system);
        let mut frames = Vec::new();
        for _ in 0..=AHEAD / every {
            let about = |x: &[f64; 3]| std::array::from_fn(|k| x[k] - centre[k]);
            frames.push(system.position.iter().map(about).collect());
            system.advance(every);
        }
        frames
    }
}

fn centre(system: &Nbody) -> [f64; 3] {
    let n = system.position.len() as f64;
    std::array::from_fn(|k| system.position.iter().map(|x| x[k]).sum::<f64>() / n)
}

/// Simulates one system and returns its charge, position, velocity and target.
fn simulate(seed: u64, index: u64) -> [Vec<f32>; 4] {
    let mut system = system(seed, index);
    system.advance(START);
    let centre = centre(&system);
    let flat = |x: &[[f64; 3]], c: [f64; 3]| -> Vec<f32> {
        x.iter().flat_map(|x| (0..3).map(move |k| (x[k] - c[k]) as f32)).collect()
    };
    let (position, velocity) = (flat(&system.position, centre), flat(&system.recorded_velocity(), [0.0; 3]));
    system.advance(AHEAD);
    let charge = system.charge.iter().map(|&q| q as f32).collect();
    [charge, position, velocity, flat(&system.position, centre)]
}

#[cfg(test)]
impl Data {
    /// The same so many systems in every part.
    pub fn few(count: u64) -> Data {
        let mut all = Split::default();
        for index in 0..count {
            let [charge, position, velocity, target] = simulate(1, index);
            all.charge.extend(charge);
            all.position.extend(position);
            all.velocity.extend(velocity);
            all.target.extend(target);
        }
        Data { train: all.clone(), validation: all.clone(), test: all }
    }
}

/// Reads the data from `path`, or creates them there: `systems` for training, 2000 for validation and 2000 for the test.
pub fn load(path: &Path, systems: usize, seed: u64) -> Result<Data> {
    let all = if path.exists() { read(path, systems, seed)? } else { make(path, systems, seed)? };
    let part = |range: std::ops::Range<usize>| Split {
        first: range.start as u64,
        seed,
        charge: all.charge[range.start * PARTICLES..range.end * PARTICLES].to_vec(),
        position: all.position[range.start * WIDTH..range.end * WIDTH].to_vec(),
        velocity: all.velocity[range.start * WIDTH..range.end * WIDTH].to_vec(),
        target: all.target[range.start * WIDTH..range.end * WIDTH].to_vec(),
    };
    let ends = [HELD_OUT, 2 * HELD_OUT];
    Ok(Data {
        test: part(0..ends[0]),
        validation: part(ends[0]..ends[1]),
        train: part(ends[1]..ends[1] + systems),
    })
}

fn settings(systems: usize, seed: u64) -> BTreeMap<String, String> {
    [("systems", systems as u64), ("seed", seed), ("start", START as u64), ("ahead", AHEAD as u64)]
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .into()
}

fn read(path: &Path, systems: usize, seed: u64) -> Result<Split> {
    let file = File::open(path)?;
    if *file.metadata() != settings(systems, seed) {
        return Err(Error::format(path, "data of other settings; remove it or choose another --out"));
    }
    let count = systems + 2 * HELD_OUT;
    let take = |name: &str, width: usize| {
        file.expect(name, &[count, width])?;
        file.tensor_f32(name)
    };
    Ok(Split {
        charge: take("charge", PARTICLES)?,
        position: take("position", WIDTH)?,
        velocity: take("velocity", WIDTH)?,
        target: take("target", WIDTH)?,
        ..Split::default()
    })
}

fn make(path: &Path, systems: usize, seed: u64) -> Result<Split> {
    let count = systems + 2 * HELD_OUT;
    let bar = ProgressBar::new(count as u64);
    bar.set_style(
        ProgressStyle::with_template("{bar:32} {pos}/{len} systems simulated, ETA {eta}").expect("valid"),
    );
    let next = AtomicUsize::new(0);
    let work = || {
        let mut made = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return made;
            }
            made.push((index, simulate(seed, index as u64)));
            bar.inc(1);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut made: Vec<(usize, [Vec<f32>; 4])> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|w| w.join().expect("a simulation does not panic")).collect()
    });
    bar.finish_and_clear();
    made.sort_by_key(|(index, _)| *index);
    let [charge, position, velocity, target] = std::array::from_fn(|part| {
        made.iter().flat_map(|(_, system)| system[part].iter().copied()).collect::<Vec<f32>>()
    });
    let entries = [
        Entry::f32("charge", &[count, PARTICLES], &charge),
        Entry::f32("position", &[count, WIDTH], &position),
        Entry::f32("velocity", &[count, WIDTH], &velocity),
        Entry::f32("target", &[count, WIDTH], &target),
    ];
    save(path, entries, &settings(systems, seed))?;
    Ok(Split { charge, position, velocity, target, ..Split::default() })
}
