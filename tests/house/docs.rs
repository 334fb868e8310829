//! Checks that a newcomer finds something on every public page: modules have an introduction and something to show, and ops and
//! layers have an example. Reads source text and needs no device.

use super::floors::walk;
use std::fs;
use std::path::{Path, PathBuf};

/// The comment's text before the first item of a file.
fn introduction(text: &str) -> String {
    let lines = text.lines().map_while(|line| line.strip_prefix("//!"));
    lines.map(|line| format!("{}\n", line.trim())).collect()
}

/// What a public module's page lacks, if anything.
fn lacking(text: &str) -> Option<&'static str> {
    let introduction = introduction(text);
    let first: String = introduction.lines().take_while(|line| !line.is_empty()).collect();
    if first.split_whitespace().count() < 3 || !first.ends_with(['.', ':']) {
        return Some("an introduction of at least one sentence in //! at its top");
    }
    let shows = text.lines().any(|line| line.starts_with("pub "));
    (!shows && !introduction.contains("::"))
        .then_some("a public item, or links to methods; else make it private")
}

/// The files of a module's public submodules.
fn public_modules(file: &Path, folder: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(file).unwrap();
    let names = text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    let mut found = Vec::new();
    for name in names {
        let inner = folder.join(name);
        let own = [inner.join("mod.rs"), folder.join(format!("{name}.rs"))];
        let file =
            own.into_iter().find(|file| file.is_file()).unwrap_or_else(|| panic!("{name} has no file"));
        found.extend(public_modules(&file, &inner));
        found.push(file);
    }
    found
}

/// Lines between a line `open` and the next line that is a brace in the same column, with what is before each of them.
fn blocks<'a>(lines: &[&'a str], open: &str) -> Vec<Vec<&'a str>> {
    let starts = (0..lines.len()).filter(|&i| lines[i].trim_start() == open);
    let block = |start: usize| {
        let margin = lines[start].len() - lines[start].trim_start().len();
        let end = format!("{}}}", &lines[start][..margin]);
        lines[start + 1..].iter().take_while(|line| **line != end).copied().collect()
    };
    starts.map(block).collect()
}

/// The names of public functions among these lines, each with the comments and attributes above it.
fn documented<'a>(lines: &[&'a str]) -> Vec<(&'a str, String)> {
    let name = |line: &'a str| line.trim_start().strip_prefix("pub fn ")?.split(['(', '<']).next();
    let above = |i: usize| {
        let near = lines[..i].iter().rev().take_while(|line| !matches!(line.trim(), "" | "}"));
        near.map(|line| line.trim()).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
    };
    (0..lines.len()).filter_map(|i| Some((name(lines[i])?, above(i)))).collect()
}

/// The code in fences of a comment.
fn examples(docs: &str) -> String {
    docs.split("```").skip(1).step_by(2).collect()
}

/// The methods of `Tensor` in a file that have no example. A macro's method has the one that the macro writes.
fn ops_without(text: &str) -> Vec<&str> {
    let lines: Vec<&str> = text.lines().collect();
    let all = blocks(&lines, "impl Tensor {").into_iter().flat_map(|block| documented(&block));
    all.filter(|(_, docs)| examples(docs).is_empty()).map(|(name, _)| name).collect()
}

/// The functions of the layers in a file that no example of their layer calls. A layer is a struct with `forward`.
fn layers_without(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let types = lines.iter().filter_map(|line| line.strip_prefix("impl ")?.strip_suffix(" {"));
    let mut missing = Vec::new();
    for layer in types.filter(|name| name.chars().all(char::is_alphanumeric)) {
        let functions: Vec<_> =
            blocks(&lines, &format!("impl {layer} {{")).iter().flat_map(|block| documented(block)).collect();
        if !functions.iter().any(|(name, _)| *name == "forward") {
            continue;
        }
        let declared = lines.iter().position(|line| line.starts_with(&format!("pub struct {layer}")));
        let above =
            lines[..declared.unwrap_or(0)].iter().rev().take_while(|line| !matches!(line.trim(), "" | "}"));
        let own: Vec<&str> = above.copied().collect();
        let own = own.into_iter().rev().collect::<Vec<_>>().join("\n");
        let code: String = functions.iter().map(|(_, docs)| examples(docs)).chain([examples(&own)]).collect();
        let called =
            |name: &str| code.contains(&format!("{layer}::{name}(")) || code.contains(&format!(".{name}("));
        missing.extend(
            functions.iter().filter(|(name, _)| !called(name)).map(|(name, _)| format!("{layer}::{name}")),
        );
    }
    missing
}

fn source() -> PathBuf {
    crate::support::folder::root().join("src")
}

/// Walks the files of a room and lists what `check` finds missing.
fn missing_in<N: std::fmt::Display>(room: &str, check: impl Fn(&str) -> Vec<N>) -> Vec<String> {
    let mut files = Vec::new();
    walk(&source().join(room), &format!("{room}/"), &mut files);
    assert!(files.len() > 1, "{} files in {room}", files.len());
    let of = |(file, text): &(String, String)| {
        check(text).into_iter().map(|name| format!("{file}: {name}")).collect::<Vec<_>>()
    };
    files.iter().flat_map(of).collect()
}

#[test]
fn public_modules_have_an_introduction_and_something_to_show() {
    let found = public_modules(&source().join("lib.rs"), &source());
    assert!(found.len() > 50, "{} modules", found.len());
    let wrong = found.iter().filter_map(|path| {
        let lacks = lacking(&fs::read_to_string(path).unwrap())?;
        Some(format!("{} lacks {lacks}", path.display()))
    });
    let wrong: Vec<String> = wrong.collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    assert!(lacking("pub fn f() {}\n").is_some());
    assert!(lacking("//! Words\n\npub fn f() {}\n").is_some());
    assert!(lacking("//! Sums of rows.\n\nimpl Tensor {}\n").is_some());
    assert_eq!(lacking("//! Sums of rows.\n\npub fn f() {}\n"), None);
    assert_eq!(lacking("//! Sums of rows.\n//!\n//! See [`Tensor::sum`].\n"), None);
}

#[test]
fn ops_have_examples() {
    let check = |text: &str| ops_without(text).into_iter().map(String::from).collect::<Vec<_>>();
    let mut wrong = missing_in("ops", check);
    wrong.extend(missing_in("tape", check));
    wrong.extend(missing_in("tensor", check));
    wrong.extend(check(&fs::read_to_string(source().join("tensor.rs")).unwrap()));
    assert!(wrong.is_empty(), "give these an example in their documentation:\n{}", wrong.join("\n"));

    let op = |docs: &str| {
        format!("impl Tensor {{\n{docs}    #[track_caller]\n    pub fn f(&self) {{\n    }}\n}}\n")
    };
    assert_eq!(ops_without(&op("    /// Sums.\n")), ["f"]);
    assert!(ops_without(&op("    /// Sums.\n    ///\n    /// ```\n    /// f();\n    /// ```\n")).is_empty());
    let two = op("    /// ```\n    /// f();\n    /// ```\n") + &op("");
    assert_eq!(ops_without(&two), ["f"]);
}

#[test]
fn layers_have_examples_that_call_them() {
    let wrong = missing_in("nn", layers_without);
    assert!(wrong.is_empty(), "give these an example in their layer's documentation:\n{}", wrong.join("\n"));

    let layer = |call: &str| {
        format!(
            "/// A layer.\n///\n/// ```\n/// {call}\n/// ```\npub struct Net {{\n}}\n\nimpl Net {{\n    pub fn new() {{\n    \
             }}\n\n    pub fn forward(&self) {{\n    }}\n}}\n"
        )
    };
    assert_eq!(layers_without(&layer("Net::new();")), ["Net::forward"]);
    assert!(layers_without(&layer("Net::new().forward();")).is_empty());
}
