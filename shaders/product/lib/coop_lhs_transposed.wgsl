// x stored as [k, m], for matmul_coop: rows are contiguous and, like every step, m is a multiple of 4. k may be anything.
// A line of the tile is a step along k. Words past m repeat the last one.
const LEFT_BY_ROWS: u32 = 0u;
@group(0) @binding(0) var<storage, read> lhs: array<LhsWord>;

fn lhs_start(base: u32, row0: u32, line: u32, along: u32) -> u32 {
    let row = row0 + along;
    return base + line * p.lhs.y + select(row, min(row, p.m - 4u), EDGES);
}

fn lhs_fetch(start: u32, row0: u32, k0: u32, line: u32, along: u32) -> LhsWord {
    return lhs[select(0u, start + k0 * p.lhs.y, !EDGES || k0 + line < p.k) / 4u];
}

fn lhs_halves(word: LhsWord, k0: u32, line: u32, along: u32) -> vec4<f16> {
    return select(vec4<f16>(0.0h), vec4<f16>(word), !EDGES || k0 + line < p.k);
}
