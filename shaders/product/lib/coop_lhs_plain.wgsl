// x in rows, for matmul_coop: k is contiguous and, like every step, a multiple of 4. Rows past the end repeat the last
// one and are never stored.
//
// A line of the tile is a row. A word is fetched from its address in the first tile, and becomes halves only when the
// tile is filled, so that the fetch is not waited for.
const LEFT_BY_ROWS: u32 = 1u;
@group(0) @binding(0) var<storage, read> lhs: array<LhsWord>;

fn lhs_start(base: u32, row0: u32, line: u32, along: u32) -> u32 {
    return base + row_at(row0 + line) * p.lhs.y + along;
}

fn lhs_fetch(start: u32, row0: u32, k0: u32, line: u32, along: u32) -> LhsWord {
    return lhs[select(0u, start + k0, !EDGES || k0 + along < p.k) / 4u];
}

// Both operands are zero past k, because the other one may be infinite.
fn lhs_halves(word: LhsWord, k0: u32, line: u32, along: u32) -> vec4<f16> {
    return select(vec4<f16>(0.0h), vec4<f16>(word), !EDGES || k0 + along < p.k);
}
