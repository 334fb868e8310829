// Rows of x from a list: row i of the product is x[rows[i]]. k is contiguous and a multiple of 4.
const LHS_BY_K: bool = true;
@group(0) @binding(0) var<storage, read> lhs: array<LhsWord>;
@group(0) @binding(7) var<storage, read> rows: array<u32>;

fn lhs_listed(base: u32, row: u32) -> u32 {
    let source = rows[min(row, p.m - 1u)];
    return select(NOWHERE, base + source * p.lhs.y, source < p.rows);
}

fn lhs_rows(base: u32, row: u32) -> vec4<u32> {
    return vec4<u32>(
        lhs_listed(base, row), lhs_listed(base, row + 1u), lhs_listed(base, row + 2u), lhs_listed(base, row + 3u));
}

// A listed row that x does not have is zero, and nothing outside x is read.
fn lhs_row(at: u32, k: u32) -> vec4<f32> {
    let there = at != NOWHERE;
    return select(vec4<f32>(0.0), lhs_of(lhs[select(0u, at + k, there) / 4u]), there);
}

fn load_lhs(rows: vec4<u32>, k: u32) -> mat4x4<f32> {
    return transpose(mat4x4<f32>(
        lhs_row(rows.x, k), lhs_row(rows.y, k), lhs_row(rows.z, k), lhs_row(rows.w, k)));
}
