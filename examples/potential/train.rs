//! Training on energies and forces, with a checkpoint per epoch.

use crate::Args;
use crate::chart::{self, Frame as Axes, Line};
use crate::precision;
use crate::state::State;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tiebeam::geometry::vectors::{self, DMat3, Vec3, orthogonal};
use tiebeam::geometry::xyz::Frame;
use tiebeam::geometry::{Calculator, Ponita, Potential};
use tiebeam::gpu::AdapterSummary;
use tiebeam::gpu::readback::Reading;
use tiebeam::nn::Parameters;
use tiebeam::optim::{AdamW, AdamWConfig, Group, LossScale, Schedule};
use tiebeam::{Error, Result, Rng, autocast};

/// The numbers of an epoch: training and validation MAE of energies (meV) and of force components (meV per angstrom), seconds.
pub type Epoch = [f64; 5];

/// Trains to the last epoch. `None` if Ctrl-C stopped it before.
pub fn train(
    args: &Args,
    potential: &mut Potential,
    training: &[Frame],
    validation: &[Frame],
    stop: &AtomicBool,
) -> Result<Option<Vec<Epoch>>> {
    let gpu = potential.net.embed.gpu().clone();
    let parameters = Parameters::of(&potential.net);
    let group = Group::new(parameters.named().iter().map(|(name, p)| (name.clone(), p)));
    let optimizer = AdamW::new(&gpu, vec![group], AdamWConfig::default().clip(Some(10.0)))?;
    let rng = Rng::new(args.seed ^ 0xba7c4);
    let scale = LossScale::of(&gpu, args.scope.precision)?;
    let mut state = State { optimizer, scale, rng, curve: Vec::new(), settings: settings(args, training) };
    let path = args.out.join("checkpoint.safetensors");
    if args.resume && path.exists() {
        state.load(&path, &potential.net)?;
    }
    println!("parameters {}", parameters.stored());
    let per_epoch = training.len().div_ceil(args.batch as usize);
    let total = (args.epochs as usize * per_epoch) as u64;
    let schedule = Schedule::WarmupCosine { warmup: per_epoch as u64 / 2, total, floor: 0.0 };
    let bar = ProgressBar::new(total);
    bar.set_style(ProgressStyle::with_template("{bar:32} {pos}/{len} {msg} ETA {eta}").expect("valid"));
    bar.set_position((state.curve.len() * per_epoch) as u64);
    bar.reset_eta();
    while state.curve.len() < args.epochs as usize {
        let started = Instant::now();
        let mut order: Vec<usize> = (0..training.len()).collect();
        state.rng.shuffle(&mut order);
        let (mut errors, mut late) = (Errors::default(), None);
        for chosen in order.chunks(args.batch as usize) {
            if stop.load(Ordering::SeqCst) {
                bar.finish_and_clear();
                return Ok(None);
            }
            let turn = |&i: &usize| match args.as_given {
                true => training[i].clone(),
                false => turned(&training[i], &orthogonal(&mut state.rng)),
            };
            let frames: Vec<Frame> = chosen.iter().map(turn).collect();
            let lr = schedule.lr(args.lr, bar.position());
            let batch = potential.batch(&frames.iter().collect::<Vec<_>>())?;
            let loss = autocast(args.scope.precision, || {
                potential.loss(&batch, args.energy_weight, Ponita::FORCE_STEP)
            })?;
            state.optimizer.step(&state.scale.backward(&loss.objective)?, lr)?;
            // Errors are read one step late, so the device never waits for the host.
            let readings = [loss.energy_errors.read::<f32>()?, loss.force_errors.read::<f32>()?];
            if let Some((readings, watch)) = late.replace((readings, state.optimizer.watch()?)) {
                precision::report(&bar, "event", watch)?;
                errors.add(readings)?;
            }
            bar.inc(1);
        }
        if let Some((readings, watch)) = late {
            precision::report(&bar, "event", watch)?;
            errors.add(readings)?;
        }
        let [energy, force] = errors.mean(1e3 * potential.scale);
        let [held_energy, held_force] = score(potential, validation)?;
        let epoch = [energy, force, held_energy, held_force, started.elapsed().as_secs_f64()];
        state.curve.push(epoch);
        bar.suspend(|| note(&state.curve));
        state.save(&path, &potential.net)?;
    }
    bar.finish_and_clear();
    Ok(Some(state.curve))
}

/// Rotates or mirrors a frame. Its energy stays the same, and its forces are transformed too.
fn turned(frame: &Frame, matrix: &DMat3) -> Frame {
    let all = |list: &[Vec3]| vectors::turned(matrix, list);
    Frame {
        species: frame.species.clone(),
        positions: all(&frame.positions),
        forces: frame.forces.as_deref().map(all),
        cell: frame.cell.map(|cell| cell.turned(matrix)),
        energy: frame.energy,
        ..Frame::default()
    }
}

fn note(curve: &[Epoch]) {
    if let Some([energy, force, held_energy, held_force, seconds]) = curve.last() {
        println!(
            "epoch {:4}  MAE of energies {energy:.1}, held out {held_energy:.1} meV; of forces {force:.1}, held out \
             {held_force:.1} meV/A; {seconds:.1} s",
            curve.len()
        );
    }
}

/// Sums of absolute errors of energies and of force components.
#[derive(Default)]
struct Errors([(f64, usize); 2]);

impl Errors {
    /// Adds a step's errors. NaN or infinity ends the run before a bad checkpoint is saved.
    fn add(&mut self, readings: [Reading; 2]) -> Result<()> {
        for ((sum, count), reading) in self.0.iter_mut().zip(readings) {
            let bytes = reading.wait()?;
            for x in bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned::<f32>) {
                *sum += x.abs() as f64;
                *count += 1;
            }
        }
        if self.0.iter().any(|e| !e.0.is_finite()) {
            return Err(Error::config(
                "an error is not finite; go on with --resume, or start with a smaller --lr",
            ));
        }
        Ok(())
    }

    fn mean(&self, unit: f64) -> [f64; 2] {
        self.0.map(|(sum, count)| unit * sum / count.max(1) as f64)
    }
}

/// Computes the MAE of energies in meV and of force components in meV per angstrom.
fn score(potential: &Potential, frames: &[Frame]) -> Result<[f64; 2]> {
    let calculator = Calculator::new(potential.clone());
    let (mut energy, mut force, mut count) = (0.0, 0.0, 0);
    for frame in frames {
        let found = calculator.energy_forces(&frame.positions, &frame.species, frame.cell)?;
        energy += (found.energy - frame.energy.unwrap_or(f64::NAN)).abs();
        let wanted = frame.forces.iter().flatten().flatten();
        for (f, w) in found.forces.iter().flatten().zip(wanted) {
            force += (f - w).abs();
            count += 1;
        }
    }
    Ok([1e3 * energy / frames.len() as f64, 1e3 * force / count.max(1) as f64])
}

fn settings(args: &Args, training: &[Frame]) -> String {
    let Args {
        epochs, batch, channels, layers, orientations, radius, lr, energy_weight, as_given, seed, ..
    } = args;
    // An FNV-1a hash of the frames, because a run must not continue with other frames.
    let numbers = training.iter().flat_map(|f| f.positions.iter().flatten().chain(f.energy.iter()));
    let bits = numbers.fold(0xcbf29ce484222325u64, |h, x| (h ^ x.to_bits()).wrapping_mul(0x100000001b3));
    format!(
        "frames {} ({bits:016x}) epochs {epochs} batch {batch} channels {channels} layers {layers} orientations {orientations} radius \
         {radius:?} lr {lr} energy weight {energy_weight} as given {as_given} seed {seed} precision {}",
        training.len(),
        args.scope.precision
    )
}

/// Draws the errors by epoch.
pub fn draw(path: &Path, curve: &[Epoch], adapter: &AdapterSummary) -> Result<()> {
    let line = |name: &str, unit: &str, column: usize| {
        let points: Vec<_> = curve.iter().enumerate().map(|(i, e)| (i as f64 + 1.0, e[column])).collect();
        Line::new(format!("{name}: {:.1} {unit}", points.last().map_or(f64::NAN, |p| p.1)), points)
    };
    let lines = [
        line("forces, held out", "meV/A", 3),
        line("energies, held out", "meV", 2),
        line("forces, training", "meV/A", 1),
        line("energies, training", "meV", 0),
    ];
    let title = format!("Mean absolute errors of the potential ({})", adapter.name);
    let axes = Axes { title: &title, x: "epoch", y: "meV and meV per angstrom", logarithmic: true };
    chart::lines(path, &axes, &lines)
}
