//! `tiebeam predict`: runs a trained potential on the frames of a file, in memory that does not grow with the file.

use crate::context::{Context, is_standard, on_interrupt, summaries, unless_stopped};
use indicatif::ProgressBar;
use serde_json::json;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tiebeam::geometry::xyz::{Frame, Keys, Labels, Quantity, Reader, Writer};
use tiebeam::geometry::{Atoms, Calculator, Nearest, Ponita, Potential, Properties};
use tiebeam::ranks::collect;
use tiebeam::{Error, Result, files};

const EXAMPLES: &str = "\
Examples:
  tiebeam predict model.safetensors frames.xyz out.xyz
  tiebeam predict model.safetensors frames.xyz out.xyz --rotations 8 --json
  tiebeam predict model.safetensors dataset.xyz out.xyz --energy-key dft_energy --forces-key dft_forces
  cat frames.xyz | tiebeam predict model.safetensors - - | head";

/// Predict energies, forces and stress of extended XYZ frames with a trained potential
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// A potential, as saved by the example `potential`
    model: PathBuf,
    /// Frames to read, extended XYZ; `-` reads stdin
    input: PathBuf,
    /// File for the frames with energy, forces and, for periodic cells, stress, in eV and angstrom; `-` writes to stdout
    output: PathBuf,
    /// Average over K orientations of each frame: its own and K - 1 random ones. The dependence on the orientation falls about
    /// with the square root of K, and the time grows with K
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rotations: u32,
    /// Read the model's kernels from tables that are computed once. This is faster for many frames; forces have an error of about
    /// 1e-4 of the largest. The model must have a radius
    #[arg(long)]
    tables: bool,
    /// Key of the energies in the input with which predictions are compared [default: energy, else REF_energy, dft_energy,
    /// free_energy and others]
    #[arg(long, value_name = "NAME")]
    energy_key: Option<String>,
    /// Column of the forces in the input [default: forces, else force, REF_forces, dft_forces and others]
    #[arg(long, value_name = "NAME")]
    forces_key: Option<String>,
    /// Key of the stress in the input, or of the virial if `virial` is a part of the name [default: stress, else REF_stress,
    /// dft_stress, virial and others]
    #[arg(long, value_name = "NAME")]
    stress_key: Option<String>,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    let keys = Keys::default()
        .energy(args.energy_key.clone())
        .forces(args.forces_key.clone())
        .stress(args.stress_key.clone());
    let said = [
        ("INPUT", if is_standard(&args.input) { "stdin" } else { "a file" }.to_string()),
        ("--rotations", args.rotations.to_string()),
        ("--tables", args.tables.to_string()),
        ("keys", format!("{keys:?}")),
    ];
    context.agree(said)?;
    let opened = context.expect_data(Some(&args.output)).and_then(|()| context.input(&args.input));
    let (input, length) = context.all_done(opened)?;
    let mut reader = Reader::new(input).named(&args.input).keys(keys.clone());
    // The first frames and the output come before the model, so that what is wrong with them is said before the long work.
    let first = context.all_done(round(&mut reader, context.ranks.size()))?;
    let prepare = || {
        if context.is_first() && !is_standard(&args.output) {
            context.keep(&args.output)?;
            files::check(&args.output)?;
        }
        let potential = Potential::load(&context.open()?, &args.model)?;
        first
            .iter()
            .try_fold(0, |at, batch| check(args, &potential, batch, at).map(|()| at + batch.len()))?;
        if args.tables { potential.tabulate(Ponita::TABLE_POINTS) } else { Ok(potential) }
    };
    let potential = context.all_done(prepare())?;
    context.agree(summaries(&[&args.model, &args.input]))?;
    let template = match length {
        Some(_) => "{bar:32} {bytes}/{total_bytes} read, {msg} frames, ETA {eta}",
        None => "{spinner} {bytes} read, {msg} frames",
    };
    let stop = on_interrupt()?;
    let mut work = Work {
        args,
        context,
        keys,
        calculator: Calculator::new(potential).rotations(args.rotations as usize).stop(stop.clone()),
        stop,
        bar: context.bar(length, template),
        errors: Default::default(),
        near: None,
        lost: 0,
    };
    // The input is closed before the output gets its name, which may be the same.
    let all = |output: &mut dyn Write| {
        let mut reader = reader;
        let frames = work.all(first, &mut reader, output)?;
        Ok((frames, reader.labels().clone()))
    };
    if !context.is_first() {
        return all(&mut std::io::sink()).map(drop);
    }
    let (frames, labels) = context.stream(&args.output, all)?;
    work.report(frames, &labels)
}

/// The most atoms that are read before they are predicted. Small frames of this many atoms together share a graph.
const AT_ONCE: usize = 1024;

/// Reads the next frames. Batches depend on the frames alone and not on how they come, so that a pipe gives the bits of a file.
fn take<R: BufRead>(reader: &mut Reader<R>) -> Result<Vec<Frame>> {
    let (mut frames, mut atoms) = (Vec::new(), 0);
    while atoms < AT_ONCE {
        let Some(frame) = reader.next().transpose()? else { break };
        // A frame without atoms must not let the batch grow for ever.
        atoms += frame.len().max(1);
        frames.push(frame);
    }
    Ok(frames)
}

/// Reads a batch for each rank, as far as there are frames. All ranks read everything, which takes little beside the prediction.
fn round<R: BufRead>(reader: &mut Reader<R>, ranks: usize) -> Result<Vec<Vec<Frame>>> {
    let mut batches = Vec::new();
    while batches.len() < ranks {
        let batch = take(reader)?;
        if batch.is_empty() {
            break;
        }
        batches.push(batch);
    }
    Ok(batches)
}

/// Checks what can be told before the work.
fn check(args: &Args, potential: &Potential, frames: &[Frame], first: usize) -> Result<()> {
    let one = |(i, frame): (usize, &Frame)| {
        potential.check(&Atoms::of(frame)).map_err(|e| named(args, first + i, e))
    };
    frames.iter().enumerate().try_for_each(one)
}

/// Names the input and the frame in an error, so that one of many frames is found.
fn named(args: &Args, frame: usize, error: Error) -> Error {
    let advice = match error {
        Error::OutOfMemory { .. } | Error::Limit { .. } => {
            "; take the frame out, or predict it with more memory"
        }
        _ => "",
    };
    Error::format(&args.input, format!("frame {frame}: {error}{advice}"))
}

/// What a run needs, and what it has found so far.
struct Work<'a> {
    args: &'a Args,
    context: &'a Context,
    keys: Keys,
    calculator: Calculator,
    stop: Arc<AtomicBool>,
    bar: ProgressBar,
    errors: [Sum; 3],
    /// The first frame with atoms that are nearer than any that the model was trained on, and the number of such frames.
    near: Option<(usize, Nearest, usize)>,
    /// Number of frames whose stress was left out, as the potential has none in its place.
    lost: usize,
}

/// A sum of absolute differences.
#[derive(Default)]
struct Sum {
    sum: f64,
    count: usize,
}

impl Sum {
    fn add(&mut self, given: impl IntoIterator<Item = f64>, found: impl IntoIterator<Item = f64>) {
        for (a, b) in given.into_iter().zip(found) {
            self.sum += (a - b).abs();
            self.count += 1;
        }
    }
}

impl Work<'_> {
    /// Predicts all frames, a batch on each rank at a time. Rank 0 writes them as they are done. Returns their number.
    fn all<R: BufRead>(
        &mut self,
        first: Vec<Vec<Frame>>,
        reader: &mut Reader<R>,
        output: &mut dyn Write,
    ) -> Result<usize> {
        let (context, rank) = (self.context, self.context.ranks.rank());
        let mut writer = Writer::new(output, &self.args.output);
        let (mut batches, mut done) = (first, 0);
        while !batches.is_empty() {
            let before: usize = batches.iter().take(rank).map(Vec::len).sum();
            let own =
                batches.get(rank).map_or(Ok(Vec::new()), |batch| self.batch(batch, done + before, done));
            let own = context.all_done(own)?;
            for (batch, found) in batches.iter().zip(self.collected(own)?) {
                for (frame, found) in batch.iter().zip(found) {
                    self.note(writer.frames(), frame, &found)?;
                    writer.write(&found.fill(frame))?;
                }
            }
            done += batches.iter().map(Vec::len).sum::<usize>();
            self.bar.set_position(reader.bytes());
            self.bar.set_message(done.to_string());
            batches = context.all_done(round(reader, context.ranks.size()))?;
        }
        self.bar.finish_and_clear();
        Ok(done)
    }

    /// Predicts frames, of which the first has this number. `done` have been written.
    fn batch(&self, frames: &[Frame], first: usize, done: usize) -> Result<Vec<Properties>> {
        unless_stopped(&self.stop, &self.left(done))?;
        check(self.args, self.calculator.potential(), frames, first)?;
        let atoms: Vec<Atoms> = frames.iter().map(Atoms::of).collect();
        self.calculator.energies_forces_at(&atoms).map_err(|(at, error)| match (at, error) {
            (_, Error::Stopped { .. }) => Error::stopped(format!("stopped; {}", self.left(done))),
            (Some(i), error) => named(self.args, first + i, error),
            (None, error) => error,
        })
    }

    /// What the ranks have found, batch by batch, on rank 0.
    fn collected(&self, own: Vec<Properties>) -> Result<Vec<Vec<Properties>>> {
        if self.context.ranks.size() == 1 {
            return Ok(vec![own]);
        }
        let sent = own.iter().flat_map(|one| {
            let numbers = one.numbers();
            std::iter::once(numbers.len() as f64).chain(numbers).flat_map(f64::to_le_bytes)
        });
        let all = collect(&*self.context.ranks, sent.collect())?;
        let read = |bytes: &Vec<u8>| {
            let words = bytes.as_chunks::<8>().0;
            let numbers: Vec<f64> = words.iter().map(|word| f64::from_le_bytes(*word)).collect();
            let (mut rest, mut found) = (&numbers[..], Vec::new());
            while let [length, more @ ..] = rest {
                let (one, after) = more.split_at_checked(*length as usize)?;
                found.push(Properties::of_numbers(one)?);
                rest = after;
            }
            Some(found)
        };
        let all: Option<Vec<_>> = all.iter().map(read).collect();
        all.ok_or_else(|| {
            Error::config("a rank sent results of another version; start the same program on all")
        })
    }

    /// What has become of the work if it ends when so many frames have been written.
    fn left(&self, frames: usize) -> String {
        match is_standard(&self.args.output) && frames > 0 {
            true => format!("the {frames} frames that were predicted until then were written"),
            false => "nothing was written".into(),
        }
    }

    /// Compares a frame's results with what the input has, and looks at its nearest atoms.
    fn note(&mut self, i: usize, frame: &Frame, found: &Properties) -> Result<()> {
        let all = || found.forces.iter().flatten().copied();
        self.context.record(&json!({
            "line": "frame", "frame": i, "atoms": frame.len(), "energy": found.energy,
            "largest_force": all().fold(0.0, |most: f64, x| most.max(x.abs())), "stress": found.stress,
            "nearest": found.nearest.map(|nearest| nearest.distance),
        }))?;
        let [energy, force, stress] = &mut self.errors;
        energy.add(frame.energy, [found.energy]);
        force.add(frame.forces.iter().flatten().flatten().copied(), all());
        stress
            .add(frame.stress.into_iter().flatten().flatten(), found.stress.into_iter().flatten().flatten());
        self.lost += usize::from(found.stress.is_none() && frame.loses_stress());
        let Some(nearest) = found.nearest else { return Ok(()) };
        let known = self.calculator.potential().nearest;
        if nearest.is_one_point() {
            let message = format!("{} are at one point; take one of them out", pair(&nearest));
            return Err(named(self.args, i, Error::config(message)));
        }
        // Distances are in f32, so a frame of the training data may be nearer by its rounding.
        if known.is_some_and(|known| nearest.distance < known * (1.0 - 1e-4)) {
            self.near.get_or_insert((i, nearest, 0)).2 += 1;
        }
        Ok(())
    }

    /// Prints what was found.
    fn report(&self, frames: usize, labels: &Labels) -> Result<()> {
        let context = self.context;
        context.result(format_args!("{frames} frames predicted"));
        for quantity in Quantity::ALL {
            if labels.of(quantity).next().is_some() {
                context.note(format_args!("{quantity} in the input: {}", labels.line(quantity)));
            }
        }
        labels
            .remarks()
            .for_each(|remark| context.note(format_args!("{}: {remark}", self.args.input.display())));
        let missing: Vec<&str> = labels.missing(&self.keys).map(|(_, name)| name).collect();
        for name in &missing {
            context.note(format_args!("warning: no frame of the input has `{name}` as it is asked for"));
        }
        if self.lost > 0 {
            context.note(format_args!(
                "the stress or virial of {} frames was left out, as it is not that of the new energies; these frames are not periodic \
                 along all three axes, so the potential has no stress in its place",
                self.lost
            ));
        }
        let found: Vec<_> = labels
            .found
            .iter()
            .map(
                |l| json!({"of": l.quantity.to_string(), "name": l.name, "frames": l.frames, "used": l.used}),
            )
            .collect();
        context.record(&json!({
            "line": "labels", "frames": labels.frames, "found": found, "missing": missing,
            "remarks": labels.remarks().collect::<Vec<_>>(), "stresses_left_out": self.lost,
        }))?;
        if let (Some((i, nearest, count)), Some(known)) = (&self.near, self.calculator.potential().nearest) {
            context.note(format_args!(
                "warning: frame {i}: {} are {:.3} A apart, nearer than any that the model was trained on ({known:.3} A); results \
                 there are a guess ({count} such frames)",
                pair(nearest),
                nearest.distance
            ));
        }
        let names = [("energy", "meV"), ("force", "meV/A"), ("stress", "meV/A^3")];
        for ((what, unit), Sum { sum, count }) in names.into_iter().zip(&self.errors) {
            if *count == 0 {
                continue;
            }
            let error = 1e3 * sum / *count as f64;
            context
                .result(format_args!("{what} MAE {error:.3} {unit} over {count} values that the input has"));
            context
                .record(&json!({"line": "error", "of": what, "mae": error, "unit": unit, "values": count}))?;
        }
        Ok(())
    }
}

/// Names two atoms.
fn pair(nearest: &Nearest) -> String {
    match nearest.atoms {
        [a, b] if a == b => format!("atom {a} and its periodic image"),
        [a, b] => format!("atoms {a} and {b}"),
    }
}
