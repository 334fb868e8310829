// w with any strides and sizes, element by element. Loads give zero past k, and the last column past n.
const RHS_BY_K: bool = false;
@group(0) @binding(1) var<storage, read> rhs: array<f32>;

fn rhs_cols(at: u32, k: u32, col: u32) -> vec4<f32> {
    if k >= p.k { return vec4<f32>(0.0); }
    let start = at + k * p.any.y;
    let last = p.n - 1u;
    return vec4<f32>(
        rhs[start + min(col, last) * p.rhs.y],
        rhs[start + min(col + 1u, last) * p.rhs.y],
        rhs[start + min(col + 2u, last) * p.rhs.y],
        rhs[start + min(col + 3u, last) * p.rhs.y],
    );
}

fn load_rhs(base: u32, k: u32, col: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        rhs_cols(base, k, col), rhs_cols(base, k + 1u, col), rhs_cols(base, k + 2u, col), rhs_cols(base, k + 3u, col));
}
