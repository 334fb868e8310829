//! The command `tiebeam-mpi`: subcommands of `tiebeam` on the ranks that `mpirun` has started.

use std::process::ExitCode;
use tiebeam_cli::ranks::{Outcome, main_on};

fn main() -> ExitCode {
    let mut usage = None;
    let ended = tiebeam_mpi::run(|world| match main_on(world) {
        Outcome::Done => Ok(()),
        Outcome::Usage(code) => {
            // All ranks know of it, and one has said what is wrong.
            usage = Some(ExitCode::from(code));
            Ok(())
        }
        Outcome::Failed(error) => Err(error),
    });
    usage.unwrap_or(ended)
}
