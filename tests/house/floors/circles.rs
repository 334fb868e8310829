//! Finds files that use each other in a circle, by the paths in their text.

use std::collections::{BTreeMap, BTreeSet};

/// A module as the names on its path: `["ops", "product", "matmul"]`. Empty for `lib.rs`.
type Module = Vec<String>;

/// Returns a file's text without comments (whose links are not uses) and strings. Whitespace is not preserved.
pub fn code(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let mut quoted = false;
        let mut last = ' ';
        for c in line.split("//").next().unwrap_or("").chars() {
            quoted ^= c == '"' && last != '\\';
            last = c;
            out.extend((!quoted).then_some(c));
        }
        out.push(' ');
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Collects the paths of a `use` tree: `a::{b, c::d}` has `a::b` and `a::c::d`.
fn leaves(prefix: &str, tree: &str, found: &mut Vec<String>) {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let path = tree.split(" as ").next().unwrap_or("").trim();
        return found.push(format!("{prefix}{path}"));
    };
    let prefix = format!("{prefix}{}", &tree[..open]);
    let (mut depth, mut item) = (0, String::new());
    for c in tree[open + 1..tree.rfind('}').unwrap_or(tree.len())].chars() {
        depth += (c == '{') as i32 - (c == '}') as i32;
        if c == ',' && depth == 0 {
            leaves(&prefix, &std::mem::take(&mut item), found);
        } else {
            item.push(c);
        }
    }
    if !item.trim().is_empty() {
        leaves(&prefix, &item, found);
    }
}

/// Returns the paths of all `use` statements, with whether each is public, and the paths elsewhere in the code.
pub fn paths(code: &str) -> (Vec<(bool, String)>, Vec<String>) {
    let (mut uses, mut rest) = (Vec::new(), String::new());
    for statement in code.split_inclusive(';') {
        let at = statement.match_indices("use ").map(|(at, _)| at);
        let starts = |&at: &usize| !statement[..at].ends_with(is_word);
        let Some(at) = at.into_iter().find(starts).filter(|_| statement.ends_with(';')) else {
            rest.push_str(statement);
            continue;
        };
        rest.push_str(&statement[..at]);
        let before = statement[..at].trim_end();
        let public = before.ends_with("pub") || before.ends_with(')') && before.contains("pub(");
        let mut found = Vec::new();
        leaves("", &statement[at + 4..statement.len() - 1], &mut found);
        uses.extend(found.into_iter().map(|path| (public, path)));
    }
    let mut inline = Vec::new();
    for root in ["crate::", "super::", "self::"] {
        for (at, _) in rest.match_indices(root) {
            if !rest[..at].ends_with(|c| is_word(c) || c == ':' || c == '$') {
                inline.push(rest[at..].chars().take_while(|&c| is_word(c) || c == ':').collect());
            }
        }
    }
    (uses, inline)
}

struct Crate {
    /// The paths that each module uses.
    used: BTreeMap<Module, Vec<String>>,
    /// The names that each module re-exports, with their paths.
    given: BTreeMap<Module, BTreeMap<String, String>>,
}

impl Crate {
    /// Returns the file that a path in `from` refers to.
    fn resolve(&self, from: &Module, path: &str, depth: usize) -> Option<Module> {
        let mut names: Vec<&str> = path.split("::").map(str::trim).filter(|name| !name.is_empty()).collect();
        let mut at = from.clone();
        match *names.first()? {
            "crate" => at.clear(),
            "super" | "self" => {}
            first if self.used.contains_key(&[from.clone(), vec![first.into()]].concat()) => {}
            _ => return None,
        }
        while names.first().is_some_and(|name| ["crate", "super", "self"].contains(name)) {
            if names.remove(0) == "super" {
                at.pop();
            }
        }
        for name in names {
            let inner = [at.clone(), vec![name.to_string()]].concat();
            if self.used.contains_key(&inner) {
                at = inner;
                continue;
            }
            let given = self.given.get(&at).and_then(|given| given.get(name)).filter(|_| depth < 8);
            return given.and_then(|path| self.resolve(&at, path, depth + 1)).or(Some(at));
        }
        Some(at)
    }
}

/// Returns groups of modules that all reach each other by their uses. A file and the rooms that it is in do not count as a
/// circle, because a room's own file re-exports its files.
pub fn circles(files: &[(String, String)]) -> Vec<Vec<String>> {
    let mut all = Crate { used: BTreeMap::new(), given: BTreeMap::new() };
    for (name, text) in files {
        let parts = name.trim_end_matches(".rs").split('/').filter(|part| !["mod", "lib"].contains(part));
        let module: Module = parts.map(String::from).collect();
        // Unit tests may use modules above.
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or("");
        let (uses, inline) = paths(&code(text));
        let last = |path: &String| path.rsplit("::").next().unwrap_or("").to_string();
        let given = uses.iter().filter(|(public, _)| *public).map(|(_, path)| (last(path), path.clone()));
        all.given.insert(module.clone(), given.collect());
        all.used.insert(module, uses.into_iter().map(|(_, path)| path).chain(inline).collect());
    }
    let within = |a: &Module, b: &Module| a.starts_with(b) || b.starts_with(a);
    let edges: BTreeMap<&Module, BTreeSet<Module>> = all
        .used
        .iter()
        .map(|(from, paths)| {
            let to = paths.iter().filter_map(|path| all.resolve(from, path, 0));
            (from, to.filter(|to| !within(from, to)).collect())
        })
        .collect();
    let reach = |from: &Module| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![from.clone()]);
        while let Some(at) = next.pop() {
            next.extend(edges[&at].iter().filter(|to| seen.insert((*to).clone())).cloned());
        }
        seen
    };
    let reached: BTreeMap<&Module, BTreeSet<Module>> =
        edges.keys().map(|from| (*from, reach(from))).collect();
    let mut groups = BTreeSet::new();
    for (from, to) in &reached {
        if to.contains(*from) {
            let group = to.iter().filter(|other| reached[other].contains(*from));
            groups.insert(group.map(|module| module.join("::")).collect::<Vec<_>>());
        }
    }
    groups.into_iter().collect()
}

#[test]
fn circles_are_seen() {
    let file = |name: &str, text: &str| (name.to_string(), text.to_string());
    let files = [
        file("lib.rs", "pub mod a; pub mod b; pub mod room;"),
        file("a.rs", "use crate::{b::{Thing, Other as Name}, c};"),
        file("b.rs", "fn f() { crate::room::Shown::new(); }"),
        file(
            "c.rs",
            "// use crate::a;\nfn f() -> &str { \"use crate::a;\" }\n#[cfg(test)]\nmod tests {\nuse crate::a;\n}",
        ),
        file("room/mod.rs", "mod inner; mod other; pub use inner::Shown;"),
        file("room/inner.rs", "use super::other::X; use crate::a::Y;"),
        file("room/other.rs", "use super::Z;"),
    ];
    // A circle through a name that a room re-exports.
    assert_eq!(circles(&files), [["a", "b", "room::inner"]]);
    let mut cut = files.clone();
    cut[2].1.clear();
    assert_eq!(circles(&cut), Vec::<Vec<String>>::new());
}
