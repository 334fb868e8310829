//! The command `tiebeam`. All of it is in the library beside this, which `tiebeam-mpi` runs on many ranks.

use std::process::ExitCode;

fn main() -> ExitCode {
    tiebeam_cli::main()
}
