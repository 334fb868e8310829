// w in rows [k, n]: n is contiguous and, like every step, a multiple of 4. Columns past the end repeat the last four.
const RHS_BY_K: bool = false;
@group(0) @binding(1) var<storage, read> rhs: array<RhsWord>;

fn rhs_cols(at: u32, k: u32) -> vec4<f32> { return in_k(k, rhs_of(rhs[(at + k_at(k) * p.rhs.y) / 4u])); }

fn load_rhs(base: u32, k: u32, col: u32) -> mat4x4<f32> {
    let at = base + select(col, min(col, p.n - 4u), EDGES);
    return mat4x4<f32>(rhs_cols(at, k), rhs_cols(at, k + 1u), rhs_cols(at, k + 2u), rhs_cols(at, k + 3u));
}
