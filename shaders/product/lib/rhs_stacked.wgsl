// w stored as [n, k] in two tensors, one below the other: rows from p.rhs.w on, a multiple of 4, are those of `tail`. k is
// contiguous and a multiple of 4. There is one product, so p.rhs.w is no step of batches.
const RHS_BY_K: bool = true;
@group(0) @binding(1) var<storage, read> rhs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> tail: array<vec4<f32>>;

fn rhs_col(base: u32, k: u32, col: u32) -> vec4<f32> { return rhs[(base + k + col * p.rhs.y) / 4u]; }
fn tail_col(k: u32, col: u32) -> vec4<f32> { return tail[(k + (col_at(col) - p.rhs.w) * p.rhs.y) / 4u]; }

fn load_rhs(base: u32, k: u32, col: u32) -> mat4x4<f32> {
    // Columns past the end repeat the last one, which is the tail's.
    if col < p.rhs.w {
        return transpose(mat4x4<f32>(
            rhs_col(base, k, col), rhs_col(base, k, col + 1u), rhs_col(base, k, col + 2u), rhs_col(base, k, col + 3u)));
    }
    return transpose(mat4x4<f32>(
        tail_col(k, col), tail_col(k, col + 1u), tail_col(k, col + 2u), tail_col(k, col + 3u)));
}
