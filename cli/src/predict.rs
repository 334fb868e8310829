//! `tiebeam predict`: runs a trained potential on the frames of a file.

use crate::context::{Context, is_standard};
use serde_json::json;
use std::path::PathBuf;
use tiebeam::geometry::xyz::{self, Frame};
use tiebeam::geometry::{Atoms, Calculator, Ponita, Potential};
use tiebeam::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  tiebeam predict model.safetensors frames.xyz out.xyz
  tiebeam predict model.safetensors frames.xyz out.xyz --rotations 8 --json
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
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rotations: u32,
    /// Read the model's kernels from tables that are computed once. This is faster for many frames; forces have an error of about
    /// 1e-4 of the largest. The model must have a radius
    #[arg(long)]
    tables: bool,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    context.expect_data(Some(&args.output))?;
    let text = context.read(&args.input)?;
    let wrong = |(line, why)| Error::format(&args.input, format!("line {line}: {why}"));
    let frames = xyz::parse(&text).map_err(wrong)?;
    // Checked first, so that errors are reported before the long work.
    let results_left_out: Vec<Frame> = frames.iter().map(Frame::without_results).collect();
    match is_standard(&args.output) {
        true => drop(xyz::text(&args.output, &results_left_out)?),
        false => xyz::check(&args.output, results_left_out)?,
    }
    let potential = Potential::load(&context.open()?, &args.model)?;
    let named = |i: usize, error: Error| match error {
        Error::Config { message, .. } => Error::format(&args.input, format!("frame {i}: {message}")),
        other => other,
    };
    for (i, frame) in frames.iter().enumerate() {
        potential.check(&Atoms::of(frame)).map_err(|e| named(i, e))?;
    }
    let potential = if args.tables { potential.tabulate(Ponita::TABLE_POINTS)? } else { potential };
    let calculator = Calculator::new(potential).rotations(args.rotations as usize);
    let bar = context.bar(Some(frames.len() as u64), "{bar:32} {pos}/{len} frames, ETA {eta}");
    let mut predicted = Vec::with_capacity(frames.len());
    for (i, frame) in frames.iter().enumerate() {
        let found = calculator.predict(frame).map_err(|e| named(i, e))?;
        let forces = found.forces.iter().flatten().flatten();
        context.record(&json!({
            "line": "frame", "frame": i, "atoms": found.species.len(), "energy": found.energy,
            "largest_force": forces.fold(0.0, |most: f64, x| most.max(x.abs())), "stress": found.stress,
        }))?;
        predicted.push(found);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let text = xyz::text(&args.output, &predicted)?;
    context.write(&args.output, &text)?;
    context.result(format_args!("{} frames predicted", predicted.len()));
    for (what, unit, error) in [
        ("energy", "meV", mean_error(&frames, &predicted, |f| f.energy.iter().copied().collect())),
        (
            "force",
            "meV/A",
            mean_error(&frames, &predicted, |f| f.forces.iter().flatten().flatten().copied().collect()),
        ),
    ] {
        if let Some((error, count)) = error {
            let error = 1e3 * error;
            context
                .result(format_args!("{what} MAE {error:.3} {unit} over {count} values that the input has"));
            context
                .record(&json!({"line": "error", "of": what, "mae": error, "unit": unit, "values": count}))?;
        }
    }
    Ok(())
}

/// Returns the mean absolute difference between the values that the input has and the predicted ones, and their number.
fn mean_error(
    frames: &[Frame],
    predicted: &[Frame],
    part: impl Fn(&Frame) -> Vec<f64>,
) -> Option<(f64, usize)> {
    let pairs = frames.iter().zip(predicted).flat_map(|(a, b)| {
        // If the input has no values, the zip is empty.
        part(a).into_iter().zip(part(b)).collect::<Vec<_>>()
    });
    let (sum, count) = pairs.fold((0.0, 0), |(sum, count), (a, b)| (sum + (a - b).abs(), count + 1));
    (count > 0).then(|| (sum / count as f64, count))
}
