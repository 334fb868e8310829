//! `tiebeam predict`: a trained potential on frames of a file.

use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use tiebeam::geometry::xyz::{self, Frame};
use tiebeam::geometry::{Atoms, Calculator, Ponita, Potential};
use tiebeam::{Error, Gpu, Result};

/// What to predict, with what.
#[derive(clap::Args)]
pub struct Args {
    /// A potential, as the example `potential` saves it
    model: PathBuf,
    /// Frames to read, extended XYZ
    input: PathBuf,
    /// Where to write them with energy, forces and, in periodic cells, stress: eV and angstrom
    output: PathBuf,
    /// Average over the frame as it is and random rotations of it, so many in all: what turning a frame changes falls
    /// with about their square root, the time grows with their number
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rotations: u32,
    /// Read the kernels from tables made of them once: faster for many frames, and forces right to about 1e-4 of the
    /// largest; the model needs a radius
    #[arg(long)]
    tables: bool,
}

pub fn run(args: &Args) -> Result<()> {
    let frames = xyz::read(&args.input)?;
    // What can be known to fail is said before the long work.
    xyz::check(&args.output, frames.iter().map(Frame::without_results))?;
    let potential = Potential::load(&Gpu::open()?, &args.model)?;
    let named = |i: usize, error: Error| match error {
        Error::Config { message, .. } => Error::format(&args.input, format!("frame {i}: {message}")),
        other => other,
    };
    for (i, frame) in frames.iter().enumerate() {
        potential.check(&Atoms::of(frame)).map_err(|e| named(i, e))?;
    }
    let potential = if args.tables { potential.tabulate(Ponita::TABLE_POINTS)? } else { potential };
    let calculator = Calculator::new(potential).rotations(args.rotations as usize);
    let bar = ProgressBar::new(frames.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:32} {pos}/{len} frames, ETA {eta}").expect("valid"));
    let mut predicted = Vec::with_capacity(frames.len());
    for (i, frame) in frames.iter().enumerate() {
        predicted.push(calculator.predict(frame).map_err(|e| named(i, e))?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    xyz::write(&args.output, &predicted)?;
    println!("{} frames to {}", predicted.len(), args.output.display());
    for (what, unit, error) in [
        ("energy", "meV", mean_error(&frames, &predicted, |f| f.energy.iter().copied().collect())),
        (
            "force",
            "meV/A",
            mean_error(&frames, &predicted, |f| f.forces.iter().flatten().flatten().copied().collect()),
        ),
    ] {
        if let Some((error, count)) = error {
            println!("{what} MAE {:.3} {unit} over {count} values that the input has", 1e3 * error);
        }
    }
    Ok(())
}

/// Mean absolute difference of what both files' frames have, and of how many numbers.
fn mean_error(
    frames: &[Frame],
    predicted: &[Frame],
    part: impl Fn(&Frame) -> Vec<f64>,
) -> Option<(f64, usize)> {
    let pairs = frames.iter().zip(predicted).flat_map(|(a, b)| {
        // Where the input has none the zip is empty.
        part(a).into_iter().zip(part(b)).collect::<Vec<_>>()
    });
    let (sum, count) = pairs.fold((0.0, 0), |(sum, count), (a, b)| (sum + (a - b).abs(), count + 1));
    (count > 0).then(|| (sum / count as f64, count))
}
