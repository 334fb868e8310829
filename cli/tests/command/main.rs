//! The command `tiebeam`, run as a process.

mod bench;
mod conversion;
mod language;
mod merge;
#[path = "../../../tests/systems/merges.rs"]
mod merges;
mod models;
mod network;
mod predict;
mod quantise;
mod scores;
#[path = "../../../tests/support/mod.rs"]
mod support;
mod surface;

use std::path::PathBuf;
use std::process::Command;

/// The command. `TIEBEAM_BIN` names it for tests that run where they were not built. Otherwise it is the one that cargo built with
/// the tests.
pub fn command() -> Command {
    let named = std::env::var_os("TIEBEAM_BIN").map(PathBuf::from);
    let path = named.unwrap_or_else(|| env!("CARGO_BIN_EXE_tiebeam").into());
    assert!(path.is_file(), "{} is no file: set TIEBEAM_BIN to the command", path.display());
    // An absolute path, because some tests run it in another folder.
    let mut command = Command::new(std::path::absolute(&path).expect("a path"));
    command.env_remove("TIEBEAM_MEMORY");
    command
}

/// Output as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
