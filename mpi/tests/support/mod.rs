//! Programs under `mpirun`.
#![allow(dead_code)]

use std::path::Path;
use std::process::{Command, Output};

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
