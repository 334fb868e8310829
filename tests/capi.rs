//! Tests the C ABI from C: installs the shared library by `scripts/install-capi.sh`, builds a program against the installed files, and
//! compares the program's output with that of the calculator in Rust.

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

/// Finds a working compiler, by its usual variable and names.
fn compiler(variable: &str, names: &[&str]) -> Option<String> {
    let named = std::env::var(variable).ok();
    let names = named.iter().map(String::as_str).chain(names.iter().copied());
    names.into_iter().find(|name| answers(name)).map(str::to_string)
}

fn answers(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success())
}

fn run(command: &mut Command) -> Result<String, Failed> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    match output.status.success() {
        true => Ok(out.into_owned()),
        false => Err(format!("{command:?}: {}\n{out}{err}", output.status).into()),
    }
}

/// Runs the script that installs, or removes, for `prefix` below the folder `stage`. The library is built in the target folder and
/// the profile of this test.
fn install(task: &str, stage: &Path, prefix: &str) -> Result<(), Failed> {
    let own = std::env::current_exe()?;
    // target/PROFILE/deps/capi-...
    let target = own.ancestors().nth(3).ok_or("the test is not in a folder of targets")?;
    let mut command = Command::new("sh");
    command.arg(root().join("scripts/install-capi.sh")).arg(task);
    command.env("CARGO", env!("CARGO")).env("CARGO_TARGET_DIR", target);
    command.env("PROFILE", if cfg!(debug_assertions) { "dev" } else { "release" });
    command
        .env("DESTDIR", stage)
        .env("PREFIX", prefix)
        .env("LIBDIR", "lib/here")
        .env_remove("CARGO_BUILD_TARGET");
    run(&mut command).map(drop)
}

/// Expands the variables of a file for pkg-config, and returns the values of `Cflags` and `Libs`.
fn expanded(file: &Path) -> Result<Vec<String>, Failed> {
    let folder = file.parent().ok_or("no folder")?.display().to_string();
    let mut variables = vec![("pcfiledir".to_string(), folder)];
    let mut found = Vec::new();
    for line in std::fs::read_to_string(file)?.lines() {
        let line =
            variables.iter().fold(line.to_string(), |l, (name, x)| l.replace(&format!("${{{name}}}"), x));
        match (line.split_once('='), line.split_once(": ")) {
            (_, Some(("Cflags" | "Libs", value))) => found.extend(value.split(' ').map(str::to_string)),
            (Some((name, value)), None) => variables.push((name.to_string(), value.to_string())),
            _ => {}
        }
    }
    Ok(found)
}

/// The compiler's arguments for the installed library, by pkg-config if it is there.
fn flags(configs: &Path) -> Result<Vec<String>, Failed> {
    let own = expanded(&configs.join("tiebeam.pc"))?;
    let tool = std::env::var("PKG_CONFIG").unwrap_or_else(|_| "pkg-config".into());
    if !answers(&tool) {
        return Ok(own);
    }
    let ask =
        |what: &[&str]| run(Command::new(&tool).env("PKG_CONFIG_PATH", configs).args(what).arg("tiebeam"));
    let version = ask(&["--modversion"])?;
    if version.trim() != env!("CARGO_PKG_VERSION") {
        return Err(format!("the installed version is {version}").into());
    }
    let said: Vec<String> = ask(&["--cflags", "--libs"])?.split_whitespace().map(str::to_string).collect();
    if said != own {
        return Err(format!("pkg-config says {said:?}, and the file {own:?}").into());
    }
    Ok(said)
}

/// Holds the library to its name, its links and its functions, with the tools that are there.
fn library_is_named(folder: &Path) -> Result<(), Failed> {
    let version = env!("CARGO_PKG_VERSION");
    let parts: Vec<&str> = version.split('.').collect();
    let compatible = if parts[0] == "0" { format!("0.{}", parts[1]) } else { parts[0].to_string() };
    let [exact, asked, plain] = match cfg!(target_os = "macos") {
        true => [format!(".{version}.dylib"), format!(".{compatible}.dylib"), ".dylib".into()],
        false => [format!(".so.{version}"), format!(".so.{compatible}"), ".so".into()],
    }
    .map(|end| format!("libtiebeam{end}"));
    for link in [&asked, &plain] {
        let (to, want) = (folder.join(link).canonicalize()?, folder.join(&exact).canonicalize()?);
        if to != want {
            return Err(format!("{link} is {}, not {}", to.display(), want.display()).into());
        }
    }
    if !cfg!(target_os = "linux") {
        return Ok(());
    }
    let library = folder.join(&exact);
    if answers("readelf") {
        let said = run(Command::new("readelf").arg("-d").arg(&library))?;
        if !said.lines().any(|l| l.contains("SONAME") && l.ends_with(&format!("[{asked}]"))) {
            return Err(format!("no SONAME {asked} in\n{said}").into());
        }
    }
    if answers("nm") {
        let said = run(Command::new("nm").args(["-D", "--defined-only"]).arg(&library))?;
        let names: Vec<&str> = said.lines().filter_map(|l| l.split(' ').next_back()).collect();
        let header = std::fs::read_to_string(root().join("include/tiebeam.h"))?;
        if let Some(name) =
            names.iter().find(|n| !n.starts_with("tiebeam_") || !header.contains(&format!("{n}(")))
        {
            return Err(format!("the library exports {name}, which the header does not have").into());
        }
        if names.len() < 8 {
            return Err(format!("the library exports {names:?} only").into());
        }
    }
    Ok(())
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
    let stage = folder.join("stage");
    install("install", &stage, "/usr/tie")?;
    // The file for pkg-config has no path from the root, so it is true here, too.
    let libraries = stage.join("usr/tie/lib/here");
    library_is_named(&libraries)?;
    let mut compile = Command::new(compiler);
    compile.args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]);
    compile
        .arg(root().join("tests/capi/program.c"))
        .args(flags(&libraries.join("pkgconfig"))?)
        .arg("-o")
        .arg(&program);
    compile.arg(format!("-Wl,-rpath,{}", libraries.display()));
    run(&mut compile)?;
    let calculator = model(&weights).map_err(|e| e.to_string())?;
    let said = run(Command::new(&program).arg(&weights))?;
    install("uninstall", &stage, "/usr/tie")?;
    let left = files(&stage)?;
    if !left.is_empty() {
        return Err(format!("uninstall leaves {left:?}").into());
    }
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

/// The files and links in a folder and its subfolders.
fn files(folder: &Path) -> Result<Vec<PathBuf>, Failed> {
    let mut found = Vec::new();
    for entry in folder.read_dir()? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => found.extend(files(&entry.path())?),
            false => found.push(entry.path()),
        }
    }
    Ok(found)
}

fn cpp_compiles(compiler: &str) -> Result<(), Failed> {
    let folder = Folder::new("capi");
    let source = folder.join("program.cpp");
    std::fs::write(
        &source,
        "#include <tiebeam.h>\nint main() { return tiebeam_abi() == TIEBEAM_ABI && tiebeam_open(\"\") ? 1 : 0; }\n",
    )?;
    let mut compile = Command::new(compiler);
    compile.args(["-std=c++11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I"]);
    run(compile.arg(root().join("include")).arg(&source)).map(drop)
}

/// The header and the Python package repeat the versions of functions and library.
fn versions_agree() -> Result<(), Failed> {
    let abi = format!("#define TIEBEAM_ABI {}", tiebeam::capi::tiebeam_abi());
    for (file, line) in [
        ("include/tiebeam.h", abi.clone()),
        ("python/tiebeam/_calculator.py", abi.replace("#define TIEBEAM_ABI", "ABI =")),
        ("python/pyproject.toml", format!("version = \"{}\"", env!("CARGO_PKG_VERSION"))),
    ] {
        if !std::fs::read_to_string(root().join(file))?.lines().any(|l| l == line) {
            return Err(format!("{file} has no line `{line}`").into());
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let c = compiler("CC", &["cc", "gcc", "clang"]);
    let cpp = compiler("CXX", &["c++", "g++", "clang++"]);
    let named = |name: &str, reason: Option<&str>| match reason {
        Some(reason) => format!("{name} ({reason})"),
        None => name.to_string(),
    };
    let missing = match (cfg!(windows), &c) {
        (true, _) => Some("nothing is installed on Windows"),
        (_, None) => Some("no C compiler: CC, cc, gcc and clang do not answer"),
        _ => None,
    };
    let missing_cpp = cpp.is_none().then_some("no C++ compiler: CXX, c++, g++ and clang++ do not answer");
    let trials = vec![
        Trial::test(named("a_c_program_gets_what_rust_gets", missing), move || {
            program_agrees(&c.unwrap_or_default())
        })
        .with_ignored_flag(missing.is_some()),
        Trial::test(named("the_header_is_c_plus_plus_too", missing_cpp), move || {
            cpp_compiles(&cpp.unwrap_or_default())
        })
        .with_ignored_flag(missing_cpp.is_some()),
        Trial::test("versions_agree", versions_agree),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
