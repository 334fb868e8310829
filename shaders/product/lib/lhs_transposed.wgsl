// x stored as [k, m]: rows are contiguous and, like every step, m is a multiple of 4. k may be anything.
const LHS_BY_K: bool = false;
@group(0) @binding(0) var<storage, read> lhs: array<LhsWord>;

// The four rows lie side by side.
fn lhs_rows(base: u32, row: u32) -> vec4<u32> {
    return vec4<u32>(base + select(row, min(row, p.m - 4u), EDGES));
}

fn lhs_column(at: u32, k: u32) -> vec4<f32> { return in_k(k, lhs_of(lhs[(at + k_at(k) * p.lhs.y) / 4u])); }

fn load_lhs(rows: vec4<u32>, k: u32) -> mat4x4<f32> {
    let at = rows.x;
    return mat4x4<f32>(
        lhs_column(at, k), lhs_column(at, k + 1u), lhs_column(at, k + 2u), lhs_column(at, k + 3u));
}
