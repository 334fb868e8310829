//! The command `tiebeam-mpi` under `mpirun`: the results of one rank, what goes on after a stop, and what is said of mistakes.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use support::{errors, is_open_mpi, mpirun, on, patient, said};
use tempfile::TempDir;
use tiebeam::geometry::xyz::{Frame, Writer};
use tiebeam::geometry::{Grid, PonitaConfig, Potential};
use tiebeam::store::File;

/// The command under test.
fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_tiebeam-mpi"))
}

/// A folder with a text and settings of a small model.
struct Place(TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        let text: String = (0..4000u64).map(|i| char::from(b'a' + (i * i / 3 % 17) as u8)).collect();
        std::fs::write(place.path("text.txt"), &text).unwrap();
        std::fs::write(place.path("other.txt"), text.replace('b', "x")).unwrap();
        let model = "width = 32\nheads = 2\ndepth = 4\ncontext = 16\nhidden = 64\nsharing = \"tied\"\n";
        std::fs::write(place.path("lm.toml"), model).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The arguments of a training into a folder of this name.
    fn train(&self, out: &str, more: &[&str]) -> Vec<String> {
        let fixed =
            ["train", "--model", &self.text("lm.toml"), "--text", &self.text("text.txt")].map(String::from);
        let rest =
            ["--out", &self.text(out), "--batch", "8", "--steps", "30", "--every", "10"].map(String::from);
        fixed.into_iter().chain(rest).chain(more.iter().map(ToString::to_string)).collect()
    }
}

fn run(ranks: usize, arguments: &[String]) -> Output {
    on(ranks, program(), &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The tensors of a file, as bytes.
fn tensors(path: &Path) -> Vec<(String, Vec<u8>)> {
    let file = File::open(path).unwrap();
    file.names().map(|name| (name.to_string(), file.bytes(name).unwrap().to_vec())).collect()
}

fn points(place: &Place, out: &str) -> Vec<[f64; 2]> {
    let text = std::fs::read_to_string(place.path(out).join("curve.jsonl")).unwrap();
    let line = |line: &str| {
        let json: serde_json::Value = serde_json::from_str(line).unwrap();
        ["loss", "validation"].map(|name| json[name].as_f64().unwrap())
    };
    text.lines().map(line).collect()
}

#[test]
fn training_has_the_same_bits_each_time_and_the_curve_of_one_rank() {
    let place = Place::new();
    for (ranks, out, more) in [
        (1, "one", &[][..]),
        (2, "two", &[]),
        (2, "again", &[]),
        (2, "parts", &["--accumulate", "2"]),
        (4, "four", &[]),
    ] {
        let output = run(ranks, &place.train(out, more));
        assert!(output.status.success(), "{}", said(&output));
        let first = if ranks == 1 { "1 rank; ".to_string() } else { format!("{ranks} ranks\n") };
        assert!(said(&output).starts_with(&first), "{}", said(&output));
        let printed = String::from_utf8_lossy(&output.stdout);
        assert_eq!(printed.matches("held out").count(), 4, "rank 0 alone prints: {printed}");
    }
    let model = |out: &str| tensors(&place.path(out).join("model.safetensors"));
    assert!(model("two") == model("again"), "the same bits for the same number of ranks");
    assert!(model("two") != model("one"), "sums in another order");
    let one = points(&place, "one");
    for out in ["two", "parts", "four"] {
        for (a, b) in points(&place, out).iter().flatten().zip(one.iter().flatten()) {
            assert!((a - b).abs() < 1e-3, "{out}: {:?} and {one:?}", points(&place, out));
        }
    }
}

/// Waits until a file is there.
fn wait_for(path: &Path) {
    let start = Instant::now();
    while !path.is_file() {
        assert!(start.elapsed() < Duration::from_secs(120), "{} comes", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn signal(kind: &str, pid: &str) {
    assert!(Command::new("kill").args([kind, pid]).status().unwrap().success());
}

#[test]
fn a_stopped_training_goes_on_with_the_same_bits_and_on_other_numbers_of_ranks() {
    let place = Place::new();
    let long = ["--steps", "900", "--lr", "0.002", "--warmup", "3"];
    let start = |out: &str, more: &[&str]| {
        let all: Vec<&str> = long.iter().chain(more).copied().collect();
        // The last of an option that is given twice counts.
        place
            .train(out, &[])
            .into_iter()
            .filter(|word| word != "--steps" && word != "30")
            .chain(all.iter().map(ToString::to_string))
            .collect::<Vec<_>>()
    };
    let whole = run(2, &start("whole", &[]));
    assert!(whole.status.success(), "{}", said(&whole));
    let mut job = patient(4);
    job.args(["-n", "2"]).arg(program()).args(start("halves", &[]));
    let job = job.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&place.path("halves").join("checkpoint.safetensors"));
    // Ctrl-C, and what a scheduler sends.
    signal("-TERM", &job.id().to_string());
    let output = job.wait_with_output().unwrap();
    assert!(said(&output).contains("told to end: first the present step is done and "), "{}", said(&output));
    let told = errors(&output);
    assert!(told.len() == 1 && told[0].starts_with("stopped after step "), "{}", said(&output));
    let checkpoint = place.path("halves").join("checkpoint.safetensors");
    let kept = std::fs::read(&checkpoint).unwrap();
    let resumed = run(2, &start("halves", &["--resume"]));
    assert!(resumed.status.success(), "{}", said(&resumed));
    let model = |out: &str| tensors(&place.path(out).join("model.safetensors"));
    assert!(model("whole") == model("halves"), "as if it had not been stopped");
    std::fs::remove_file(place.path("halves").join("model.safetensors")).unwrap();
    std::fs::write(&checkpoint, kept).unwrap();
    let other = run(4, &start("halves", &["--resume"]));
    assert!(other.status.success(), "{}", said(&other));
    let (a, b) = (points(&place, "whole"), points(&place, "halves"));
    let near = a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| (a - b).abs() < 0.05);
    assert!(a.len() == b.len() && near, "{a:?} {b:?}");
}

#[test]
fn a_rank_that_dies_leaves_a_whole_checkpoint() {
    let place = Place::new();
    let mut job = patient(2);
    // Rank 1 has a name by which it is found.
    let alias = place.path("tiebeam-rank-1");
    std::fs::copy(program(), &alias).unwrap();
    let arguments: Vec<String> = place
        .train("out", &[])
        .into_iter()
        .map(|word| if word == "30" { "100000".into() } else { word })
        .collect();
    job.args(["-n", "1"]).arg(program()).args(&arguments);
    job.args([":", "-n", "1"]).arg(&alias).args(&arguments);
    let job = job.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let checkpoint = place.path("out").join("checkpoint.safetensors");
    wait_for(&checkpoint);
    assert!(Command::new("pkill").args(["-KILL", "-x", "tiebeam-rank-1"]).status().unwrap().success());
    let output = job.wait_with_output().unwrap();
    assert!(!output.status.success());
    // MPICH kills the others at once.
    if is_open_mpi() {
        assert!(
            said(&output).contains("If a rank has died, or MPI does not wait so long, "),
            "{}",
            said(&output)
        );
    }
    let file = File::open(&checkpoint).unwrap();
    assert!(file.metadata().contains_key("tiebeam.step"), "{:?}", file.metadata());
    // It is gone on from.
    let short: Vec<String> =
        arguments.iter().map(|word| if word == "100000" { "30".into() } else { word.clone() }).collect();
    let other = run(2, &[short, vec!["--resume".into()]].concat());
    assert!(errors(&other)[0].contains("`train.steps` is '100000' there and '30' here"), "{}", said(&other));
}

/// Writes a program of the shell into the folder that stands before all others in the script's path.
fn shim(place: &Place, name: &str, text: &str) {
    let path = place.path("bin").join(name);
    std::fs::create_dir_all(place.path("bin")).unwrap();
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
}

/// `mpirun` stands for Slurm's `srun`, and `scontrol` writes down what it is asked.
#[test]
fn the_script_for_slurm_goes_on_after_its_time_limit() {
    let place = Place::new();
    let asked = place.path("asked");
    shim(&place, "srun", "while [ \"${1#--}\" != \"$1\" ]; do shift; done; exec mpirun -n 2 \"$@\"");
    shim(&place, "scontrol", &format!("echo \"$@\" >>'{}'", asked.display()));
    // The ranks have a name by which they are found.
    let alias = place.path("tiebeam-slurm");
    std::fs::copy(program(), &alias).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/cluster/train.sbatch");
    let path = format!("{}:{}", place.path("bin").display(), std::env::var("PATH").unwrap());
    let job = || {
        let mut job = Command::new("sh");
        job.envs(mpirun().get_envs().map(|(name, value)| (name, value.unwrap())));
        job.envs([("PATH", &*path), ("SLURM_JOB_ID", "42")]).env("TIEBEAM_MPI", &alias).arg(&script);
        job.args(["lm.toml", "text.txt", "out"].map(|name| place.path(name)));
        job.args(["--batch", "8", "--steps", "700", "--every", "10"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        job.spawn().unwrap()
    };
    let first = job();
    wait_for(&place.path("out").join("checkpoint.safetensors"));
    assert!(Command::new("pkill").args(["-TERM", "-x", "tiebeam-slurm"]).status().unwrap().success());
    let first = first.wait_with_output().unwrap();
    assert_eq!(first.status.code(), Some(130), "{}", said(&first));
    assert_eq!(std::fs::read_to_string(&asked).unwrap(), "requeue 42\n");
    let second = job().wait_with_output().unwrap();
    assert!(second.status.success() && said(&second).contains("goes on after step "), "{}", said(&second));
    assert_eq!(std::fs::read_to_string(&asked).unwrap(), "requeue 42\n", "only once");
}

#[test]
fn mistakes_are_said_once() {
    let place = Place::new();
    let text = |arguments: &[String], from: &str, to: &str| {
        arguments.iter().map(|word| word.replace(from, to)).collect::<Vec<String>>()
    };
    let two = |first: &[String], second: &[String], env: &[&str]| {
        let mut job = mpirun();
        job.args(["-n", "1"]).arg(program()).args(first).args([":", "-n", "1"]);
        job.args(env).arg(program()).args(second).output().unwrap()
    };
    let good = place.train("out", &[]);
    let cases = [
        (
            two(&good, &text(&good, "text.txt", "other.txt"), &[]),
            "rank 1 is of another run than rank 0: `train.data` is ",
        ),
        (
            two(&good, &[good.clone(), vec!["--seed".into(), "2".into()]].concat(), &[]),
            "rank 1 is of another run than rank 0: `train.seed` is '2' there and '1' on rank 0",
        ),
        (
            two(&good, &good, &["env", "TIEBEAM_ADAPTER=nosuch"]),
            "rank 1: no GPU adapter: no adapter's name contains 'nosuch'",
        ),
        (two(&good, &text(&good, "text.txt", "none.txt"), &[]), "rank 1: "),
        (run(2, &text(&good, "text.txt", "none.txt")), ""),
        (
            run(
                3,
                &place
                    .train("out", &[])
                    .iter()
                    .map(|w| if w == "8" { "2".into() } else { w.clone() })
                    .collect::<Vec<_>>(),
            ),
            "a step of 2 windows cannot be cut into 3 parts",
        ),
    ];
    for (i, (output, wanted)) in cases.iter().enumerate() {
        let told = errors(output);
        assert!(!output.status.success(), "case {i}");
        assert!(told.len() == 1 && told[0].starts_with(wanted), "case {i}: {}", said(output));
    }
    assert!(!place.path("out").exists(), "nothing was written");
    let usage = run(2, &["bench".to_string()]);
    assert_eq!(said(&usage).matches("unrecognized subcommand 'bench'").count(), 1, "{}", said(&usage));
}

#[test]
fn a_program_without_mpirun_is_one_rank() {
    let place = Place::new();
    let output = Command::new(program()).args(place.train("out", &[])).output().unwrap();
    assert!(
        output.status.success() && said(&output).starts_with("1 rank; `mpirun -n 4 "),
        "{}",
        said(&output)
    );
}

/// As under an mpirun or a Slurm that does not fit the MPI of the program.
#[test]
fn processes_that_do_not_see_each_other_are_refused() {
    let place = Place::new();
    let output = Command::new(program())
        .env("SLURM_STEP_NUM_TASKS", "8")
        .args(place.train("out", &[]))
        .output()
        .unwrap();
    let told = errors(&output);
    assert!(!output.status.success() && told.len() == 1, "{}", said(&output));
    assert!(told[0].starts_with("MPI: this process was started as one of 8, and "), "{told:?}");
    assert!(!place.path("out").exists());
}

/// Rows of 12 numbers in three classes, which are near their centres.
fn classes(path: &Path) {
    let mut noise = vec![0.0; 600 * 12];
    tiebeam::Rng::new(3).fill_normal(&mut noise);
    let labels: Vec<u32> = (0..600).map(|row| row % 3).collect();
    let x: Vec<f32> =
        (0..600 * 12).map(|i| noise[i] + if i % 12 % 3 == i / 12 % 3 { 1.5 } else { 0.0 }).collect();
    let entries =
        [tiebeam::store::Entry::f32("x", &[600, 12], &x), tiebeam::store::Entry::u32("y", &[600], &labels)];
    tiebeam::store::save(path, entries, &Default::default()).unwrap();
}

/// The hash of the parameters that a run ends with.
fn digest(output: &Output) -> String {
    let said = said(output);
    let line = said.lines().find(|line| line.starts_with("parameters ")).unwrap_or_else(|| panic!("{said}"));
    line.split(' ').nth(1).unwrap().to_string()
}

/// Ranks tell each other one byte a step, and end with equal hashes, also where one has another driver.
#[test]
fn scalars_end_with_equal_hashes_also_on_two_drivers() {
    let place = Place::new();
    classes(&place.path("rows.safetensors"));
    std::fs::write(place.path("net.toml"), "layers = [12, 3]\n").unwrap();
    let network = |out: &str, exchange: &str| {
        let words = ["train", "--model", &place.text("net.toml"), "--data", &place.text("rows.safetensors")]
            .map(String::from);
        let more = [
            "--out",
            &place.text(out),
            "--batch",
            "32",
            "--steps",
            "400",
            "--every",
            "200",
            "--exchange",
            exchange,
        ];
        words.into_iter().chain(more.map(String::from)).collect::<Vec<String>>()
    };
    let accuracy = |output: &Output| {
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let line =
            printed.lines().find_map(|line| line.strip_prefix("held out: ")).expect("a result").to_string();
        line.split(' ').next().unwrap().parse::<f64>().unwrap()
    };
    for exchange in ["gradients", "scalars", "scalars:8"] {
        let output = run(3, &network(exchange, exchange));
        assert!(output.status.success(), "{}", said(&output));
        assert!(accuracy(&output) > 0.9, "{exchange}: {}", accuracy(&output));
        assert!(said(&output).contains(" on all 3 ranks"), "{}", said(&output));
    }
    let again = run(3, &network("again", "scalars:8"));
    let model = |out: &str| tensors(&place.path(out).join("model.safetensors"));
    assert!(again.status.success() && model("again") == model("scalars:8"));
    // The second driver is Mesa's OpenGL, whose compiler gets the kernels as GLSL.
    let two = |arguments: Vec<String>| {
        let mut job = mpirun();
        job.args(["-n", "1"]).arg(program()).args(&arguments).args([
            ":",
            "-n",
            "1",
            "env",
            "TIEBEAM_BACKEND=gl",
        ]);
        job.arg(program()).args(&arguments).output().unwrap()
    };
    let has_gl = Command::new(program())
        .env("TIEBEAM_BACKEND", "gl")
        .args(network("gl", "scalars:8"))
        .output()
        .unwrap();
    if !has_gl.status.success() {
        // A machine may have no OpenGL.
        assert!(errors(&has_gl)[0].contains("no GPU adapter"), "{}", said(&has_gl));
        return;
    }
    let both = two(network("both", "scalars:8"));
    assert!(both.status.success() && digest(&both).len() == 32, "{}", said(&both));
    assert!(
        said(&both).contains(" on all 2 ranks") && !said(&both).contains("had other parameters"),
        "{}",
        said(&both)
    );
    let language = two(place.train("lm", &["--exchange", "scalars:8"]));
    assert!(language.status.success(), "{}", said(&language));
    assert!(
        said(&language).contains(" on all 2 ranks") && !said(&language).contains("had other"),
        "{}",
        said(&language)
    );
}

/// Models of a few tensors.
fn model(path: &Path, seed: u64) {
    let mut rng = tiebeam::Rng::new(seed);
    let shapes = [vec![64, 64], vec![300, 20], vec![7], vec![50, 33], vec![128, 1], vec![1000, 60]];
    let mut all = Vec::new();
    for (i, shape) in shapes.iter().enumerate() {
        let mut values = vec![0.0; shape.iter().product()];
        rng.fill_normal(&mut values);
        all.push((format!("layer.{i}.weight"), shape.clone(), values));
    }
    let entries =
        all.iter().map(|(name, shape, values)| tiebeam::store::Entry::f32(name.clone(), shape, values));
    tiebeam::store::save(path, entries, &Default::default()).unwrap();
}

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect();
    all.sort();
    all
}

#[test]
fn merges_have_the_bytes_of_one_rank() {
    let place = Place::new();
    for seed in 0..3 {
        model(&place.path(&format!("m{seed}.safetensors")), seed);
    }
    let config = "merge_method: ties\nbase_model: m0.safetensors\nmodels:\n- {model: m1.safetensors, parameters: {weight: 1, density: 0.3}}\n- {model: \
                  m2.safetensors, parameters: {weight: 0.5, density: 0.5}}\n";
    std::fs::write(place.path("m.yaml"), config).unwrap();
    let merge = |ranks: usize, out: &str| {
        let words = ["merge", &place.text("m.yaml"), "--out", &place.text(out), "--shard-size", "100kB"]
            .map(String::from);
        run(ranks, &words)
    };
    for (ranks, out) in [(1, "one"), (2, "two"), (4, "four")] {
        let output = merge(ranks, out);
        assert!(output.status.success(), "{}", said(&output));
    }
    let one = files(&place.path("one"));
    assert!(one.len() > 4 && one == files(&place.path("two")) && one == files(&place.path("four")));
    // What one rank finds wrong with its tensor is said, and nothing is left.
    let mut bytes = std::fs::read(place.path("m1.safetensors")).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(place.path("m1.safetensors"), bytes).unwrap();
    let output = merge(3, "bad");
    let told = errors(&output);
    assert!(told.len() == 1 && told[0].contains("has NaN or infinity at element "), "{}", said(&output));
    assert!(!place.path("bad").exists());
}

#[test]
fn a_zoos_runs_are_shared() {
    let place = Place::new();
    let zoo = |ranks: usize, out: &str| {
        let words = [
            "zoo",
            "lm",
            "--text",
            &place.text("text.txt"),
            "--out",
            &place.text(out),
            "--scale",
            "tiny",
            "--steps",
            "4",
        ];
        let more = ["--seeds", "1,2", "--variants", "none,tied,narrow-4", "-q"];
        run(ranks, &words.iter().chain(&more).map(ToString::to_string).collect::<Vec<_>>())
    };
    for (ranks, out) in [(1, "one"), (3, "three")] {
        let output = zoo(ranks, out);
        assert!(output.status.success(), "{}", said(&output));
    }
    let results = |out: &str| {
        let text = std::fs::read_to_string(place.path(out).join("results.jsonl")).unwrap();
        let line = |line: &str| {
            let mut json: serde_json::Value = serde_json::from_str(line).unwrap();
            json.as_object_mut().unwrap().remove("seconds");
            json.to_string()
        };
        text.lines().map(line).collect::<Vec<String>>()
    };
    assert_eq!(results("one"), results("three"));
    assert_eq!(results("one").len(), 6);
    let again = zoo(2, "three");
    assert!(again.status.success() && results("three").len() == 6);
}

/// Clusters of copper and oxygen near a lattice.
fn clusters(count: usize) -> Vec<Frame> {
    let mut rng = tiebeam::Rng::new(5);
    let mut one = |i: usize| {
        let mut draws = [0.0; 3 * 64];
        rng.fill_normal(&mut draws);
        let place = |atom: usize, k: usize| [atom % 4, atom / 4 % 4, atom / 16][k] as f64;
        let at = |atom: usize| {
            std::array::from_fn(|k| 2.4 * (place(atom, k) + 0.1 * f64::from(draws[3 * atom + k])))
        };
        Frame {
            energy: Some(-200.0 + i as f64),
            positions: (0..64).map(at).collect(),
            forces: Some(vec![[0.5, -0.5, 0.25]; 64]),
            species: (0..64).map(|atom| if atom % 3 == 0 { 8 } else { 29 }).collect(),
            ..Frame::default()
        }
    };
    (0..count).map(&mut one).collect()
}

/// A small untrained potential for them.
fn potential(frames: &[Frame], path: &Path) {
    let gpu = tiebeam::Gpu::open().unwrap();
    let config = PonitaConfig::default().channels(8).hidden(8).basis(8).layers(1).radius(Some(4.0));
    let mut rng = tiebeam::Rng::new(3);
    let mut potential = Potential::new(&gpu, frames, config, Grid::icosahedron(), &mut rng).unwrap();
    let batch = potential.batch(&frames.iter().collect::<Vec<_>>()).unwrap();
    potential.net.calibrate(&batch.graph, &batch.input).unwrap();
    potential.save(path).unwrap();
}

#[test]
fn predictions_have_the_bytes_of_one_rank() {
    let place = Place::new();
    let frames = clusters(70);
    potential(&frames[..2], &place.path("model.safetensors"));
    let write = |name: &str, frames: &[Frame]| {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, name);
        frames.iter().try_for_each(|frame| writer.write(frame)).unwrap();
        std::fs::write(place.path(name), &bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    };
    let text = write("in.xyz", &frames);
    let predict = |ranks: usize, input: &str, out: &str| {
        let words = ["predict", &place.text("model.safetensors"), &place.text(input), &place.text(out)]
            .map(String::from);
        run(ranks, &words)
    };
    for (ranks, out) in [(1, "one.xyz"), (2, "two.xyz"), (4, "four.xyz")] {
        let output = predict(ranks, "in.xyz", out);
        assert!(output.status.success(), "{}", said(&output));
    }
    let read = |name: &str| std::fs::read(place.path(name)).unwrap();
    assert!(
        read("one.xyz").len() > 10_000
            && read("one.xyz") == read("two.xyz")
            && read("one.xyz") == read("four.xyz")
    );
    // Rank 0's stdin is everyone's. MPICH's mpirun gives up on more than a pipe holds.
    write("few.xyz", &frames[..2]);
    assert!(predict(1, "few.xyz", "few-out.xyz").status.success());
    let mut job = mpirun();
    job.args(["-n", "3"]).arg(program()).args([
        "predict",
        &place.text("model.safetensors"),
        "-",
        &place.text("piped.xyz"),
    ]);
    let output = job.stdin(std::fs::File::open(place.path("few.xyz")).unwrap()).output().unwrap();
    assert!(output.status.success() && read("piped.xyz") == read("few-out.xyz"), "{}", said(&output));
    // A frame that cannot be predicted, in a batch of rank 1.
    let mut text = text;
    let at = text.match_indices("\nCu ").nth(42 * 40).unwrap().0 + 1;
    text.replace_range(at..at + 2, "U");
    std::fs::write(place.path("bad.xyz"), text).unwrap();
    let output = predict(3, "bad.xyz", "bad-out.xyz");
    let told = errors(&output);
    assert!(told.len() == 1 && told[0].contains("frame 40"), "{}", said(&output));
    assert!(!place.path("bad-out.xyz").exists());
}
