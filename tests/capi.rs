//! Tests the C ABI from C: builds the shared library and a program against `include/tiebeam.h`, and compares the program's output
//! with that of the calculator in Rust.

mod support;

use libtest_mimic::{Arguments, Failed, Trial};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use support::folder::{Folder, root};
use support::gpu;
use tiebeam::Rng;
use tiebeam::geometry::elements::Vec3;
use tiebeam::geometry::xyz::Frame;
use tiebeam::geometry::{Calculator, Cell, Grid, PonitaConfig, Potential};

const POSITIONS: [Vec3; 3] = [[0.1, 0.2, 0.3], [1.9, 1.7, 2.2], [3.0, 0.4, -0.5]];
const SPECIES: [u8; 3] = [8, 29, 29];
const CELL: Cell =
    Cell { vectors: [[4.6, 0.0, 0.0], [0.7, 5.1, 0.0], [-0.4, 0.5, 5.4]], periodic: [true; 3] };

/// Finds a working C compiler, by the usual variable and names.
fn compiler() -> Option<String> {
    let named = std::env::var("CC").ok();
    let names = named.iter().map(String::as_str).chain(["cc", "gcc", "clang"]);
    let answers =
        |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    names.into_iter().find(answers).map(str::to_string)
}

fn run(command: &mut Command) -> Result<String, Failed> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    match output.status.success() {
        true => Ok(out.into_owned()),
        false => Err(format!("{command:?}: {}\n{out}{err}", output.status).into()),
    }
}

/// Builds the shared library into the target folder of this test, and returns its path.
fn library() -> Result<PathBuf, Failed> {
    let own = std::env::current_exe()?;
    // target/PROFILE/deps/capi-...
    let profile = own.ancestors().nth(2).ok_or("the test is not in a folder of targets")?;
    let target = profile.parent().ok_or("no folder of targets")?;
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).args(["rustc", "--lib", "--crate-type", "cdylib"]);
    command.args(["--features", "capi", "--target-dir"]).arg(target);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    run(&mut command)?;
    Ok(profile.to_path_buf())
}

fn model(path: &Path) -> tiebeam::Result<Calculator> {
    let config = PonitaConfig::default().channels(8).hidden(8).basis(8).layers(2).radius(Some(4.0));
    let frame = Frame {
        species: SPECIES.to_vec(),
        positions: POSITIONS.to_vec(),
        energy: Some(-4.0),
        forces: Some(vec![[0.5, -1.0, 0.25]; 3]),
        ..Frame::default()
    };
    let mut potential =
        Potential::new(gpu(), std::slice::from_ref(&frame), config, Grid::icosahedron(), &mut Rng::new(2))?;
    let batch = potential.batch(&[&frame])?;
    potential.net.calibrate(&batch.graph, &batch.input)?;
    potential.save(path)?;
    Ok(Calculator::new(potential))
}

fn program_agrees(compiler: &str) -> Result<(), Failed> {
    let folder = Folder::new("capi");
    let (program, weights) = (folder.join("program"), folder.join("model.safetensors"));
    let root = root();
    let libraries = library()?;
    let mut compile = Command::new(compiler);
    compile.args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-I"]).arg(root.join("include"));
    compile
        .arg(root.join("tests/capi/program.c"))
        .arg("-L")
        .arg(&libraries)
        .args(["-ltiebeam", "-o"])
        .arg(&program);
    compile.arg(format!("-Wl,-rpath,{}", libraries.display()));
    run(&mut compile)?;
    let calculator = model(&weights).map_err(|e| e.to_string())?;
    let said = run(Command::new(&program).arg(&weights))?;
    drop(folder);

    let free = calculator.energy_forces(&POSITIONS, &SPECIES, None).map_err(|e| e.to_string())?;
    let periodic = calculator.energy_forces(&POSITIONS, &SPECIES, Some(CELL)).map_err(|e| e.to_string())?;
    let stress = periodic.stress.ok_or("no stress")?;
    let calculator = calculator.rotations(3);
    let average = calculator.energy_forces(&POSITIONS, &SPECIES, Some(CELL)).map_err(|e| e.to_string())?;
    for (name, want) in [
        ("radius", &[4.0][..]),
        ("layers", &[2.0]),
        ("energy", &[free.energy]),
        ("energies", &free.atom_energies),
        ("forces", free.forces.as_flattened()),
        ("periodic", &[periodic.energy]),
        ("stress", stress.as_flattened()),
        ("average", &[average.energy]),
        ("average_forces", average.forces.as_flattened()),
        ("average_stress", average.stress.ok_or("no average stress")?.as_flattened()),
    ] {
        let line = said.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        let got: Vec<f64> =
            line.ok_or(format!("no {name} in\n{said}"))?.split(' ').map_while(|x| x.parse().ok()).collect();
        if got != want {
            return Err(format!("{name}: C has {got:?}, Rust {want:?}").into());
        }
    }
    for reason in [
        "open: /nowhere/model.safetensors",
        "null: ",
        "`positions` is NULL",
        "was trained on O, Cu",
        "number 100000",
        "huge: ",
        "rotations: tiebeam_set_rotations: 0 rotations",
        "slab: tiebeam_compute: stress needs",
    ] {
        if !said.contains(reason) {
            return Err(format!("no `{reason}` in\n{said}").into());
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let compiler = compiler();
    let name = match &compiler {
        Some(_) => "a_c_program_gets_what_rust_gets".to_string(),
        None => {
            "a_c_program_gets_what_rust_gets (no C compiler: CC, cc, gcc and clang do not answer)".to_string()
        }
    };
    let ignored = compiler.is_none();
    let trial =
        Trial::test(name, move || program_agrees(&compiler.unwrap_or_default())).with_ignored_flag(ignored);
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}
