//! Finds patterns that naga accepts but DXC (DX12) or Tint (browsers) refuses. Each pattern has occurred in one of our kernels. The
//! search is textual, on assembled kernels.

use std::collections::BTreeSet;

/// Returns the lines of a text with their numbers, without comments.
pub fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line.split("//").next().unwrap_or("")))
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Returns the positions where `word` occurs as a whole word.
fn words<'a>(line: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    line.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let before = line[..at].chars().next_back();
        let behind = line[at + word.len()..].chars().next();
        !before.is_some_and(is_word) && !behind.is_some_and(is_word)
    })
}

/// Returns the names declared after `head`, such as `alias ` or `var<workgroup> `.
fn declared<'a>(text: &'a str, head: &str) -> BTreeSet<&'a str> {
    let name = |line: &'a str| line.split(|c: char| !is_word(c)).next().unwrap_or("");
    code(text).filter_map(|(_, line)| line.trim().strip_prefix(head)).map(name).collect()
}

/// Returns the patterns that these compilers would refuse, with their lines.
pub fn problems(text: &str) -> Vec<String> {
    let (aliases, shared) = (declared(text, "alias "), declared(text, "var<workgroup> "));
    let matrices = matrices(text);
    let mut all = Vec::new();
    for (number, line) in code(text) {
        let mut problem = |what: String| all.push(format!("line {number}: {what}: {}", line.trim()));
        for alias in &aliases {
            if words(line, alias).any(|at| line[at + alias.len()..].starts_with("()")) {
                problem(format!("`{alias}()`: DXC defines its zero twice; write `{alias}(0)`"));
            }
        }
        if let Some(name) = matrices.iter().find(|name| splat_of(line, name)) {
            problem(format!("a vector of one component of the matrix {name}: DXC aborts; swizzle"));
        }
        if shifts_beside_others(line) {
            problem("a shift beside another operator: Tint wants parentheses".into());
        }
        if mixes(line) {
            problem("a comparison beside `&` or `|`: Tint wants parentheses".into());
        }
    }
    all.extend(loops_by_shared(text, &shared));
    all
}

/// Returns the names of matrices: variables of `mat4x4`, and results of matmul's loads.
fn matrices(text: &str) -> BTreeSet<String> {
    let makes = ["mat4x4<f32>(", "load_lhs(", "load_rhs(", "transpose("];
    let binding = |line: &str| {
        let rest = line.trim().strip_prefix("let ").or_else(|| line.trim().strip_prefix("var "))?;
        let (name, value) = rest.split_once('=')?;
        let name = name.split(':').next().unwrap_or(name).trim();
        makes.iter().any(|make| value.contains(make)).then(|| name.to_string())
    };
    code(text).filter_map(|(_, line)| binding(line)).collect()
}

/// Whether the line makes a vector from one component of a column of this matrix.
fn splat_of(line: &str, matrix: &str) -> bool {
    ["vec2<f32>(", "vec3<f32>(", "vec4<f32>("].iter().any(|make| {
        line.match_indices(make).any(|(at, _)| {
            let inside = &line[at + make.len()..];
            let Some(column) = inside.strip_prefix(matrix) else { return false };
            let Some((_, component)) = column.strip_prefix('[').and_then(|c| c.split_once("].")) else {
                return false;
            };
            let end = component.find(')').unwrap_or(component.len());
            !component[..end].contains(',') && end == 1
        })
    })
}

/// Whether a comparison is combined with a single `&` or `|` without parentheses around it.
fn mixes(line: &str) -> bool {
    // For each open parenthesis, whether its present expression has a comparison, and whether it has a bit operator.
    let mut open = vec![(false, false)];
    let bytes = line.as_bytes();
    let mut i = 0;
    let mut generic = 0;
    while i < bytes.len() {
        let (c, next) = (bytes[i] as char, bytes.get(i + 1).map_or(' ', |&b| b as char));
        let before = if i > 0 { bytes[i - 1] as char } else { ' ' };
        let last = open.len() - 1;
        let mut step = 1;
        match c {
            '(' | '[' => open.push((false, false)),
            ')' | ']' => {
                open.pop();
                if open.is_empty() {
                    open.push((false, false));
                }
            }
            ',' | ';' | '{' | '}' | '?' => open[last] = (false, false),
            '&' | '|' if next == c => {
                open[last] = (false, false);
                step = 2;
            }
            // This `&` takes a pointer, since it does not follow a value.
            '&' if !is_word(before) && before != ')' && before != ']' && before != ' ' => {}
            '&' | '|' if next != '=' && before == ' ' && next == ' ' => open[last].1 = true,
            '<' if is_word(before) && !line[..i].ends_with(' ') => generic += 1,
            '>' if generic > 0 => generic -= 1,
            '<' | '>' if next == c => step = 2,
            '<' | '>' | '=' | '!' if next == '=' => {
                open[last].0 = true;
                step = 2;
            }
            '<' | '>' => open[last].0 = true,
            // An assignment starts another expression.
            '=' => open[last] = (false, false),
            _ => {}
        }
        if open.last() == Some(&(true, true)) {
            return true;
        }
        i += step;
    }
    false
}

/// Whether a shift stands beside another operator without parentheses: WGSL has no precedence between them, and naga reads what
/// Tint refuses. Operators have blanks around them.
fn shifts_beside_others(line: &str) -> bool {
    const OTHERS: [&str; 8] = ["&", "|", "^", "+", "-", "*", "/", "%"];
    // For each open parenthesis, the number of shifts in its present expression, and that of other operators.
    let mut open = vec![(0, 0)];
    let spaced =
        line.replace(['(', '['], " ( ").replace([')', ']'], " ) ").replace([',', ';', '{', '}'], " ; ");
    for word in spaced.split_whitespace() {
        let last = open.len() - 1;
        match word {
            "(" => open.push((0, 0)),
            ")" if last > 0 => drop(open.pop()),
            "<<" | ">>" => open[last].0 += 1,
            word if OTHERS.contains(&word) => open[last].1 += 1,
            // What begins another expression.
            ")" | ";" | "=" | "&&" | "||" | "==" | "!=" | "<" | ">" | "<=" | ">=" | "return" | "?" => {
                open[last] = (0, 0);
            }
            word if word.ends_with('=') || word.ends_with(':') => open[last] = (0, 0),
            _ => {}
        }
        let last = open.len() - 1;
        if open[last].0 > 0 && open[last].0 + open[last].1 > 1 {
            return true;
        }
    }
    false
}

#[test]
fn a_shift_beside_another_operator_is_found() {
    for wrong in [
        "a >> b << c",
        "x = a >> b & 1u;",
        "f(a << (b + 1u) | c)",
        "let x = 1u + a << 2u;",
        "a[i >> 2u & 3u]",
    ] {
        assert!(shifts_beside_others(wrong), "{wrong}");
    }
    for right in [
        "(a >> b) << c",
        "x = (a >> b) & 1u;",
        "f(a << (b + 1u), c | d)",
        "let x = 1u << (a + 2u);",
        "a >> 2u < b",
    ] {
        assert!(!shifts_beside_others(right), "{right}");
    }
}

/// Finds branches and loops that depend on workgroup memory before a barrier. Every thread reads the same value, but only
/// `workgroupUniformLoad` tells the compiler so. Values are followed through variables and results of functions.
fn loops_by_shared(text: &str, shared: &BTreeSet<&str>) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let mut waiting: Vec<String> = Vec::new();
    let reads =
        |line: &str, names: &BTreeSet<&str>| names.iter().any(|name| words(line, name).next().is_some());
    let returns: BTreeSet<&str> = functions(text)
        .filter(|(_, body)| {
            code(body).any(|(_, line)| line.contains("return ") && is_read(line) && reads(line, shared))
        })
        .map(|(name, _)| name)
        .collect();
    let mut known = BTreeSet::new();
    for (number, line) in code(text) {
        if line.starts_with("fn ") || line.starts_with("@compute") {
            waiting.clear();
            known = shared.union(&returns).copied().collect();
        }
        let trimmed = line.trim();
        let assigned = trimmed
            .strip_prefix("let ")
            .or_else(|| trimmed.strip_prefix("var "))
            .and_then(|rest| rest.split_once('='));
        if let Some((name, _)) = assigned.filter(|(_, value)| is_read(value) && reads(value, &known)) {
            known.insert(name.split(':').next().unwrap_or(name).trim());
        }
        let bound = trimmed.starts_with("for ") || trimmed.starts_with("while ");
        let leaves = trimmed.starts_with("if ") && (trimmed.contains("return") || trimmed.contains("break"));
        let decides = condition(trimmed);
        if (bound || leaves)
            && is_read(decides)
            && words(decides, "lane").next().is_none()
            && reads(decides, &known)
        {
            waiting
                .push(format!("line {number}: Tint wants workgroupUniformLoad before a barrier: {trimmed}"));
        }
        if trimmed.contains("workgroupBarrier()")
            || trimmed.contains("workgroupUniformLoad(") && !bound && !leaves
        {
            all.append(&mut waiting);
        }
    }
    all
}

/// Whether the line does not use `workgroupUniformLoad`, so that workgroup memory in it is read directly.
fn is_read(line: &str) -> bool {
    !line.contains("workgroupUniformLoad(")
}

/// Returns names and bodies of all functions.
fn functions(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.match_indices("\nfn ").map(|(at, head)| {
        let rest = &text[at + head.len()..];
        (rest.split('(').next().unwrap_or(""), &rest[..rest.find("\n}").unwrap_or(rest.len())])
    })
}

/// Returns the condition of a line, which is the text before the block.
fn condition(line: &str) -> &str {
    line.split('{').next().unwrap_or(line)
}
