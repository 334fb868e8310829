//! The reference vectors: one test a file, named `family_file`. Sizes and settings come from the files.
//!
//! `TIEBEAM_VECTORS=DIR` reads another folder with the same subfolders and file names. A family that is absent there is
//! reported as ignored; a file missing inside a present family fails.

#[path = "support/sharing.rs"]
mod sharing;
mod support;
#[path = "support/tying.rs"]
mod tying;

use libtest_mimic::{Arguments, Trial};
use std::path::PathBuf;

/// The folder of vectors.
fn folder() -> PathBuf {
    match std::env::var_os("TIEBEAM_VECTORS") {
        Some(dir) => dir.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors"),
    }
}

type Check = fn(&std::path::Path);

fn main() {
    let args = Arguments::from_args();
    let files: [(&str, &str, Check); 7] = [
        ("tying", "tied_gpt_rms", tying::tied_gpt),
        ("tying", "tied_gpt_ln", tying::tied_gpt),
        ("tying", "adamw_tied", tying::adamw_tied),
        ("tying", "masa", sharing::masa),
        ("tying", "mor_expert_choice", sharing::mor_expert_choice),
        ("tying", "rps_hashed", sharing::rps_hashed),
        ("tying", "shards_and_mixed_depth", sharing::shards_and_mixed_depth),
    ];
    let trials = files
        .into_iter()
        .map(|(family, file, check)| {
            let dir = folder().join(family);
            let present = dir.is_dir();
            let path = dir.join(format!("{file}.safetensors"));
            let name = format!("{family}_{file}");
            if !present {
                let name = format!("{name} (ignored: no folder {})", dir.display());
                return Trial::test(name, || Ok(())).with_ignored_flag(true);
            }
            Trial::test(name, move || {
                check(&path);
                Ok(())
            })
        })
        .collect();
    libtest_mimic::run(&args, trials).exit();
}
