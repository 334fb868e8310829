//! Rewrites a kernel's text so that it reads arrays as textures.

use super::{Texel, WIDTH};
use crate::gpu::shader::Name;
use std::borrow::Cow;

/// Parses `@group(0) @binding(1) var<storage, read> x: array<f32>;` into binding, name and element type.
fn declaration(line: &str) -> Option<(u32, &str, &str)> {
    let rest = line.strip_prefix("@group(0) @binding(")?;
    let (binding, rest) = rest.split_once(") var<storage, read> ")?;
    let (name, rest) = rest.split_once(": array<")?;
    let (element, _) = rest.split_once(">;")?;
    Some((binding.parse().ok()?, name, element))
}

/// Returns the type with aliases replaced, also in the element type of a vector.
fn resolve(text: &str, name: &str) -> String {
    if let Some((vector, element)) = name.strip_suffix('>').and_then(|rest| rest.split_once('<')) {
        return format!("{vector}<{}>", resolve(text, element));
    }
    let value = |line: &str| {
        let value =
            line.strip_prefix("alias ")?.strip_prefix(name)?.strip_prefix(" = ")?.split(';').next()?;
        Some(value.to_string())
    };
    text.lines().find_map(value).unwrap_or_else(|| name.to_string())
}

/// Whether a parameter or local variable of a function has the array's name, so that `name[i]` there is not the array.
fn hidden(function: &[&str], name: &str) -> bool {
    let heads = [format!("({name}: "), format!(", {name}: "), format!("let {name} "), format!("var {name} ")];
    function.iter().any(|line| heads.iter().any(|head| line.contains(head)))
}

/// Returns how many lines from `at` on belong together: those of a function that starts there, or else one.
fn piece(lines: &[&str], at: usize) -> usize {
    if !lines[at].starts_with("fn ") || lines[at].ends_with('}') {
        return 1;
    }
    lines[at..].iter().position(|line| *line == "}").map_or(1, |end| end + 1)
}

/// Rewrites the kernel so that it reads the `wanted` arrays as textures, if their element types have a texel format.
/// Returns the text, and the texel of each such array by its binding. Line numbers stay the same.
pub(in crate::gpu) fn rewrite<'a>(text: &'a str, wanted: &[Name]) -> (Cow<'a, str>, Vec<(u32, Texel)>) {
    let mut arrays: Vec<(&str, u32, Texel)> = Vec::new();
    for (binding, name, element) in text.lines().filter_map(declaration) {
        match Texel::of(&resolve(text, element)) {
            Some(texel) if wanted.iter().any(|array| *array == *name) => arrays.push((name, binding, texel)),
            _ => {}
        }
    }
    // Two entries of one file may declare a binding with two types. It then stays a buffer.
    let unlike = |b: u32, t: Texel| arrays.iter().any(|&(_, other, texel)| other == b && texel != t);
    let odd: Vec<u32> = arrays.iter().filter(|a| unlike(a.1, a.2)).map(|a| a.1).collect();
    arrays.retain(|a| !odd.contains(&a.1));
    if arrays.is_empty() {
        return (Cow::Borrowed(text), vec![]);
    }
    let mut out = String::with_capacity(text.len() + 1024);
    let mut closing: Vec<Option<&str>> = Vec::new();
    let lines: Vec<&str> = text.lines().collect();
    let mut at = 0;
    while at < lines.len() {
        let function = &lines[at..at + piece(&lines, at)];
        let seen: Vec<_> = arrays.iter().copied().filter(|a| !hidden(function, a.0)).collect();
        for line in function {
            match declaration(line).and_then(|(b, name, _)| arrays.iter().find(|a| a.0 == name && a.1 == b)) {
                Some((name, binding, texel)) => {
                    out +=
                        &format!("@group(0) @binding({binding}) var {name}: texture_2d<{}>;", texel.scalar);
                }
                None => loads(line, &seen, &mut closing, &mut out),
            }
            out.push('\n');
        }
        at += function.len();
    }
    let shift = WIDTH.trailing_zeros();
    out += &format!(
        "fn texel_at(i: u32) -> vec2<u32> {{ return vec2<u32>(i & {}u, i >> {shift}u); }}\n",
        WIDTH - 1
    );
    let mut texels: Vec<_> = arrays.iter().map(|&(_, binding, texel)| (binding, texel)).collect();
    texels.sort_by_key(|t| t.0);
    texels.dedup();
    (Cow::Owned(out), texels)
}

/// Copies a line, with `x[i]` of a listed array replaced by `textureLoad(x, texel_at(u32(i)), 0)`. `closing` has an
/// entry per open bracket: the suffix of a texture load, or `None` for any other bracket.
fn loads(line: &str, arrays: &[(&str, u32, Texel)], closing: &mut Vec<Option<&str>>, out: &mut String) {
    let (code, comment) = line.split_at(line.find("//").unwrap_or(line.len()));
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut rest = code;
    let mut before = ' ';
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        if end > 0 {
            let (word, behind) = rest.split_at(end);
            let array = arrays.iter().find(|a| a.0 == word && before != '.' && behind.starts_with('['));
            rest = behind;
            before = 'w';
            if let Some((name, _, texel)) = array {
                out.push_str(&format!("textureLoad({name}, texel_at(u32("));
                closing.push(Some(texel.suffix));
                rest = &behind[1..];
            } else {
                out.push_str(word);
            }
            continue;
        }
        match first {
            '[' => closing.push(None),
            ']' => {
                if let Some(Some(suffix)) = closing.pop() {
                    out.push_str(")), 0)");
                    out.push_str(suffix);
                    rest = &rest[1..];
                    before = ']';
                    continue;
                }
            }
            _ => {}
        }
        out.push(first);
        before = first;
        rest = &rest[first.len_utf8()..];
    }
    out.push_str(comment);
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "alias Elem = f32;
@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // x[0]
@compute @workgroup_size(1) fn main() {
    var l = array<f32, 2>();
    y[ids[0]] = x[ids[l_x[1]] +
        2u] + p.x[0]; // x[1]
}";

    #[test]
    fn loads_become_texture_loads_and_lines_stay() {
        let (text, texels) = rewrite(TEXT, &["x".into(), "ids".into()]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "@group(0) @binding(0) var x: texture_2d<f32>;");
        assert_eq!(lines[2], "@group(0) @binding(1) var ids: texture_2d<u32>;");
        assert_eq!(lines[3], "@group(0) @binding(2) var<storage, read_write> y: array<f32>; // x[0]");
        let inner = "textureLoad(ids, texel_at(u32(l_x[1])), 0).x";
        let first = "    y[textureLoad(ids, texel_at(u32(0)), 0).x] =";
        assert_eq!(lines[6], format!("{first} textureLoad(x, texel_at(u32({inner} +"));
        assert_eq!(lines[7], "        2u)), 0).x + p.x[0]; // x[1]");
        assert_eq!(texels.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn a_function_may_use_the_name_for_itself() {
        let own = "fn f(x: vec4<f32>, i: u32) -> f32 { return x[i]; }";
        let long = "fn g(i: u32) -> f32 {\n    let x = vec4<f32>(f32(i));\n    return x[i];\n}";
        let whole = format!("{TEXT}\n{own}\n{long}");
        let (text, texels) = rewrite(&whole, &["x".into(), "ids".into()]);
        assert_eq!(texels.len(), 2);
        assert!(text.contains(own) && text.contains(long), "{text}");
        assert!(text.contains("textureLoad(x, "));
    }

    #[test]
    fn aliases_are_looked_through() {
        let text = "alias Elem = f32;\n@group(0) @binding(0) var<storage, read> x: array<vec4<Elem>>;\n";
        assert_eq!(rewrite(text, &["x".into()]).1[0].1.format, wgpu::TextureFormat::Rgba32Float);
    }

    #[test]
    fn what_has_no_texel_stays_a_buffer() {
        let text = "@group(0) @binding(0) var<storage, read> x: array<vec4<f16>>;\n";
        assert!(rewrite(text, &["x".into()]).1.is_empty());
        assert_eq!(rewrite(text, &["x".into()]).0, text);
        assert!(rewrite(TEXT, &["y".into()]).1.is_empty());
    }
}
