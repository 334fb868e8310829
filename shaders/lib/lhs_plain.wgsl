// x in rows: k is contiguous and, like every step, a multiple of 4. Rows past the end repeat the last: never stored.
@group(0) @binding(0) var<storage, read> lhs: array<LhsWord>;

fn lhs_row(at: u32, row: u32) -> vec4<f32> { return lhs_of(lhs[(at + row_at(row) * p.lhs.y) / 4u]); }

fn load_lhs(base: u32, row: u32, k: u32) -> mat4x4<f32> {
    let at = base + k;
    return transpose(mat4x4<f32>(
        lhs_row(at, row), lhs_row(at, row + 1u), lhs_row(at, row + 2u), lhs_row(at, row + 3u)));
}
