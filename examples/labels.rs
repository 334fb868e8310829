//! Prints what a file of frames has, before a potential is trained on it: labels by name, which of them are used, and what is odd.
//!
//!     cargo run --release --example labels -- frames.xyz --energy-key dft_energy
//!
//! With `--json`, every frame is a line with all that was read, and with `--rewrite FILE` the frames are written again. `make test-ase`
//! compares both with what ASE reads.

use clap::Parser;
use serde_json::json;
use std::io::{BufRead, BufWriter};
use std::path::PathBuf;
use std::process::ExitCode;
use tiebeam::geometry::elements::symbol;
use tiebeam::geometry::xyz::{Frame, Keys, Reader, Writer};
use tiebeam::{Result, files};

/// Print the labels of a file of frames, and what is odd in it.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Extended XYZ
    file: PathBuf,
    /// Key of the energies
    #[arg(long, value_name = "NAME")]
    energy_key: Option<String>,
    /// Column of the forces
    #[arg(long, value_name = "NAME")]
    forces_key: Option<String>,
    /// Key of the stress, or of the virial if `virial` is a part of the name
    #[arg(long, value_name = "NAME")]
    stress_key: Option<String>,
    /// Print every frame as a line of JSON
    #[arg(long)]
    json: bool,
    /// Write the frames that were read to FILE, completely or not at all
    #[arg(long, value_name = "FILE")]
    rewrite: Option<PathBuf>,
}

fn body(args: &Args) -> Result<()> {
    let keys = Keys::default()
        .energy(args.energy_key.clone())
        .forces(args.forces_key.clone())
        .stress(args.stress_key.clone());
    let mut reader = Reader::open(&args.file)?.keys(keys.clone());
    match &args.rewrite {
        None => frames(args, &mut reader, |_| Ok(()))?,
        Some(path) => files::replace(path, |file| {
            let mut writer = Writer::new(BufWriter::new(file), path);
            frames(args, &mut reader, |frame| writer.write(&as_named(frame)))?;
            writer.flush()
        })?,
    }
    let labels = reader.labels();
    let text = format!("{} frames\n{labels}", labels.frames);
    // Lines of JSON have stdout for themselves.
    if args.json {
        eprintln!("{text}");
    } else {
        println!("{text}");
    }
    labels.remarks().for_each(|remark| eprintln!("{remark}"));
    labels.missing(&keys).for_each(|(quantity, name)| eprintln!("no frame has {quantity} under `{name}`"));
    Ok(())
}

/// The frame with the file's own `energy`, `forces` and `stress` where labels of other names were asked for. Those stay under their
/// names, and the file's own are not overwritten.
fn as_named(frame: &Frame) -> Frame {
    let mut frame = frame.clone();
    if frame.other.contains_key("energy") {
        frame.energy = None;
    }
    if frame.other.contains_key("stress") {
        frame.stress = None;
    }
    if frame.columns.iter().any(|column| column.name == "forces") {
        frame.forces = None;
    }
    frame
}

/// Prints and writes every frame.
fn frames<R: BufRead>(
    args: &Args,
    reader: &mut Reader<R>,
    mut write: impl FnMut(&Frame) -> Result<()>,
) -> Result<()> {
    for frame in reader.by_ref() {
        let frame = frame?;
        if args.json {
            println!("{}", line(&frame));
        }
        write(&frame)?;
    }
    Ok(())
}

fn line(frame: &Frame) -> serde_json::Value {
    let symbols: Vec<&str> = frame.species.iter().map(|&z| symbol(z)).collect();
    json!({
        "numbers": frame.species, "symbols": symbols, "positions": frame.positions,
        "cell": frame.cell.map(|cell| cell.vectors), "pbc": frame.cell.map(|cell| cell.periodic),
        "energy": frame.energy, "forces": frame.forces, "stress": frame.stress, "other": frame.other,
        "columns": frame.columns.iter().map(|c| (&c.name, &c.rows)).collect::<std::collections::BTreeMap<_, _>>(),
    })
}

fn main() -> ExitCode {
    match body(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
