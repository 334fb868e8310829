// w stored as [n, k], as linear layers store it: k is contiguous and, like every step, a multiple of 4.
const RHS_BY_K: bool = true;
@group(0) @binding(1) var<storage, read> rhs: array<RhsWord>;

fn rhs_col(at: u32, col: u32) -> vec4<f32> { return rhs_of(rhs[(at + col_at(col) * p.rhs.y) / 4u]); }

fn load_rhs(base: u32, k: u32, col: u32) -> mat4x4<f32> {
    let at = base + k;
    return transpose(mat4x4<f32>(
        rhs_col(at, col), rhs_col(at, col + 1u), rhs_col(at, col + 2u), rhs_col(at, col + 3u)));
}
