// x in rows: k is contiguous and, like every step, a multiple of 4. Rows past the end repeat the last one and are never
// stored.
const LHS_BY_K: bool = true;
@group(0) @binding(0) var<storage, read> lhs: array<LhsWord>;

fn lhs_rows(base: u32, row: u32) -> vec4<u32> {
    return base + p.lhs.y * vec4<u32>(row_at(row), row_at(row + 1u), row_at(row + 2u), row_at(row + 3u));
}

fn lhs_row(at: u32) -> vec4<f32> { return lhs_of(lhs[at / 4u]); }

fn load_lhs(rows: vec4<u32>, k: u32) -> mat4x4<f32> {
    return transpose(mat4x4<f32>(
        lhs_row(rows.x + k), lhs_row(rows.y + k), lhs_row(rows.z + k), lhs_row(rows.w + k)));
}
