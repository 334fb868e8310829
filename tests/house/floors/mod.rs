//! Checks the floors of the code base: a file uses only modules on floors below its own, and files of one room do not use each
//! other in circles. Reads source text and needs no device.

mod circles;

use circles::code;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;

/// The modules of each floor. `gpu` is the device.
const FLOORS: [&[&str]; 10] = [
    &["chart", "error", "exit", "files", "shape", "dtype", "rng", "linalg", "precision", "ranks", "setters"],
    &["gpu"],
    &["tensor", "tape"],
    &["ops", "step"],
    &["op", "share"],
    &["data", "optim", "store"],
    &["nn"],
    &["models", "quant", "text", "train"],
    // Decoding uses models.
    &["decode", "language", "merge", "geometry"],
    &["bench", "capi"],
];
/// Floors whose modules may use each other.
const SIBLINGS: [usize; 2] = [0, 2];

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|modules| modules.contains(&module))
}

/// Returns the first name of every path that starts at the crate's root, each once. `up` is the number of `super`s that reach the
/// root.
fn roots(code: &str, up: usize) -> BTreeSet<String> {
    let (uses, inline) = circles::paths(code);
    let above = "super::".repeat(up);
    let first = |path: String| {
        let inner = path.strip_prefix("crate::").or_else(|| path.strip_prefix(&above).filter(|_| up > 0))?;
        let name: String = inner.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        (!name.is_empty() && name != "super").then_some(name)
    };
    uses.into_iter().map(|(_, path)| path).chain(inline).filter_map(first).collect()
}

/// Returns what `file` (such as `ops/matmul.rs`) uses from its own floor or above. `exports` are the names that the root
/// re-exports.
fn violations(file: &str, text: &str, exports: &HashMap<String, String>) -> Vec<String> {
    let path: Vec<&str> = file.trim_end_matches(".rs").split('/').filter(|part| *part != "mod").collect();
    let own = path[0];
    if own == "lib" || own == "bin" {
        return Vec::new();
    }
    let Some(mine) = floor(own) else { return vec![format!("{file}: module '{own}' has no floor: add it")] };
    let mut wrong = Vec::new();
    for used in roots(&code(text), path.len()) {
        let module = exports.get(&used).unwrap_or(&used).as_str();
        match floor(module) {
            _ if module == own => {}
            Some(theirs) if theirs < mine || theirs == mine && SIBLINGS.contains(&mine) => {}
            Some(theirs) => {
                wrong.push(format!("{file} (floor {mine}) uses {used} of '{module}' (floor {theirs})"));
            }
            None => wrong.push(format!("{file} uses crate::{used}, which has no floor")),
        }
    }
    if mine != 1 && code(text).contains("wgpu::") {
        wrong.push(format!("{file} talks to wgpu; only gpu does"));
    }
    wrong
}

/// Returns the module of each name that lib.rs re-exports, such as `Gpu -> gpu` from `pub use gpu::{Gpu, Options};`.
fn exports(lib: &str) -> HashMap<String, String> {
    let code = code(lib);
    // A macro is at the root, wherever it is written.
    let macros = [("module".to_string(), "nn".to_string())];
    let uses = code.split(';').filter_map(|statement| statement.trim().strip_prefix("pub use "));
    uses.filter_map(|path| path.trim_start_matches("crate::").split_once("::"))
        .flat_map(|(module, names)| {
            let module = module.to_string();
            let names = names.trim_matches(['{', '}']).split(',');
            names.map(move |n| (n.rsplit("::").next().unwrap_or(n).trim().to_string(), module.clone()))
        })
        .chain(macros)
        .collect()
}

pub fn walk(folder: &Path, name: &str, all: &mut Vec<(String, String)>) {
    let mut entries: Vec<_> =
        fs::read_dir(folder).expect("src").map(|e| e.expect("an entry").path()).collect();
    entries.sort();
    for path in entries {
        let name = format!("{name}{}", path.file_name().expect("a name").to_string_lossy());
        if path.is_dir() {
            walk(&path, &format!("{name}/"), all);
        } else if name.ends_with(".rs") {
            all.push((name, fs::read_to_string(&path).expect("a readable file")));
        }
    }
}

#[test]
fn every_file_uses_only_lower_floors() {
    let mut files = Vec::new();
    walk(&crate::support::folder::root().join("src"), "", &mut files);
    assert!(files.len() > 20, "only {} files found", files.len());
    let lib = &files.iter().find(|(name, _)| name == "lib.rs").expect("src/lib.rs").1;
    let exports = exports(lib);
    assert_eq!(exports.get("Gpu").map(String::as_str), Some("gpu"), "lib.rs is read");
    let wrong: Vec<String> = files.iter().flat_map(|(name, text)| violations(name, text, &exports)).collect();
    assert!(
        wrong.is_empty(),
        "{} of {} uses break the floors:\n{}",
        wrong.len(),
        files.len(),
        wrong.join("\n")
    );
}

/// Files that may use each other, each pair with its reason.
const ONE_THING: [[&str; 2]; 1] = [
    // A tensor has an edge of the graph, and an edge of the graph has tensors.
    ["tape", "tensor"],
];

#[test]
fn no_file_is_above_and_below_another() {
    let mut files = Vec::new();
    walk(&crate::support::folder::root().join("src"), "", &mut files);
    files.retain(|(name, _)| !name.starts_with("bin/"));
    let found = circles::circles(&files);
    let wrong: Vec<String> = found
        .iter()
        .filter(|circle| !ONE_THING.iter().any(|pair| circle.iter().eq(pair.iter())))
        .map(|circle| circle.join(", "))
        .collect();
    assert!(
        wrong.is_empty(),
        "these files use each other: give what both need a file below them:\n{}",
        wrong.join("\n")
    );
    // Every listed exception must still exist.
    assert_eq!(found.len(), ONE_THING.len());
}

#[test]
fn violations_are_seen() {
    let exports = exports("pub use gpu::{Gpu, Options};\npub use tensor::Tensor;\n");
    let count = |file: &str, text: &str| violations(file, text, &exports).len();
    let bad = [
        ("tensor.rs", "use crate::ops::case::Case;"),
        ("tape.rs", "fn f() { crate::nn::Linear::new(); }"),
        ("gpu/fuse.rs", "use crate::tensor::Tensor;"),
        ("gpu/fuse.rs", "use super::super::tape::record;"),
        ("gpu/fuse.rs", "use crate::Tensor;"),
        ("shape.rs", "fn f(gpu: &crate::Gpu) {}"),
        ("shape.rs", "use super::gpu::Gpu;"),
        ("ops/matmul.rs", "use crate::{\n    dtype::DType, // here\n    share::{Tied, LowRank},\n};"),
        ("ops/matmul.rs", "pub use crate::share::Tied as Kind;"),
        ("store/file.rs", "use crate::nn::Module;"),
        ("ops/matmul.rs", "use wgpu::Limits;"),
        ("ops/matmul.rs", "use crate::unheard_of::Thing;"),
        ("attic.rs", ""),
    ];
    for (file, text) in bad {
        assert_eq!(count(file, text), 1, "{file}: {text}: {:?}", violations(file, text, &exports));
    }
    let good = [
        ("shape.rs", "use crate::dtype::DType; mod tests { use super::*; }"),
        ("tape.rs", "use crate::tensor::Tensor; use crate::gpu::{Gpu, buffer::Buffer};"),
        ("gpu/mod.rs", "use crate::gpu::kernel::Cache; use crate::error::Result; use wgpu::Limits;"),
        ("gpu/shader/tests.rs", "use super::super::kernel::grid;"),
        ("share/tied.rs", "use super::Site; use crate::{Tensor, Gpu, ops::site::Load};"),
        ("ops/site.rs", "//! See [`crate::share`].\nuse super::super::rng::Rng;"),
        ("bin/tune.rs", "use crate::models::Anything;"),
    ];
    for (file, text) in good {
        assert_eq!(count(file, text), 0, "{file}: {text}: {:?}", violations(file, text, &exports));
    }
}
