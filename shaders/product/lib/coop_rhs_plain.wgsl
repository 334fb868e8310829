// w in rows [k, n], for matmul_coop: n is contiguous and, like every step, a multiple of 4. A line of the tile is a step
// along k. Words past n repeat the last one.
const RIGHT_BY_ROWS: u32 = 1u;
@group(0) @binding(1) var<storage, read> rhs: array<RhsWord>;

fn rhs_start(base: u32, col0: u32, line: u32, along: u32) -> u32 {
    let col = col0 + along;
    return base + line * p.rhs.y + select(col, min(col, p.n - 4u), EDGES);
}

fn rhs_fetch(start: u32, col0: u32, k0: u32, line: u32, along: u32) -> RhsWord {
    return rhs[select(0u, start + k0 * p.rhs.y, !EDGES || k0 + line < p.k) / 4u];
}

fn rhs_halves(word: RhsWord, k0: u32, line: u32, along: u32) -> vec4<f16> {
    return select(vec4<f16>(0.0h), vec4<f16>(word), !EDGES || k0 + line < p.k);
}
