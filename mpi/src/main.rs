//! The command `tiebeam-mpi`: subcommands of `tiebeam` on the ranks that `mpirun` has started.

use std::io::Write;
use std::process::ExitCode;
use tiebeam::ranks::Ranks;
use tiebeam_cli::ranks::{Outcome, main_on};
use tiebeam_cli::status;
use tiebeam_mpi::World;

fn main() -> ExitCode {
    let world = match World::init() {
        Ok(world) => world,
        Err(error) => {
            say(&format!("error: {error}\n"));
            return ExitCode::FAILURE;
        }
    };
    match main_on(world.clone()) {
        Outcome::Done => ExitCode::SUCCESS,
        Outcome::Usage(code) => ExitCode::from(code),
        Outcome::Failed(error) => {
            // What all ranks know of is said once. What only this one knows ends the others, which wait for it.
            match (world.is_known() || world.size() == 1, world.rank()) {
                (true, 0) => say(&format!("error: {error}\n")),
                (true, _) => {}
                (false, rank) => say(&format!("error: rank {rank}: {error}\n")),
            }
            world.abort_unless_known(status(&error));
            ExitCode::from(status(&error))
        }
    }
}

/// Writes to stderr. `eprint` would panic if it is closed.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
