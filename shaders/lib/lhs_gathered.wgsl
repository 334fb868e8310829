// Rows of x from a list: row i of the product is x[rows[i]]. k is contiguous and a multiple of 4.
@group(0) @binding(0) var<storage, read> lhs: array<LhsWord>;
@group(0) @binding(7) var<storage, read> rows: array<u32>;

fn lhs_row(at: u32, row: u32) -> vec4<f32> {
    // A row that x does not have is zero; nothing is read outside.
    let source = rows[min(row, p.m - 1u)];
    let value = lhs_of(lhs[(at + min(source, p.rows - 1u) * p.lhs.y) / 4u]);
    return select(vec4<f32>(), value, source < p.rows);
}

fn load_lhs(base: u32, row: u32, k: u32) -> mat4x4<f32> {
    let at = base + k;
    return transpose(mat4x4<f32>(
        lhs_row(at, row), lhs_row(at, row + 1u), lhs_row(at, row + 2u), lhs_row(at, row + 3u)));
}
