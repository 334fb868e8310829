//! Programs under `mpirun`.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;
use tiebeam::store::File;

/// `mpirun`, on a machine that may have fewer cores than ranks, also for root, as in containers.
pub fn mpirun() -> Command {
    let mut command = Command::new("mpirun");
    command
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
        .env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
    // Each rank of a software driver would take all cores.
    command.env("LP_NUM_THREADS", "1");
    command
}

/// Whether `mpirun` is Open MPI's.
pub fn is_open_mpi() -> bool {
    let output =
        Command::new("mpirun").arg("--version").output().expect("mpirun starts; `make mpi` installs it");
    String::from_utf8_lossy(&output.stdout).contains("Open MPI")
}

/// `mpirun` that leaves ranks so many seconds to end by themselves. Open MPI waits as long before it tells them to end. The default is
/// one second.
pub fn patient(seconds: u32) -> Command {
    let mut command = mpirun();
    for name in ["OMPI_MCA_odls_base_sigkill_timeout", "PRTE_MCA_odls_base_sigkill_timeout"] {
        command.env(name, seconds.to_string());
    }
    command
}

/// Runs a program on so many ranks.
pub fn on(ranks: usize, program: &Path, arguments: &[&str]) -> Output {
    let mut command = mpirun();
    command.arg("-n").arg(ranks.to_string()).arg(program).args(arguments);
    command.output().expect("mpirun starts; `make mpi` installs it")
}

/// What a program has printed on stderr.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Lines of stderr that begin with `error: `.
pub fn errors(output: &Output) -> Vec<String> {
    said(output).lines().filter_map(|line| line.strip_prefix("error: ")).map(String::from).collect()
}

/// The command under test.
pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_tiebeam-mpi"))
}

/// A folder with a text and settings of a small model.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        let text: String = (0..4000u64).map(|i| char::from(b'a' + (i * i / 3 % 17) as u8)).collect();
        std::fs::write(place.path("text.txt"), &text).unwrap();
        std::fs::write(place.path("other.txt"), text.replace('b', "x")).unwrap();
        let model = "width = 32\nheads = 2\ndepth = 4\ncontext = 16\nhidden = 64\nsharing = \"tied\"\n";
        std::fs::write(place.path("lm.toml"), model).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The arguments of a training into a folder of this name.
    pub fn train(&self, out: &str, more: &[&str]) -> Vec<String> {
        let fixed =
            ["train", "--model", &self.text("lm.toml"), "--text", &self.text("text.txt")].map(String::from);
        let rest =
            ["--out", &self.text(out), "--batch", "8", "--steps", "30", "--every", "10"].map(String::from);
        fixed.into_iter().chain(rest).chain(more.iter().map(ToString::to_string)).collect()
    }
}

pub fn run(ranks: usize, arguments: &[String]) -> Output {
    on(ranks, program(), &arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The tensors of a file, as bytes.
pub fn tensors(path: &Path) -> Vec<(String, Vec<u8>)> {
    let file = File::open(path).unwrap();
    file.names().map(|name| (name.to_string(), file.bytes(name).unwrap().to_vec())).collect()
}

/// Runs two ranks with arguments of their own, the second one below a command such as `env`.
pub fn two(first: &[String], second: &[String], env: &[&str]) -> Output {
    let mut job = mpirun();
    job.args(["-n", "1"]).arg(program()).args(first).args([":", "-n", "1"]);
    job.args(env).arg(program()).args(second).output().unwrap()
}

/// Models of a few tensors.
pub fn model(path: &Path, seed: u64) {
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
