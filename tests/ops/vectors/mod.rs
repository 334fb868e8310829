//! The reference vectors, one test per file, named `family_file`. Sizes and settings come from the files.
//!
//! `TIEBEAM_VECTORS=DIR` reads another folder with the same subfolders and file names. A family that is missing there is reported
//! as ignored. A missing file of a family that exists fails.

mod adapters;
mod assignment;
mod matching;
mod merging;
mod ponita;
mod sharing;
mod smollm;
mod tying;

use libtest_mimic::Trial;

/// Checks one file. Each module of a family lists its files in `FILES`.
type Check = fn(&std::path::Path);

pub fn trials() -> Vec<Trial> {
    let families: &[(&str, &[(&str, Check)])] = &[
        ("tying", tying::FILES),
        ("tying", sharing::FILES),
        // The same kinds of files with other sizes and seeds, and with grouped key heads.
        ("tying_2", tying::FILES),
        ("tying_2", sharing::FILES),
        ("adapters", adapters::FILES),
        ("matching", assignment::FILES),
        ("matching", matching::FILES),
        ("matching", merging::FILES),
        ("ponita", ponita::FILES),
        ("smollm", smollm::FILES),
    ];
    let files = families.iter().flat_map(|&(family, files)| files.iter().map(move |f| (family, f.0, f.1)));
    files
        .map(|(family, file, check)| {
            let dir = crate::support::vectors().join(family);
            let present = dir.is_dir();
            let path = dir.join(format!("{file}.safetensors"));
            let name = format!("vectors::{family}_{file}");
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
        .collect()
}
