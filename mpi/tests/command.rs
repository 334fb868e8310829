//! The command `tiebeam-mpi` under `mpirun`: the results of one rank, what goes on after a stop, and what is said of mistakes.

mod support;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use support::{Place, errors, is_open_mpi, model, mpirun, patient, program, run, said, tensors, two};
use tiebeam::store::File;

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

/// `mpirun` stands for Slurm's `srun`, which takes these options and no others. It ends early where there is a file `early`, as a rank does
/// that gets a signal before it listens. `scontrol` writes down what it is asked.
#[test]
fn the_script_for_slurm_goes_on_after_its_time_limit() {
    let place = Place::new();
    let asked = place.path("asked");
    let early = place.path("early");
    let srun = format!(
        "[ \"$1 $2 $3 $4 $5\" = '--mpi=pmix --gpu-bind=none --cpus-per-task=3 --kill-on-bad-exit=0 --wait=60' ] || exit 9\nshift 5\n\
         if [ -f '{}' ]; then exit 143; fi\nexec mpirun -n 2 \"$@\"",
        early.display()
    );
    shim(&place, "srun", &srun);
    shim(&place, "scontrol", &format!("echo \"$@\" >>'{}'", asked.display()));
    // The ranks have a name by which they are found.
    let alias = place.path("tiebeam-slurm");
    std::fs::copy(program(), &alias).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/cluster/train.sbatch");
    let path = format!("{}:{}", place.path("bin").display(), std::env::var("PATH").unwrap());
    let job = || {
        let mut job = Command::new("sh");
        job.envs(mpirun().get_envs().map(|(name, value)| (name, value.unwrap())));
        job.envs([("PATH", &*path), ("SLURM_JOB_ID", "42"), ("SLURM_CPUS_PER_TASK", "3")]);
        job.env("TIEBEAM_MPI", &alias).arg(&script);
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
    std::fs::write(&early, "").unwrap();
    assert_eq!(job().wait_with_output().unwrap().status.code(), Some(143));
    assert_eq!(std::fs::read_to_string(&asked).unwrap(), "requeue 42\n".repeat(2));
    std::fs::remove_file(&early).unwrap();
    let second = job().wait_with_output().unwrap();
    assert!(second.status.success() && said(&second).contains("goes on after step "), "{}", said(&second));
    assert_eq!(std::fs::read_to_string(&asked).unwrap(), "requeue 42\n".repeat(2), "no more");
}

/// Ranks with other words than rank 0's are told apart before they take each other's messages for something else.
#[test]
fn ranks_of_other_commands_are_told() {
    let place = Place::new();
    std::fs::write(place.path("rows.safetensors"), "none").unwrap();
    for seed in 0..2 {
        model(&place.path(&format!("m{seed}.safetensors")), seed);
    }
    let recipe = "merge_method: linear\nmodels:\n- {model: m0.safetensors, parameters: {weight: 1}}\n- {model: m1.safetensors, \
                  parameters: {weight: 1}}\n";
    std::fs::write(place.path("a.yaml"), recipe).unwrap();
    std::fs::write(place.path("b.yaml"), recipe.replace("weight: 1}}\n-", "weight: 2}}\n-")).unwrap();
    let words = |text: String| text.split(' ').map(String::from).collect::<Vec<String>>();
    let train = place.train("out", &[]);
    let merge = |file: &str| words(format!("merge {} --out {}", place.text(file), place.text("out")));
    let zoo = |more: &str| {
        let (text, out) = (place.text("text.txt"), place.text("out"));
        words(format!("zoo lm --text {text} --out {out} --scale tiny --variants tied --steps 3 {more}"))
    };
    let predict =
        |more: &str| words(format!("predict none {} {}{more}", place.text("text.txt"), place.text("out")));
    let data: Vec<String> =
        train.iter().map(|word| if word == "--text" { "--data".into() } else { word.clone() }).collect();
    let cases = [
        (&train, merge("a.yaml"), "`command` is 'merge' there and 'train --text' on rank 0"),
        (&train, data, "`command` is 'train --data' there and "),
        (&merge("a.yaml"), merge("b.yaml"), "`the recipe` is '"),
        (
            &merge("a.yaml"),
            [merge("a.yaml"), words("--shard-size 1MB".into())].concat(),
            "`--shard-size` is '1000000' there",
        ),
        (
            &merge("a.yaml"),
            [merge("a.yaml"), words("--dry-run".into())].concat(),
            "`--dry-run` is 'true' there",
        ),
        (&zoo("--seeds 1"), zoo("--seeds 1,2"), "`--seeds` is '{1, 2}' there and '{1}' on rank 0"),
        (&zoo("--seeds 1"), zoo("--seeds 1 --precision f16"), "`--precision` is 'f16' there"),
        (&predict(""), predict(" --rotations 8"), "`--rotations` is '8' there"),
        (&predict(""), predict(" --energy-key E"), "`keys` is "),
    ];
    for (i, (first, second, wanted)) in cases.iter().enumerate() {
        let output = two(first, second, &[]);
        let told = errors(&output);
        assert!(!output.status.success() && told.len() == 1, "case {i}: {}", said(&output));
        let start = format!("rank 1 is of another run than rank 0: {wanted}");
        assert!(told[0].starts_with(&start), "case {i}: {}", told[0]);
    }
    // Arguments that are none on one rank only.
    let usage = two(&train, &words("train --nothing".into()), &[]);
    assert!(!usage.status.success(), "{}", said(&usage));
    assert_eq!(said(&usage).matches("unexpected argument '--nothing'").count(), 1, "{}", said(&usage));
}

#[test]
fn mistakes_are_said_once() {
    let place = Place::new();
    let text = |arguments: &[String], from: &str, to: &str| {
        arguments.iter().map(|word| word.replace(from, to)).collect::<Vec<String>>()
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
    // What all ranks find in the midst of the steps, by gradients and by scalars.
    for exchange in ["gradients", "scalars"] {
        let output = run(2, &place.train(exchange, &["--lr", "1e38", "--exchange", exchange]));
        let told = errors(&output);
        assert!(!output.status.success() && told.len() == 1, "{}", said(&output));
        assert!(told[0].contains("smaller learning rate"), "{told:?}");
    }
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

/// The arguments of a training of a network on rows.
fn rows_of(place: &Place, out: &str, exchange: &str) -> Vec<String> {
    classes(&place.path("rows.safetensors"));
    std::fs::write(place.path("net.toml"), "layers = [12, 3]\n").unwrap();
    let (model, data, out) = (place.text("net.toml"), place.text("rows.safetensors"), place.text(out));
    let words = ["train", "--model", &model, "--data", &data, "--out", &out, "--exchange", exchange];
    let more = ["--batch", "32", "--steps", "400", "--every", "200"];
    words.iter().chain(&more).map(ToString::to_string).collect()
}

/// Ranks tell each other one byte a step, and end with equal hashes.
#[test]
fn scalars_end_with_equal_hashes() {
    let place = Place::new();
    let accuracy = |output: &Output| {
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let line =
            printed.lines().find_map(|line| line.strip_prefix("held out: ")).expect("a result").to_string();
        line.split(' ').next().unwrap().parse::<f64>().unwrap()
    };
    for exchange in ["gradients", "scalars", "scalars:8"] {
        let output = run(3, &rows_of(&place, exchange, exchange));
        assert!(output.status.success(), "{}", said(&output));
        assert!(accuracy(&output) > 0.9, "{exchange}: {}", accuracy(&output));
        assert!(said(&output).contains(" on all 3 ranks"), "{}", said(&output));
    }
    let again = run(3, &rows_of(&place, "again", "scalars:8"));
    let model = |out: &str| tensors(&place.path(out).join("model.safetensors"));
    assert!(again.status.success() && model("again") == model("scalars:8"));
}

/// Also where one has another driver: Mesa's OpenGL, whose compiler gets the kernels as GLSL. A machine without it says so.
#[test]
fn scalars_end_with_equal_hashes_on_two_drivers() {
    let place = Place::new();
    let arguments = rows_of(&place, "both", "scalars:8");
    let alone = Command::new(program()).env("TIEBEAM_BACKEND", "gl").args(&arguments).output().unwrap();
    if !alone.status.success() {
        assert!(errors(&alone)[0].contains("no GPU adapter"), "{}", said(&alone));
        let text = "SKIPPED: scalars_end_with_equal_hashes_on_two_drivers, since this machine has no adapter of OpenGL\n";
        // Not `eprint`, which is shown for tests that fail only.
        std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes()).unwrap();
        return;
    }
    std::fs::remove_dir_all(place.path("both")).unwrap();
    let gl = ["env", "TIEBEAM_BACKEND=gl"];
    let both = two(&arguments, &arguments, &gl);
    assert!(both.status.success() && digest(&both).len() == 32, "{}", said(&both));
    let language = place.train("lm", &["--exchange", "scalars:8"]);
    let language = two(&language, &language, &gl);
    assert!(language.status.success(), "{}", said(&language));
    for output in [both, language] {
        let told = said(&output);
        assert!(told.contains(" on all 2 ranks") && !told.contains("had other parameters"), "{told}");
    }
}
