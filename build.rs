//! Lists `shaders/` in a table of embedded texts, so that a new kernel needs no Rust edit.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=shaders");
    let mut table = String::from("&[\n");
    // FNV-1a over all texts: measured choices of kernels are only good for the kernels that were measured.
    let mut hash = 0xcbf29ce484222325u64;
    for folder in ["", "lib/"] {
        for name in wgsl_in(&Path::new("shaders").join(folder)) {
            // The root comes from the compiler's environment: no absolute path is written into the table.
            writeln!(
                table,
                r#"    ("{folder}{name}", include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/{folder}{name}.wgsl"))),"#
            )
            .expect("writing to a string");
            let file = Path::new("shaders").join(folder).join(format!("{name}.wgsl"));
            let text = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            for byte in name.bytes().chain(text) {
                hash = (hash ^ byte as u64).wrapping_mul(0x100000001b3);
            }
        }
    }
    table.push_str("]\n");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let path = Path::new(&out).join("shaders.rs");
    let kernels = Path::new(&out).join("kernels.txt");
    fs::write(&kernels, format!("{hash:016x}")).unwrap_or_else(|e| panic!("{}: {e}", kernels.display()));
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
