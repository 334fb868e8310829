//! Lists `shaders/` in a table of embedded texts, so that a new kernel needs no Rust edit.
//!
//! A kernel is found by its file's name, in whichever folder it is. A fragment, which is in a folder's `lib/` or in
//! `shaders/lib/`, is found as `lib/NAME`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=shaders");
    // Sorted: the table must not depend on the order in which the disk lists files.
    let mut found = BTreeMap::new();
    collect(Path::new("shaders"), "shaders", &mut found);
    let mut table = String::from("&[\n");
    // FNV-1a over all texts, because measured choices of kernels are only valid for the kernels that were measured.
    let mut hash = 0xcbf29ce484222325u64;
    for (name, file) in &found {
        // The root comes from the compiler's environment: no absolute path is written into the table.
        let text = format!(r#"include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/{file}"))"#);
        writeln!(table, r#"    ("{name}", "{file}", {text}),"#).expect("writing to a string");
        let text = fs::read(file).unwrap_or_else(|e| panic!("{file}: {e}"));
        for byte in name.bytes().chain(text) {
            hash = (hash ^ byte as u64).wrapping_mul(0x100000001b3);
        }
    }
    table.push_str("]\n");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    for (name, text) in [("shaders.rs", table), ("kernels.txt", format!("{hash:016x}"))] {
        let path = Path::new(&out).join(name);
        fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

/// Collects the kernels and fragments of a folder and its subfolders, by name. `path` is the folder with slashes on
/// every system.
fn collect(folder: &Path, path: &str, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{path}: {e}")) {
        let entry = entry.expect("a readable folder");
        let Ok(file) = entry.file_name().into_string() else { continue };
        let inner = format!("{path}/{file}");
        if entry.path().is_dir() {
            collect(&entry.path(), &inner, found);
        } else if let Some(name) = file.strip_suffix(".wgsl") {
            let name = if path.ends_with("/lib") { format!("lib/{name}") } else { name.to_string() };
            if let Some(other) = found.insert(name, inner.clone()) {
                panic!("{inner} and {other} have one name: imports and launches would not know which");
            }
        }
    }
}
