//! Operands read through textures, for drivers whose loads from storage buffers are slow.
//!
//! llvmpipe (Mesa 22.3) compiles a load from a storage buffer to a loop over lanes that writes and reads back a whole
//! vector for every element: about 260 ns for eight lanes of `vec4<f32>` on a Zen 4 core, 24 ns through a texture of
//! the same content. A copy from buffer to texture moves 5 GB/s there, so that it pays even for arrays that are read
//! once. Kernels know nothing of this: [`rewrite`] turns `x[i]` into `textureLoad` in the assembled text, and a launch
//! copies the operands first. The bits are the same.

use super::kernel::Bind;
use super::record::Recorder;
use super::{Gpu, capture};
use std::borrow::Cow;

/// Texels in a row of a texture: with llvmpipe's 16384 rows, more than its largest binding holds.
const WIDTH: u32 = 4096;

/// Bytes that loads must move through an operand before a copy and the pass that it ends pay: about 40 us.
const WORTH: u64 = 64 << 10;

/// When operands are read through textures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    Never,
    /// Where the copy pays.
    Worth,
    /// Wherever it can be done, for tests.
    Always,
}

/// What a texel of an array's element is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Texel {
    pub format: wgpu::TextureFormat,
    scalar: &'static str,
    suffix: &'static str,
}

impl Texel {
    fn of(element: &str) -> Option<Texel> {
        use wgpu::TextureFormat as F;
        let texel = |format, scalar, suffix| Some(Texel { format, scalar, suffix });
        match element {
            "f32" => texel(F::R32Float, "f32", ".x"),
            "u32" => texel(F::R32Uint, "u32", ".x"),
            "i32" => texel(F::R32Sint, "i32", ".x"),
            "vec2<f32>" => texel(F::Rg32Float, "f32", ".xy"),
            "vec2<u32>" => texel(F::Rg32Uint, "u32", ".xy"),
            "vec4<f32>" => texel(F::Rgba32Float, "f32", ""),
            "vec4<u32>" => texel(F::Rgba32Uint, "u32", ""),
            _ => None,
        }
    }

    /// Bytes.
    fn size(self) -> u64 {
        match self.suffix {
            ".x" => 4,
            ".xy" => 8,
            _ => 16,
        }
    }

    pub fn sample_type(self) -> wgpu::TextureSampleType {
        match self.scalar {
            "f32" => wgpu::TextureSampleType::Float { filterable: false },
            "u32" => wgpu::TextureSampleType::Uint,
            _ => wgpu::TextureSampleType::Sint,
        }
    }
}

/// The binding, name and element type of `@group(0) @binding(1) var<storage, read> x: array<f32>;`.
fn declaration(line: &str) -> Option<(u32, &str, &str)> {
    let rest = line.strip_prefix("@group(0) @binding(")?;
    let (binding, rest) = rest.split_once(") var<storage, read> ")?;
    let (name, rest) = rest.split_once(": array<")?;
    let (element, _) = rest.split_once(">;")?;
    Some((binding.parse().ok()?, name, element))
}

/// The type with aliases replaced: a name, or the element of a vector.
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

/// Whether a parameter or local of a function has the array's name: then `name[i]` is not the array in it.
fn hidden(function: &[&str], name: &str) -> bool {
    let heads = [format!("({name}: "), format!(", {name}: "), format!("let {name} "), format!("var {name} ")];
    function.iter().any(|line| heads.iter().any(|head| line.contains(head)))
}

/// The lines from `at` on that belong together: a function that starts there, or else one line.
fn piece(lines: &[&str], at: usize) -> usize {
    if !lines[at].starts_with("fn ") || lines[at].ends_with('}') {
        return 1;
    }
    lines[at..].iter().position(|line| *line == "}").map_or(1, |end| end + 1)
}

/// The kernel with those of `wanted` bindings that can be as textures, and these with their texels. Keeps line numbers.
pub(crate) fn rewrite<'a>(text: &'a str, wanted: &[u32]) -> (Cow<'a, str>, Vec<(u32, Texel)>) {
    let mut arrays: Vec<(&str, u32, Texel)> = Vec::new();
    for (binding, name, element) in text.lines().filter_map(declaration) {
        match Texel::of(&resolve(text, element)) {
            Some(texel) if wanted.contains(&binding) => arrays.push((name, binding, texel)),
            _ => {}
        }
    }
    // Two entries of one file may give a binding two types: then it stays a buffer.
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

/// Copies a line, `x[i]` of an array in the list as `textureLoad(x, texel_at(u32(i)), 0)`. `closing` holds what the
/// brackets that are still open need.
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

/// A scratch texture of the recorder; commands run in order, so one a place in the kernel is enough.
pub(crate) struct Scratch {
    texture: wgpu::Texture,
    view: wgpu::TextureView,
    texel: Texel,
    place: usize,
}

impl Gpu {
    /// The read-only operands that a kernel should see as textures, when each is loaded `reuse` times. All or none: a small
    /// operand beside a large one, such as a norm's weight, is loaded as often.
    pub(crate) fn texel_bindings(&self, binds: &[Bind], reuse: u32) -> Vec<u32> {
        let rows = self.limits().max_texture_dimension_2d.min(u32::MAX / WIDTH) as u64;
        let fits = |bind: &&Bind| !bind.write && bind.size <= rows * WIDTH as u64 * 4;
        let read: Vec<&Bind> = binds.iter().filter(fits).collect();
        let pays = match self.0.texels {
            Policy::Never => false,
            Policy::Worth => read.iter().any(|bind| bind.size.saturating_mul(reuse as u64) >= WORTH),
            Policy::Always => reuse > 0,
        };
        if pays { read.iter().map(|bind| bind.binding).collect() } else { vec![] }
    }
}

impl Recorder {
    /// Copies an operand into the scratch texture for its `place`, and shows that.
    pub fn texels(
        &mut self,
        gpu: &Gpu,
        bind: &Bind,
        raw: &wgpu::Buffer,
        texel: Texel,
        place: usize,
    ) -> wgpu::TextureView {
        let height = (bind.size / texel.size()).div_ceil(WIDTH as u64) as u32;
        let found = self.scratch.iter().position(|s| s.texel == texel && s.place == place);
        let index = match found {
            Some(index) if self.scratch[index].texture.height() >= height => index,
            _ => {
                let texture = texture(gpu, texel, height.next_power_of_two());
                let view = texture.create_view(&wgpu::TextureViewDescriptor::default());
                let made = Scratch { texture, view, texel, place };
                if let Some(old) = found {
                    self.scratch.swap_remove(old);
                }
                self.scratch.push(made);
                self.scratch.len() - 1
            }
        };
        let Scratch { texture, view, .. } = &self.scratch[index];
        let (texture, view) = (texture.clone(), view.clone());
        copy(self.encoder(gpu), raw, bind.offset, bind.size, texel, &texture);
        capture::texels(gpu, bind, raw, texel, &texture);
        view
    }
}

/// Copies the texels in `bytes` of a buffer, row by row.
pub(super) fn copy(
    encoder: &mut wgpu::CommandEncoder,
    from: &wgpu::Buffer,
    offset: u64,
    bytes: u64,
    texel: Texel,
    texture: &wgpu::Texture,
) {
    let count = bytes / texel.size();
    let (rows, rest) = ((count / WIDTH as u64) as u32, (count % WIDTH as u64) as u32);
    let pitch = WIDTH * texel.size() as u32;
    for (y, width, height) in [(0, WIDTH, rows), (rows, rest, 1)] {
        if width == 0 || height == 0 {
            continue;
        }
        let offset = offset + y as u64 * pitch as u64;
        let layout = wgpu::TexelCopyBufferLayout { offset, bytes_per_row: Some(pitch), rows_per_image: None };
        let to = wgpu::TexelCopyTextureInfo {
            origin: wgpu::Origin3d { x: 0, y, z: 0 },
            ..texture.as_image_copy()
        };
        let size = wgpu::Extent3d { width, height, depth_or_array_layers: 1 };
        encoder.copy_buffer_to_texture(wgpu::TexelCopyBufferInfo { buffer: from, layout }, to, size);
    }
}

fn texture(gpu: &Gpu, texel: Texel, height: u32) -> wgpu::Texture {
    gpu.0.device.create_texture(&wgpu::TextureDescriptor {
        label: Some("operand"),
        size: wgpu::Extent3d { width: WIDTH, height, depth_or_array_layers: 1 },
        mip_level_count: 1,
        sample_count: 1,
        dimension: wgpu::TextureDimension::D2,
        format: texel.format,
        usage: wgpu::TextureUsages::TEXTURE_BINDING | wgpu::TextureUsages::COPY_DST,
        view_formats: &[],
    })
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
        let (text, texels) = rewrite(TEXT, &[0, 1]);
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
        let (text, texels) = rewrite(&whole, &[0, 1]);
        assert_eq!(texels.len(), 2);
        assert!(text.contains(own) && text.contains(long), "{text}");
        assert!(text.contains("textureLoad(x, "));
    }

    #[test]
    fn aliases_are_looked_through() {
        let text = "alias Elem = f32;\n@group(0) @binding(0) var<storage, read> x: array<vec4<Elem>>;\n";
        assert_eq!(rewrite(text, &[0]).1[0].1.format, wgpu::TextureFormat::Rgba32Float);
    }

    #[test]
    fn what_has_no_texel_stays_a_buffer() {
        let text = "@group(0) @binding(0) var<storage, read> x: array<vec4<f16>>;\n";
        assert!(rewrite(text, &[0]).1.is_empty());
        assert_eq!(rewrite(text, &[0]).0, text);
        assert!(rewrite(TEXT, &[2]).1.is_empty());
    }
}
