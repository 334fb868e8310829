// x with any strides and sizes, element by element. Loads give zero past k, and the last row past m.
const LHS_BY_K: bool = true;
@group(0) @binding(0) var<storage, read> lhs: array<f32>;

fn lhs_rows(base: u32, row: u32) -> vec4<u32> {
    let all = min(vec4<u32>(row) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.m - 1u));
    return base + p.lhs.y * all;
}

fn lhs_column(rows: vec4<u32>, k: u32) -> vec4<f32> {
    if k >= p.k { return vec4<f32>(0.0); }
    let at = rows + k * p.any.x;
    return vec4<f32>(lhs[at.x], lhs[at.y], lhs[at.z], lhs[at.w]);
}

fn load_lhs(rows: vec4<u32>, k: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        lhs_column(rows, k), lhs_column(rows, k + 1u), lhs_column(rows, k + 2u), lhs_column(rows, k + 3u));
}
