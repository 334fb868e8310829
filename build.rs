//! Lists `shaders/` in a table of embedded texts, so that a new kernel needs no Rust edit.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=shaders");
    let mut table = String::from("&[\n");
    for folder in ["", "lib/"] {
        for name in wgsl_in(&Path::new("shaders").join(folder)) {
            // The root comes from the compiler's environment: no absolute path is written into the table.
            writeln!(
                table,
                r#"    ("{folder}{name}", include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/{folder}{name}.wgsl"))),"#
            )
            .expect("writing to a string");
        }
    }
    table.push_str("]\n");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let path = Path::new(&out).join("shaders.rs");
    fs::write(&path, table).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// Names without `.wgsl`, sorted: the table must not depend on the order in which the disk lists files.
fn wgsl_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.expect("a readable folder").file_name().into_string().ok())
        .filter_map(|file| file.strip_suffix(".wgsl").map(String::from))
        .collect();
    names.sort();
    names
}
