//! Training on energies and forces, with a checkpoint per epoch.

use crate::Args;
use crate::{state, terminal};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tiebeam::chart::{self, Frame as Axes, Line};
use tiebeam::geometry::vectors::{self, DMat3, Vec3, orthogonal};
use tiebeam::geometry::xyz::Frame;
use tiebeam::geometry::{Calculator, Ponita, Potential};
use tiebeam::gpu::AdapterSummary;
use tiebeam::nn::Parameters;
use tiebeam::optim::{AdamW, AdamWConfig, Group, LossScale, Schedule};
use tiebeam::train::Trainer;
use tiebeam::{Error, Result, Rng, autocast};

/// The numbers of an epoch: training and validation MAE of energies (meV) and of force components (meV per angstrom), seconds.
pub type Epoch = [f64; 5];

/// Trains to the last epoch. `None` if Ctrl-C stopped it before.
pub fn train(
    args: &Args,
    potential: &Potential,
    training: &[Frame],
    validation: &[Frame],
    stop: &Arc<AtomicBool>,
) -> Result<Option<Vec<Epoch>>> {
    let gpu = potential.net.embed.gpu().clone();
    let parameters = Parameters::of(&potential.net);
    let group = Group::new(parameters.trainable());
    let optimizer = AdamW::new(&gpu, vec![group], AdamWConfig::default().lr(args.lr).clip(Some(10.0)))?;
    let (epochs, size) = (args.epochs as usize, args.batch as usize);
    let per_epoch = training.len().div_ceil(size);
    let total = (epochs * per_epoch) as u64;
    let mut trainer = Trainer::new(optimizer)
        .schedule(Schedule::WarmupCosine { warmup: per_epoch as u64 / 2, total, floor: 0.0 })
        .scale(LossScale::of(&gpu, args.scope.precision)?)
        .rng(Rng::new(args.seed ^ 0xba7c4))
        .total(total)
        .stop(stop.clone());
    let (path, settings) = (args.out.join("checkpoint.safetensors"), settings(args, training, validation));
    let mut curve: Vec<Epoch> = Vec::new();
    if args.resume && path.exists() {
        curve = state::resume(&path, &mut trainer, &potential.net, &settings)?;
    }
    println!("parameters {}", parameters.stored());
    let bar = terminal::bar(terminal::TRAINING, (curve.len() * per_epoch) as u64, total);
    while curve.len() < epochs {
        let started = Instant::now();
        let (mut order, mut errors): (Vec<usize>, _) = ((0..training.len()).collect(), Errors::default());
        let loss = |step: u64, rng: &mut Rng| {
            let i = step as usize % per_epoch;
            if i == 0 {
                rng.shuffle(&mut order);
            }
            let turn = |&i: &usize| match args.as_given {
                true => training[i].clone(),
                false => turned(&training[i], &orthogonal(rng)),
            };
            let chosen = &order[i * size..order.len().min((i + 1) * size)];
            let frames: Vec<Frame> = chosen.iter().map(turn).collect();
            let batch = potential.batch(&frames.iter().collect::<Vec<_>>())?;
            let loss = autocast(args.scope.precision, || {
                potential.loss(&batch, args.energy_weight, Ponita::FORCE_STEP)
            })?;
            Ok((loss.objective, vec![loss.energy_errors, loss.force_errors]))
        };
        let done = trainer.train(((curve.len() + 1) * per_epoch) as u64, loss, |report| {
            terminal::events(&bar, "event", report);
            bar.set_position(report.step);
            errors.add(&report.values)
        })?;
        if !done {
            bar.finish_and_clear();
            return Ok(None);
        }
        let [energy, force] = errors.mean(1e3 * potential.scale);
        let [held_energy, held_force] = score(potential, validation)?;
        curve.push([energy, force, held_energy, held_force, started.elapsed().as_secs_f64()]);
        bar.suspend(|| note(&curve));
        trainer.save_with(&path, &potential.net, &state::metadata(&settings, &curve))?;
    }
    bar.finish_and_clear();
    Ok(Some(curve))
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
    fn add(&mut self, values: &[Vec<f32>]) -> Result<()> {
        for ((sum, count), values) in self.0.iter_mut().zip(values) {
            for x in values {
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

fn settings(args: &Args, training: &[Frame], validation: &[Frame]) -> String {
    let Args {
        epochs, batch, channels, layers, orientations, radius, lr, energy_weight, as_given, seed, ..
    } = args;
    // Errors on other frames that are held out would not belong to the same curve.
    let [bits, held] = [training, validation].map(fingerprint);
    format!(
        "frames {} ({bits:016x}) held out {} ({held:016x}) epochs {epochs} batch {batch} channels {channels} layers {layers} orientations {orientations} radius \
         {radius:?} lr {lr} energy weight {energy_weight} as given {as_given} seed {seed} precision {}",
        training.len(),
        validation.len(),
        args.scope.precision
    )
}

/// Returns an FNV-1a hash of all that training takes from frames, because a run must not continue with others: atoms, species, cells,
/// energies and forces, each with its length. It goes byte by byte, as the multiplication carries bits upwards only: the sign bit
/// of a whole word would stay where it is, and two changed signs would cancel.
pub fn fingerprint(frames: &[Frame]) -> u64 {
    let mut hash = 0xcbf29ce484222325u64;
    let mut add = |x: u64| {
        for byte in x.to_le_bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100000001b3);
        }
    };
    add(frames.len() as u64);
    for frame in frames {
        let Frame { species, positions, cell, energy, forces, .. } = frame;
        add(species.len() as u64);
        species.iter().for_each(|&z| add(z.into()));
        let forces = forces.iter().flatten().flatten();
        let vectors = cell.iter().flat_map(|cell| cell.vectors.as_flattened());
        let periodic = cell.iter().flat_map(|cell| cell.periodic.map(u64::from));
        // What may be absent is counted, so that numbers cannot move from one list to the next.
        let there = [cell.is_some(), energy.is_some(), frame.forces.is_some()].map(u64::from);
        there.into_iter().chain(periodic).for_each(&mut add);
        let numbers = positions.iter().flatten().chain(vectors).chain(energy).chain(forces);
        numbers.for_each(|x| add(x.to_bits()));
    }
    hash
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
