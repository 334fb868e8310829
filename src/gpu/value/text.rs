//! The text of an elementwise kernel, and the pieces that such texts are made of.
//!
//! No list of variants can hold every chain of operations. But chains are made of few kinds of pieces: an operation on
//! types, a way to read an operand, a way to write a result. Each piece has its own line in the list of variants, and a
//! small kernel ([`example`]) that shows it to every target's compiler.

use crate::dtype::DType;
use crate::gpu::shader::Source;
use std::borrow::Cow;
use std::fmt::Write;

/// Threads of a workgroup.
pub(super) const THREADS: u32 = 64;
/// The most words of parameters that are immediates. Kernels with more have a uniform.
const IMMEDIATE_WORDS: usize = 16;
/// The kernel's name, for errors and the list of variants.
pub(super) const NAME: &str = "elementwise";

/// How an operand is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Walk {
    /// Four elements at once, in the order of the results.
    Plain,
    /// By strides, where every four elements of the walk are one vector in memory.
    Whole,
    /// By strides, where the last stride is 0.
    Repeated,
    /// By strides, one element at a time.
    Strided,
}

impl Walk {
    const ALL: [(Walk, &str); 4] = [
        (Walk::Plain, "plain"),
        (Walk::Whole, "whole"),
        (Walk::Repeated, "repeated"),
        (Walk::Strided, "strided"),
    ];

    fn is_strided(self) -> bool {
        self != Walk::Plain
    }
}

/// An argument of an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Term {
    /// An operand.
    Read(usize),
    /// The result of an earlier operation.
    Made(usize),
    /// A number from the parameters.
    Number(usize),
}

/// One operation. In its template, `$0`, `$1`, ... are the terms, as vectors of four.
pub(super) struct Operation {
    pub template: Cow<'static, str>,
    pub dtype: DType,
    pub terms: Vec<Term>,
}

/// An elementwise kernel: what it reads, computes and writes.
#[derive(Default)]
pub(super) struct Text {
    pub reads: Vec<(DType, Walk)>,
    pub operations: Vec<Operation>,
    pub numbers: usize,
    /// The operations whose results are written, the last one first.
    pub writes: Vec<usize>,
    /// Whether the first result is added to what the output holds.
    pub accumulate: bool,
    /// Axes of the walk of operands that are read by strides.
    pub axes: usize,
    /// Whether the last axis is a multiple of four, so that four neighbours share all other coordinates.
    pub together: bool,
    /// How many of the first axes are the grid's, at most two. Each of the others costs a division for every four
    /// elements.
    pub outer: usize,
}

fn stored(dtype: DType, vector: bool) -> &'static str {
    match (dtype, vector) {
        (DType::F16 | DType::Bf16, true) => "vec2<u32>",
        (DType::F32, true) => "vec4<f32>",
        (DType::U32, true) => "vec4<u32>",
        (DType::I32, true) => "vec4<i32>",
        (DType::F16 | DType::Bf16 | DType::U32, false) => "u32",
        (DType::F32, false) => "f32",
        (DType::I32, false) => "i32",
    }
}

/// Converts a vector from its stored type to the type of the arithmetic: f16 and bf16 become f32.
fn unpacked(dtype: DType, vector: &str) -> String {
    match dtype {
        DType::F16 => format!("unpack_half4({vector})"),
        DType::Bf16 => format!("unpack_bf16({vector})"),
        _ => vector.to_string(),
    }
}

fn packed(dtype: DType, value: &str) -> String {
    match dtype {
        DType::F16 => format!("pack_half4({value})"),
        DType::Bf16 => format!("pack_bf16({value})"),
        _ => value.to_string(),
    }
}

impl Text {
    /// The operands that are read by strides.
    fn strided(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.reads.len()).filter(|&i| self.reads[i].1.is_strided())
    }

    /// Returns the kernel.
    pub fn source(&self) -> Source {
        let mut s = self.params();
        s.push_str(
            "#import f16\n#import bf16\n#import elementwise\n#import exp_log\n#import losses\n#import nan\n#import near_zero\n#import power\n#import trig\n",
        );
        for (i, &(dtype, walk)) in self.reads.iter().enumerate() {
            let element = stored(dtype, matches!(walk, Walk::Plain | Walk::Whole));
            let _ = writeln!(s, "@group(0) @binding({i}) var<storage, read> x{i}: array<{element}>;");
        }
        for (i, &made) in self.writes.iter().enumerate() {
            let (at, element) = (self.reads.len() + i, stored(self.operations[made].dtype, true));
            let _ = writeln!(s, "@group(0) @binding({at}) var<storage, read_write> y{i}: array<{element}>;");
        }
        self.strided().for_each(|i| self.reader(&mut s, i));
        let _ = writeln!(
            s,
            "@compute @workgroup_size({THREADS})\nfn main(@builtin(workgroup_id) group: vec3<u32>, \
             @builtin(local_invocation_index) lane: u32) {{"
        );
        s.push_str(&self.place());
        for (i, &(dtype, walk)) in self.reads.iter().enumerate() {
            let read = match walk {
                Walk::Plain => unpacked(dtype, &format!("x{i}[i]")),
                _ if self.outer > 0 => format!("read{i}(e, group)"),
                _ => format!("read{i}(i * 4u)"),
            };
            let _ = writeln!(s, "    let l{i} = {read};");
        }
        self.operations.iter().enumerate().for_each(|(i, operation)| operation.write(&mut s, i));
        for (i, &made) in self.writes.iter().enumerate() {
            let dtype = self.operations[made].dtype;
            let value = match i == 0 && self.accumulate {
                true => format!("{} + v{made}", unpacked(dtype, "y0[i]")),
                false => format!("v{made}"),
            };
            let _ = writeln!(s, "    y{i}[i] = {};", packed(dtype, &value));
        }
        s.push_str("}\n");
        Source::generated(NAME, s)
    }

    /// Writes `i`, the place of the thread's four elements in vectors of four. If the grid has the first axes, it also
    /// writes `e`, their place inside the others.
    fn place(&self) -> String {
        let first = match self.outer {
            0 => {
                return format!(
                    "    let i = (group.y * p.groups_x + group.x) * {THREADS}u + lane;\n    \
                     if i * 4u >= p.n {{ return; }}\n"
                );
            }
            1 => "group.y",
            _ => "(group.z * p.size1 + group.y)",
        };
        format!(
            "    let e = (group.x * {THREADS}u + lane) * 4u;\n    if e >= p.inner {{ return; }}\n    \
             let i = ({first} * p.inner + e) / 4u;\n"
        )
    }

    /// Returns the kernel with the lines of its pieces, for the list of variants. Not needed at every launch.
    pub fn listed(&self) -> Source {
        self.source().with_lines(self.lines())
    }

    fn params(&self) -> String {
        let mut s = String::from("struct Params { n: u32, groups_x: u32,");
        let mut words = 2 + self.numbers;
        if self.strided().next().is_some() {
            (0..self.axes).for_each(|a| s += &format!(" size{a}: u32,"));
            words += self.axes;
        }
        if self.outer > 0 {
            s.push_str(" inner: u32,");
            words += 1;
        }
        for i in self.strided() {
            (0..self.axes).for_each(|a| s += &format!(" t{i}_{a}: u32,"));
            let _ = write!(s, " o{i}: u32,");
            words += self.axes + 1;
        }
        (0..self.numbers).for_each(|i| s += &format!(" s{i}: f32,"));
        s.push_str(" }\n");
        if words > IMMEDIATE_WORDS {
            let _ = write!(s, "@group(0) @binding({}) var<uniform> ", self.reads.len() + self.writes.len());
        } else {
            s.push_str("var<immediate> ");
        }
        s + "p: Params;\n"
    }

    /// Writes a function that reads four elements of a strided operand, starting at element `e` of the walk.
    fn reader(&self, s: &mut String, i: usize) {
        let ((dtype, walk), axes) = (self.reads[i], self.axes);
        let ty = dtype.wgsl();
        let element = |index: &str| match dtype {
            DType::F16 => format!("half_at(x{i}[({index}) / 2u], ({index}) % 2u)"),
            DType::Bf16 => format!("bf16_at(x{i}[({index}) / 2u], ({index}) % 2u)"),
            _ => format!("x{i}[{index}]"),
        };
        // Axes of the grid come as an argument of their own.
        let (outer, group, pass) = match self.outer {
            0 => (0, "", ""),
            outer => (outer, ", group: vec3<u32>", ", group"),
        };
        let _ = writeln!(s, "fn index{i}(e: u32{group}) -> u32 {{\n    var rest = e;\n    var at = p.o{i};");
        for (a, place) in [vec![], vec!["group.y"], vec!["group.z", "group.y"]][outer].iter().enumerate() {
            let _ = writeln!(s, "    at += {place} * p.t{i}_{a};");
        }
        for a in (outer + 1..axes).rev() {
            let _ = writeln!(s, "    at += (rest % p.size{a}) * p.t{i}_{a};\n    rest = rest / p.size{a};");
        }
        let _ = writeln!(s, "    return at + rest * p.t{i}_{outer};\n}}");
        let _ = write!(s, "fn read{i}(e: u32{group}) -> vec4<{ty}> {{\n    ");
        let step = format!("p.t{i}_{}", axes - 1);
        if walk == Walk::Whole {
            let value = unpacked(dtype, &format!("x{i}[index{i}(e{pass}) / 4u]"));
            let _ = writeln!(s, "return {value};\n}}");
        } else if self.together && walk == Walk::Repeated {
            let _ = writeln!(s, "let a = index{i}(e{pass});\n    return vec4<{ty}>({});\n}}", element("a"));
        } else if self.together {
            let lanes: Vec<String> = (0..4).map(|j| element(&format!("a + {j}u * {step}"))).collect();
            let lanes = lanes.join(", ");
            let _ = writeln!(s, "let a = index{i}(e{pass});\n    return vec4<{ty}>({lanes});\n}}");
        } else {
            s.push_str("let last = p.n - 1u;\n");
            for j in 0..4 {
                let _ = writeln!(s, "    let a{j} = index{i}(min(e + {j}u, last));");
            }
            let lanes: Vec<String> = (0..4).map(|j| element(&format!("a{j}"))).collect();
            let _ = writeln!(s, "    return vec4<{ty}>({});\n}}", lanes.join(", "));
        }
    }

    /// Returns the lines of the kernel's pieces in the list of variants.
    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for Operation { template, dtype, terms } in &self.operations {
            let ty = |term: &Term| match *term {
                Term::Read(i) => self.reads[i].0.wgsl(),
                Term::Made(i) => self.operations[i].dtype.wgsl(),
                Term::Number(_) => "number",
            };
            let types: Vec<&str> = terms.iter().map(ty).collect();
            lines.push(format!("{NAME} computes {dtype} = {template} of {}", types.join(" ")));
        }
        for &(dtype, walk) in &self.reads {
            let (_, name) = Walk::ALL.into_iter().find(|(w, _)| *w == walk).expect("all walks are listed");
            let how = if walk.is_strided() && self.together { " together" } else { "" };
            lines.push(format!("{NAME} reads {dtype} {name}{how}"));
        }
        if self.outer > 0 {
            lines.push(format!("{NAME} walks {} axes by the grid", self.outer));
        }
        for (i, &made) in self.writes.iter().enumerate() {
            let how = if i == 0 && self.accumulate { " accumulate" } else { "" };
            lines.push(format!("{NAME} writes {}{how}", self.operations[made].dtype));
        }
        lines
    }
}

impl Operation {
    fn write(&self, s: &mut String, number: usize) {
        let mut text = String::new();
        let mut rest = &*self.template;
        while let Some(at) = rest.find('$') {
            text.push_str(&rest[..at]);
            let term = self.terms[(rest.as_bytes()[at + 1] - b'0') as usize];
            let _ = match term {
                Term::Read(i) => write!(text, "l{i}"),
                Term::Made(i) => write!(text, "v{i}"),
                Term::Number(i) => write!(text, "vec4<f32>(p.s{i})"),
            };
            rest = &rest[at + 2..];
        }
        text.push_str(rest);
        // A result of 16 bits is rounded inside a chain too, because fusion must not change bits.
        let text = match self.dtype {
            DType::F16 => format!("round_half4({text})"),
            DType::Bf16 => format!("round_bf16({text})"),
            _ => text,
        };
        let _ = writeln!(s, "    let v{number} = {text};");
    }
}

/// Returns a kernel with the piece of this line. `None` for a line that names no piece.
pub(in crate::gpu) fn example(line: &str) -> Option<Source> {
    let of = |name: &str| {
        let all = [DType::F32, DType::F16, DType::Bf16, DType::U32, DType::I32];
        all.into_iter().find(|dtype| dtype.to_string() == name)
    };
    // Three axes, so that a reader divides more than once.
    let mut text = Text { writes: vec![0], axes: 3, ..Text::default() };
    let (what, rest) = line.strip_prefix(NAME)?.trim_start().split_once(' ')?;
    let identity = |dtype| Operation { template: "$0".into(), dtype, terms: vec![Term::Read(0)] };
    match what {
        "computes" => {
            let (dtype, rest) = rest.split_once(" = ")?;
            let (template, types) = rest.rsplit_once(" of ").or(rest.strip_suffix(" of").map(|t| (t, "")))?;
            let mut terms = Vec::new();
            for name in types.split_whitespace() {
                if name == "number" {
                    terms.push(Term::Number(text.numbers));
                    text.numbers += 1;
                } else {
                    terms.push(Term::Read(text.reads.len()));
                    text.reads.push((of(name)?, Walk::Plain));
                }
            }
            text.operations.push(Operation {
                template: template.to_string().into(),
                dtype: of(dtype)?,
                terms,
            });
        }
        "reads" => {
            let mut words = rest.split_whitespace();
            let dtype = of(words.next()?)?;
            let name = words.next()?;
            let (walk, _) = Walk::ALL.into_iter().find(|(_, n)| *n == name)?;
            text.together = words.next() == Some("together");
            text.reads.push((dtype, walk));
            text.operations.push(identity(dtype));
        }
        "walks" => {
            text.outer =
                rest.strip_suffix(" axes by the grid")?.parse().ok().filter(|n| (1..=2).contains(n))?;
            text.together = true;
            text.reads.push((DType::F32, Walk::Whole));
            text.operations.push(identity(DType::F32));
        }
        "writes" => {
            let (dtype, accumulate) = match rest.split_once(' ') {
                Some((dtype, how)) => (of(dtype)?, how == "accumulate"),
                None => (of(rest)?, false),
            };
            text.accumulate = accumulate;
            text.reads.push((dtype, Walk::Plain));
            text.operations.push(identity(dtype));
        }
        _ => return None,
    }
    Some(text.listed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_gives_back_the_piece_that_it_names() {
        let lines = [
            "elementwise computes f16 = where4($0, $1, $2) of u32 f32 number",
            "elementwise computes u32 = vec4<u32>(7u) of ",
            "elementwise reads f16 whole together",
            "elementwise reads bf16 strided",
            "elementwise writes bf16 accumulate",
            "elementwise reads i32 strided",
            "elementwise writes f32 accumulate",
            "elementwise walks 2 axes by the grid",
        ];
        for line in lines {
            let source = example(line).unwrap_or_else(|| panic!("{line} is not read"));
            assert!(source.lines().iter().any(|own| own == line), "{line} is not among {:?}", source.lines());
        }
        for line in
            ["elementwise", "elementwise sings f32", "elementwise reads f64 plain", "softmax reads f32 plain"]
        {
            assert!(example(line).is_none(), "{line}");
        }
    }
}
