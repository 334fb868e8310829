// w stored as [n, k], for matmul_coop, as linear layers store it: k is contiguous and, like every step, a multiple of 4.
// A line of the tile is a column. Columns past the end repeat the last one.
const RIGHT_BY_ROWS: u32 = 0u;
@group(0) @binding(1) var<storage, read> rhs: array<RhsWord>;

fn rhs_start(base: u32, col0: u32, line: u32, along: u32) -> u32 {
    return base + col_at(col0 + line) * p.rhs.y + along;
}

fn rhs_fetch(start: u32, col0: u32, k0: u32, line: u32, along: u32) -> RhsWord {
    return rhs[select(0u, start + k0, !EDGES || k0 + along < p.k) / 4u];
}

fn rhs_halves(word: RhsWord, k0: u32, line: u32, along: u32) -> vec4<f16> {
    return select(vec4<f16>(0.0h), vec4<f16>(word), !EDGES || k0 + along < p.k);
}
