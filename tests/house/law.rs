//! The adjoint law is tested for every sharing kind: `tests/engine/law.rs` names each of them. That test may run without the
//! sources, so what the sources have is compared here.

use crate::floors::walk;
use crate::support::folder::root;

/// What [`walk`] finds and the law does not need, each with its reason.
const WITHOUT_LAW: [(&str, &str); 5] = [
    ("Stored", "a stored weight for the cases of products, which are below the sharing kinds"),
    ("Reduced", "another site with some of its rules left out, for the law itself"),
    ("check_law", "the law"),
    ("CoefficientNet", "a network, which is not affine in its leaves; its coefficients are a dictionary's"),
    ("matrix_pca", "makes a dictionary from weights and has no gradient"),
];

fn word(text: &str) -> String {
    text.chars().take_while(|&c| c.is_alphanumeric() || c == '_').collect()
}

/// The types that implement `Site` in a file, each with the name that it gives itself.
fn sites(text: &str) -> Vec<(String, String)> {
    let heads = text.match_indices(" Site for ").filter(|(at, _)| {
        let line = text[..*at].rsplit('\n').next().unwrap_or("");
        line.trim_start().starts_with("impl")
    });
    heads
        .map(|(at, head)| {
            let body = &text[at + head.len()..];
            let named = body.split_once("fn name(").map_or("", |(_, after)| after);
            (word(body), named.split('"').nth(1).unwrap_or("").to_string())
        })
        .collect()
}

/// The variants of an enum that are one line each.
fn variants(text: &str, name: &str) -> Vec<String> {
    let (_, body) = text.split_once(&format!("pub enum {name} {{")).expect("the enum");
    let lines = body.split("\n}").next().unwrap_or("").lines().map(str::trim);
    lines.filter(|line| line.starts_with(char::is_uppercase)).map(word).collect()
}

/// The names that `src/share/mod.rs` re-exports from its own files.
fn exports(text: &str) -> Vec<String> {
    let own = text.split(';').filter_map(|part| part.trim().strip_prefix("pub use "));
    let names = own.filter(|path| !path.starts_with("crate::")).filter_map(|path| path.split_once("::"));
    names.flat_map(|(_, names)| names.trim_matches(['{', '}']).split(',').map(|n| word(n.trim()))).collect()
}

#[test]
fn the_adjoint_law_names_every_sharing_kind() {
    let law = std::fs::read_to_string(root().join("tests/engine/law.rs")).expect("the law");
    let exempt = |name: &str| WITHOUT_LAW.iter().any(|(other, _)| *other == name);
    let mut files = Vec::new();
    walk(&root().join("src"), "", &mut files);
    let (mut wrong, mut seen) = (Vec::new(), Vec::new());
    for (file, text) in &files {
        for (kind, name) in sites(text) {
            seen.push(kind.clone());
            if !exempt(&kind) && !law.contains(&format!("(\"{kind}\", \"{name}\"),")) {
                wrong.push(format!("{file}: {kind}, which is a site of the name \"{name}\""));
            }
        }
    }
    let text = |file: &str| &files.iter().find(|(name, _)| name == file).expect("a file").1;
    let calls = |name: &str| ["(", "::", " {"].iter().any(|end| law.contains(&format!("{name}{end}")));
    for name in exports(text("share/mod.rs")) {
        if !exempt(&name) && !calls(&name) {
            wrong.push(format!("share/mod.rs: {name}"));
        }
        seen.push(name);
    }
    for mapping in variants(text("share/hashed.rs"), "Mapping") {
        let name = format!("Mapping::{mapping}");
        if !law.contains(&name) {
            wrong.push(format!("share/hashed.rs: {name}"));
        }
        seen.push(name);
    }
    assert!(
        wrong.is_empty(),
        "tests/engine/law.rs lacks, or spells in another way:\n{}\nadd each to its table",
        wrong.join("\n")
    );
    // The sources are read as meant, and every listed exception still exists.
    for name in ["Tied", "Atoms", "Bone", "Mapping::Stable"].into_iter().chain(WITHOUT_LAW.map(|w| w.0)) {
        assert!(seen.iter().any(|s| s == name), "{name} is not found in {seen:?}");
    }
}
