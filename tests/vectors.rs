//! The reference vectors: one test a file, named `family_file`. Sizes and settings come from the files.
//!
//! `TIEBEAM_VECTORS=DIR` reads another folder with the same subfolders and file names. A family that is absent there is
//! reported as ignored; a file missing inside a present family fails.

#[path = "support/assignment.rs"]
mod assignment;
#[path = "support/matching.rs"]
mod matching;
#[path = "support/merging.rs"]
mod merging;
#[path = "support/ponita.rs"]
mod ponita;
#[path = "support/sharing.rs"]
mod sharing;
#[path = "support/smollm.rs"]
mod smollm;
mod support;
#[path = "support/tying.rs"]
mod tying;

use libtest_mimic::{Arguments, Trial};

/// Checks one file. Each module of a family lists its files in `FILES`.
type Check = fn(&std::path::Path);

fn main() {
    let args = Arguments::from_args();
    let families: &[(&str, &[(&str, Check)])] = &[
        ("tying", tying::FILES),
        ("tying", sharing::FILES),
        // The same files of other sizes and seeds, with grouped key heads.
        ("tying_2", tying::FILES),
        ("tying_2", sharing::FILES),
        ("matching", assignment::FILES),
        ("matching", matching::FILES),
        ("matching", merging::FILES),
        ("ponita", ponita::FILES),
        ("smollm", smollm::FILES),
    ];
    let files = families.iter().flat_map(|&(family, files)| files.iter().map(move |f| (family, f.0, f.1)));
    let trials = files
        .map(|(family, file, check)| {
            let dir = support::vectors().join(family);
            let present = dir.is_dir();
            let path = dir.join(format!("{file}.safetensors"));
            let name = format!("{family}_{file}");
            if !present {
                let name = format!("{name} (ignored: no folder {})", dir.display());
                return Trial::test(name, || Ok(())).with_ignored_flag(true);
            }
            if let Some(reason) = (family == "smollm").then(smollm::lacks).flatten() {
                return Trial::test(format!("{name} (ignored: {reason})"), || Ok(())).with_ignored_flag(true);
            }
            Trial::test(name, move || {
                check(&path);
                Ok(())
            })
        })
        .collect();
    libtest_mimic::run(&args, trials).exit();
}
