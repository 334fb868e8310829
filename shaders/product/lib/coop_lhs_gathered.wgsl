// Rows of x from a list, for matmul_coop: row i of the product is x[rows[i]]. k is contiguous and a multiple of 4. A line
// of the tile is a row. A listed row that x does not have is zero, and nothing outside x is read.
const LEFT_BY_ROWS: u32 = 1u;
@group(0) @binding(0) var<storage, read> lhs: array<LhsWord>;
@group(0) @binding(7) var<storage, read> rows: array<u32>;

fn lhs_start(base: u32, row0: u32, line: u32, along: u32) -> u32 {
    let source = rows[min(row0 + line, p.m - 1u)];
    return select(NOWHERE, base + source * p.lhs.y + along, source < p.rows);
}

fn lhs_fetch(start: u32, row0: u32, k0: u32, line: u32, along: u32) -> LhsWord {
    let there = start != NOWHERE && k0 + along < p.k;
    return select(LhsWord(0.0), lhs[select(0u, start + k0, there) / 4u], there);
}

fn lhs_halves(word: LhsWord, k0: u32, line: u32, along: u32) -> vec4<f16> { return vec4<f16>(word); }
