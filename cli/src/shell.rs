//! `tiebeam completions` and `tiebeam man`.

use crate::context::Context;
use clap::Command;
use clap_complete::Shell;
use std::path::Path;
use tiebeam::{Error, Result};

/// Where shells look for completions.
pub const EXAMPLES: &str = "\
Examples:
  tiebeam completions bash > ~/.local/share/bash-completion/completions/tiebeam
  tiebeam completions zsh > ~/.zfunc/_tiebeam
  tiebeam completions fish > ~/.config/fish/completions/tiebeam.fish";

pub fn completions(shell: Shell, mut command: Command, context: &Context) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, "tiebeam", &mut text);
    context.expect_data(Some(Path::new("-")))?;
    context.write(Path::new("-"), &String::from_utf8_lossy(&text))
}

pub fn man(folder: &Path, command: Command, context: &Context) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    clap_mangen::generate_to(command, folder).map_err(|e| Error::io(folder, e))?;
    context.note(format_args!("wrote manual pages to {}", folder.display()));
    Ok(())
}
