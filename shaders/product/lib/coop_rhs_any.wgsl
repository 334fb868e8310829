// w with any strides and sizes, element by element, for matmul_coop. A line of the tile is a step along k. Columns past
// the end repeat the last one.
const RIGHT_BY_ROWS: u32 = 1u;
@group(0) @binding(1) var<storage, read> rhs: array<f32>;

fn rhs_start(base: u32, col0: u32, line: u32, along: u32) -> u32 { return base + line * p.any.y; }

fn rhs_fetch(start: u32, col0: u32, k0: u32, line: u32, along: u32) -> RhsWord {
    let cols = min(vec4<u32>(col0 + along) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.n - 1u));
    let at = select(vec4<u32>(0u), start + k0 * p.any.y + cols * p.rhs.y, k0 + line < p.k);
    return vec4<f32>(rhs[at.x], rhs[at.y], rhs[at.z], rhs[at.w]);
}

fn rhs_halves(word: RhsWord, k0: u32, line: u32, along: u32) -> vec4<f16> {
    return select(vec4<f16>(0.0h), vec4<f16>(word), k0 + line < p.k);
}
