// x with any strides and sizes, element by element, for matmul_coop. A line of the tile is a step along k. Rows past the
// end repeat the last one.
const LEFT_BY_ROWS: u32 = 0u;
@group(0) @binding(0) var<storage, read> lhs: array<f32>;

fn lhs_start(base: u32, row0: u32, line: u32, along: u32) -> u32 { return base + line * p.any.x; }

fn lhs_fetch(start: u32, row0: u32, k0: u32, line: u32, along: u32) -> LhsWord {
    let rows = min(vec4<u32>(row0 + along) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.m - 1u));
    let at = select(vec4<u32>(0u), start + k0 * p.any.x + rows * p.lhs.y, k0 + line < p.k);
    return vec4<f32>(lhs[at.x], lhs[at.y], lhs[at.z], lhs[at.w]);
}

fn lhs_halves(word: LhsWord, k0: u32, line: u32, along: u32) -> vec4<f16> {
    return select(vec4<f16>(0.0h), vec4<f16>(word), k0 + line < p.k);
}
