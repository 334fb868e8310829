// x with any strides and sizes, element by element: zero past k, the last row repeated past m.
@group(0) @binding(0) var<storage, read> lhs: array<f32>;

fn lhs_rows(at: u32, row: u32, k: u32) -> vec4<f32> {
    if k >= p.k { return vec4<f32>(); }
    let start = at + k * p.any.x;
    let last = p.m - 1u;
    return vec4<f32>(
        lhs[start + min(row, last) * p.lhs.y],
        lhs[start + min(row + 1u, last) * p.lhs.y],
        lhs[start + min(row + 2u, last) * p.lhs.y],
        lhs[start + min(row + 3u, last) * p.lhs.y],
    );
}

fn load_lhs(base: u32, row: u32, k: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        lhs_rows(base, row, k), lhs_rows(base, row, k + 1u), lhs_rows(base, row, k + 2u), lhs_rows(base, row, k + 3u));
}
