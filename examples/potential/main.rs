//! Trains an interatomic potential on energies and forces, then runs molecular dynamics with it.
//!
//!     cargo run --release --example potential -- --out out/potential
//!     cargo run --release --example potential -- --data aspirin.xyz --held-out 50 --out
//! out/aspirin
//!
//! Without --data, the frames are simulated here, from a copper cluster under a Morse potential. Every epoch saves a checkpoint,
//! from which `--resume` continues. With `--precision f16|bf16` a training step's products and activations have 16 bits, those
//! for forces too, except in PONITA's fused kernels, which compute in f32, so that it saves little; the trained potential is used in
//! f32. `tiebeam predict OUT/model.safetensors in.xyz out.xyz` uses the result.

mod morse;
#[path = "../common/state.rs"]
mod state;
#[path = "../common/terminal.rs"]
mod terminal;
mod train;

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use tiebeam::chart::{self, Frame as Axes, Line};
use tiebeam::geometry::dynamics::Verlet;
use tiebeam::geometry::vectors::{self, DVec3};
use tiebeam::geometry::xyz::{self, Frame, Keys, Label, Labels, Quantity};
use tiebeam::geometry::{Calculator, Grid, Ponita, PonitaConfig, Potential};
use tiebeam::{Error, Gpu, Result, Rng};

/// Train a potential on energies and forces and run dynamics with it.
#[derive(Parser, Debug)]
#[command(version)]
pub struct Args {
    /// Extended XYZ with energies in eV and forces in eV per angstrom [default: a simulated Morse cluster]
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Key of the energies in the data [default: energy, else REF_energy, dft_energy, free_energy and others]
    #[arg(long, value_name = "NAME", requires = "data")]
    pub energy_key: Option<String>,
    /// Column of the forces in the data [default: forces, else force, REF_forces, dft_forces and others]
    #[arg(long, value_name = "NAME", requires = "data")]
    pub forces_key: Option<String>,
    /// Key of the stress in the data, or of the virial. Stress is shown in the table of labels and not trained on
    #[arg(long, value_name = "NAME", requires = "data")]
    pub stress_key: Option<String>,
    /// Frames at the end of the data that are not trained on
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub held_out: u32,
    /// Passes over the training frames
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub epochs: u32,
    /// Frames per step
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,
    /// Features per atom and orientation, and functions in the kernels' bases
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub channels: u32,
    /// Blocks
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub layers: u32,
    /// Orientations: 12 is an icosahedron, 20 a dodecahedron, others Fibonacci lattices
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(2..=1024))]
    pub orientations: u32,
    /// Cutoff radius in angstrom [default: none, so all atoms of a frame interact; periodic frames need a radius]
    #[arg(long)]
    pub radius: Option<f32>,
    /// Highest learning rate
    #[arg(long, default_value_t = 2e-3)]
    pub lr: f32,
    /// Weight of the squared error of energies relative to that of forces, both in units of the forces
    #[arg(long, default_value_t = 0.01)]
    pub energy_weight: f32,
    /// Train on frames without turning and mirroring them at random
    #[arg(long)]
    pub as_given: bool,
    /// The precision of training
    #[command(flatten)]
    pub scope: terminal::Scope,
    /// Seed of data, weights and batches
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Steps of dynamics with the trained potential
    #[arg(long, default_value_t = 1000)]
    pub md_steps: u32,
    /// Run dynamics with tables of the trained kernels (needs --radius)
    #[arg(long, requires = "radius")]
    pub tables: bool,
    /// Time of a step, in fs
    #[arg(long, default_value_t = 1.0)]
    pub dt: f64,
    /// Initial temperature of the atoms, in kelvin
    #[arg(long, default_value_t = 300.0)]
    pub temperature: f64,
    /// Continue from the checkpoint in --out
    #[arg(long)]
    pub resume: bool,
    /// Folder for checkpoint, model, trajectory and pictures
    #[arg(long, default_value = "out/potential")]
    pub out: PathBuf,
}

fn body(args: &Args) -> Result<()> {
    let gpu = Gpu::open()?;
    println!("adapter    {}", gpu.adapter());
    state::folder(&args.out)?;
    let frames = frames(args)?;
    let held_out = args.held_out as usize;
    if frames.len() <= held_out {
        let message = format!("{} frames, {held_out} of them held out; lower --held-out", frames.len());
        return Err(Error::config(message));
    }
    let (training, validation) = frames.split_at(frames.len() - held_out);
    println!("frames     {} to train on, {held_out} held out", training.len());
    let potential = potential(args, &gpu, training)?;
    let stop = terminal::interruptible()?;
    let Some(curve) = train::train(args, &potential, training, validation, &stop)? else {
        println!("stopped    go on with --resume and the same arguments");
        return Ok(());
    };
    let model = args.out.join("model.safetensors");
    potential.save(&model)?;
    println!("model      {}", model.display());
    train::draw(&args.out.join("curve.svg"), &curve, gpu.adapter())?;
    let calculator = Calculator::load(&gpu, &model)?;
    turned(&calculator, validation)?;
    let calculator = match args.tables {
        true => Calculator::new(calculator.potential().tabulate(Ponita::TABLE_POINTS)?),
        false => calculator,
    };
    if dynamics(args, &calculator, &validation[0], &stop)? {
        println!("pictures   {}", args.out.join("{curve,drift}.svg").display());
    }
    Ok(())
}

fn frames(args: &Args) -> Result<Vec<Frame>> {
    let Some(path) = &args.data else {
        let path = args.out.join("morse.xyz");
        let frames = morse::frames(args.seed)?;
        xyz::write(&path, &frames)?;
        println!("data       {} (a copper cluster under a Morse potential)", path.display());
        return Ok(frames);
    };
    let keys = Keys::default()
        .energy(args.energy_key.clone())
        .forces(args.forces_key.clone())
        .stress(args.stress_key.clone());
    let (frames, labels) = xyz::read_with(path, &keys)?;
    println!("data       {}, {} frames with these labels:", path.display(), frames.len());
    for quantity in Quantity::ALL {
        let trained = matches!(quantity, Quantity::Energy | Quantity::Forces);
        let rest = if !trained && labels.used(quantity) > 0 { "; read, and not trained on" } else { "" };
        println!("           {quantity:<8} {}{rest}", labels.line(quantity));
    }
    labels.remarks().for_each(|remark| println!("           {remark}"));
    for (quantity, name) in labels.missing(&keys) {
        println!("           warning: no frame has {quantity} under `{name}`");
    }
    labelled(&frames, &labels).map_err(|message| Error::format(path, message))?;
    Ok(frames)
}

/// Checks that every frame has what is trained on. An error says what there is instead.
fn labelled(frames: &[Frame], labels: &Labels) -> std::result::Result<(), String> {
    for (quantity, option) in [(Quantity::Energy, "--energy-key"), (Quantity::Forces, "--forces-key")] {
        let lacks = |f: &Frame| match quantity {
            Quantity::Energy => f.energy.is_none(),
            _ => f.forces.is_none(),
        };
        let Some(i) = frames.iter().position(lacks) else { continue };
        let names = |of: &dyn Fn(&Label) -> bool| {
            let names: Vec<String> =
                labels.of(quantity).filter(|l| of(l)).map(|l| format!("`{}`", l.name)).collect();
            names.join(", ")
        };
        let others = names(&|l| l.used + l.unfit < l.frames);
        let unfit = names(&|l| l.unfit > 0);
        let mut advice = match others.is_empty() {
            true => format!("name theirs by {option}"),
            false => format!("name one of {others} by {option}"),
        };
        if !unfit.is_empty() {
            advice.push_str(&format!("; {unfit} cannot be read as {quantity}, for the reason said above"));
        }
        return Err(match frames.iter().all(lacks) {
            true => format!("no frame has {quantity} under the names that are looked for; {advice}"),
            false => format!("frame {i} lacks {quantity}; take it out, or {advice}"),
        });
    }
    Ok(())
}

fn potential(args: &Args, gpu: &Gpu, training: &[Frame]) -> Result<Potential> {
    let channels = args.channels as usize;
    let config = PonitaConfig::default()
        .channels(channels)
        .hidden(channels)
        .basis(channels)
        .layers(args.layers as usize)
        .radius(args.radius);
    let grid = match args.orientations as usize {
        12 => Grid::icosahedron(),
        20 => Grid::dodecahedron(),
        n => Grid::fibonacci(n),
    };
    let mut potential = Potential::new(gpu, training, config, grid, &mut Rng::new(args.seed))?;
    let first: Vec<&Frame> = training.iter().take(args.batch as usize).collect();
    let batch = potential.batch(&first)?;
    potential.net.calibrate(&batch.graph, &batch.input)?;
    Ok(potential)
}

/// Prints how much random rotations and reflections change energies and forces. Only those that permute the network's grid change
/// nothing.
fn turned(calculator: &Calculator, frames: &[Frame]) -> Result<()> {
    let (mut rng, mut energy, mut change, mut square) = (Rng::new(7), 0.0, 0.0, 0.0);
    let frames: Vec<&Frame> = frames.iter().filter(|f| f.cell.is_none()).take(10).collect();
    for frame in &frames {
        let matrix = vectors::orthogonal(&mut rng);
        let plain = calculator.energy_forces(&frame.positions, &frame.species, None)?;
        let positions = vectors::turned(&matrix, &frame.positions);
        let found = calculator.energy_forces(&positions, &frame.species, None)?;
        energy += (found.energy - plain.energy).abs() / frames.len() as f64;
        for (f, g) in plain.forces.iter().zip(&found.forces) {
            let f = DVec3::from(*f);
            change += (matrix.transpose() * DVec3::from(*g)).distance_squared(f);
            square += f.length_squared();
        }
    }
    if !frames.is_empty() {
        println!(
            "turned     at random: energies change by {:.2} meV on average, forces by {:.4} of their size (rms)",
            1e3 * energy,
            (change / square).sqrt()
        );
    }
    Ok(())
}

/// Runs dynamics at constant energy from a frame. Returns false if Ctrl-C stopped it.
fn dynamics(args: &Args, calculator: &Calculator, start: &Frame, stop: &AtomicBool) -> Result<bool> {
    let field = |x: &[[f64; 3]]| {
        let found = calculator.energy_forces(x, &start.species, start.cell)?;
        Ok((found.energy, found.forces))
    };
    let mut atoms = Verlet::new(&start.positions, &start.species, field)?;
    atoms.heat(args.temperature, &mut Rng::new(args.seed ^ 0x4d44));
    let n = start.len() as f64;
    let first = atoms.total();
    let mut drift = vec![(0.0, 0.0)];
    let mut kinetic = vec![(0.0, 1e3 * atoms.kinetic() / n)];
    let mut trajectory = Vec::new();
    let bar = terminal::bar("{bar:32} {pos}/{len} steps {msg} ETA {eta}", 0, args.md_steps.into());
    for step in 1..=args.md_steps {
        if stop.load(Ordering::SeqCst) {
            bar.finish_and_clear();
            println!("stopped    dynamics after step {}", step - 1);
            return Ok(false);
        }
        atoms.step(args.dt, field)?;
        let time = step as f64 * args.dt;
        drift.push((time, 1e3 * (atoms.total() - first) / n));
        kinetic.push((time, 1e3 * atoms.kinetic() / n));
        if step % 10 == 0 {
            let (positions, energy) = (atoms.positions.clone(), Some(atoms.potential));
            // Labels and columns of the start are not those of a later moment.
            let Frame { species, cell, .. } = start.clone();
            trajectory.push(Frame { species, positions, cell, energy, ..Frame::default() });
        }
        bar.set_message(format!("{:.0} K", atoms.temperature()));
        bar.inc(1);
    }
    bar.finish_and_clear();
    xyz::write(args.out.join("trajectory.xyz"), &trajectory)?;
    let most = drift.iter().map(|d| d.1.abs()).fold(0.0, f64::max);
    let swing = kinetic.iter().map(|k| k.1).fold(f64::MIN, f64::max)
        - kinetic.iter().map(|k| k.1).fold(f64::MAX, f64::min);
    println!(
        "dynamics   {} steps of {} fs: total energy within {most:.3} meV an atom of its start, kinetic energy over {swing:.1}",
        args.md_steps, args.dt
    );
    let title = format!(
        "{} atoms at constant energy, steps of {} fs, from {} K ({})",
        start.len(),
        args.dt,
        args.temperature,
        calculator.potential().net.embed.gpu().adapter().name
    );
    let axes = Axes {
        title: &title,
        x: "time, fs",
        y: "total energy less its start, meV an atom",
        logarithmic: false,
    };
    let name = format!("within {most:.3}, while kinetic energy moves over {swing:.1}");
    let lines = [Line::new(name, drift)];
    chart::lines(&args.out.join("drift.svg"), &axes, &lines)?;
    Ok(true)
}

fn main() -> ExitCode {
    terminal::main(|| body(&Args::parse()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run continues only with the frames that it began with.
    #[test]
    fn all_that_is_trained_on_counts() {
        use tiebeam::geometry::Cell;
        let frame = Frame {
            species: vec![29, 29],
            positions: vec![[0.0; 3], [0.0, 0.0, 2.5]],
            energy: Some(-1.0),
            forces: Some(vec![[1.0, 2.0, 3.0]; 2]),
            cell: Some(Cell::cuboid([8.0; 3])),
            ..Frame::default()
        };
        let hash = |frame: Frame| train::fingerprint(&[frame]);
        let same = Frame { other: [("note".to_string(), "x".to_string())].into(), ..frame.clone() };
        assert_eq!(hash(same), hash(frame.clone()));
        let slab = Cell { periodic: [true, true, false], ..Cell::cuboid([8.0; 3]) };
        for other in [
            Frame { species: vec![29, 28], ..frame.clone() },
            Frame { positions: vec![[0.0; 3], [0.0, 0.0, 2.6]], ..frame.clone() },
            Frame { energy: Some(-1.5), ..frame.clone() },
            Frame { forces: Some(vec![[1.0, 2.0, 3.5]; 2]), ..frame.clone() },
            Frame { cell: None, ..frame.clone() },
            Frame { cell: Some(Cell::cuboid([8.0, 8.0, 9.0])), ..frame.clone() },
            Frame { cell: Some(slab), ..frame.clone() },
            // Signs that changed in pairs, as where gradients were taken for forces.
            Frame { forces: Some(vec![[-1.0, -2.0, -3.0]; 2]), ..frame.clone() },
            Frame { forces: Some(vec![[-1.0, 2.0, 3.0], [1.0, 2.0, -3.0]]), ..frame.clone() },
            Frame { energy: Some(1.0), forces: Some(vec![[-1.0, 2.0, 3.0], [1.0; 3]]), ..frame.clone() },
        ] {
            assert_ne!(hash(other.clone()), hash(frame.clone()), "{other:?}");
        }
    }

    /// Frames without labels are refused with the names that they have.
    #[test]
    fn a_run_without_labels_is_refused() {
        let refusal = |keys: &str, asked: Keys| {
            let text = format!("1\nProperties=species:S:1:pos:R:3:forces:R:3 {keys}\nCu 0 0 0 1 2 3\n");
            let mut reader = xyz::Reader::new(text.as_bytes()).keys(asked);
            let frames: Vec<Frame> = reader.by_ref().collect::<Result<_>>().expect("frames");
            labelled(&frames, reader.labels()).err()
        };
        assert_eq!(refusal("REF_energy=1", Keys::default()), None);
        let message = refusal("mace_energy=1", Keys::default()).expect("no energy that is known");
        assert!(
            message.contains("no frame has energy") && message.contains("`mace_energy` by --energy-key"),
            "{message}"
        );
        assert_eq!(refusal("mace_energy=1", Keys::default().energy(Some("mace_energy".into()))), None);
        // A label that is there and cannot be used is named.
        let message = refusal("energy=nan", Keys::default()).expect("no finite energy");
        assert!(message.contains("`energy` cannot be read as energy"), "{message}");
        let message =
            refusal("my_energy=1 total_energy=-1", Keys::default().energy(Some("my_energy".into())));
        assert_eq!(message, None);
        let message = refusal("energy=1", Keys::default().forces(Some("f".into()))).expect("no such forces");
        assert!(message.contains("`forces` by --forces-key"), "{message}");
    }

    /// Energies and forces are learned in every precision, each of which rounds in its own way.
    #[test]
    fn every_precision_learns() {
        let gpu = Gpu::open().expect("an adapter");
        // Four atoms near a tetrahedron have fewer pairs than the cluster.
        let mut rng = Rng::new(1);
        let mut frame = || {
            let mut noise = [0.0f32; 12];
            rng.fill_normal(&mut noise);
            let corners = Grid::tetrahedron();
            let positions: Vec<[f64; 3]> = corners
                .vectors()
                .iter()
                .zip(noise.chunks_exact(3))
                .map(|(x, e)| std::array::from_fn(|k| 1.7 * x[k] + 0.15 * f64::from(e[k])))
                .collect();
            let (energy, forces) = morse::field(&positions);
            let (energy, forces) = (Some(energy), Some(forces));
            Frame { species: vec![29; 4], positions, energy, forces, ..Frame::default() }
        };
        let frames: Vec<Frame> = (0..48).map(|_| frame()).collect();
        let (training, validation) = frames.split_at(40);
        let curve = |precision: &str| {
            let out = tempfile::tempdir().expect("a folder");
            let options =
                ["--epochs", "16", "--batch", "4", "--channels", "8", "--layers", "2", "--lr", "0.01"];
            let more = ["--precision", precision, "--out", out.path().to_str().expect("a name")];
            let args = Args::try_parse_from(["potential"].into_iter().chain(options).chain(more));
            let args = args.expect("arguments");
            let potential = potential(&args, &gpu, training).expect("a potential");
            let stop = std::sync::Arc::default();
            let curve = train::train(&args, &potential, training, validation, &stop).expect("training");
            let forces = |[_, force, ..]: train::Epoch| force;
            curve.expect("it was not stopped").into_iter().map(forces).collect::<Vec<_>>()
        };
        let want = curve("f32");
        for (precision, got) in [("f32", want.clone()), ("f16", curve("f16")), ("bf16", curve("bf16"))] {
            let last = got[got.len() - 1];
            assert!(got.iter().all(|x| x.is_finite()) && last < 0.5 * got[0], "{precision}: {got:?}");
            assert!(last < 1.5 * want[want.len() - 1], "{precision}: {got:?}, in f32 {want:?}");
            assert_eq!(got == want, precision == "f32", "{precision}: {got:?}");
        }
    }
}
