// w stored as [n, k], as linear layers store it: k is contiguous and, like every step, a multiple of 4.
@group(0) @binding(1) var<storage, read> rhs: array<vec4<f32>>;

fn load_rhs(base: u32, k: u32, col: u32) -> mat4x4<f32> {
    let at = base + k;
    let last = p.n - 1u;
    return transpose(mat4x4<f32>(
        rhs[(at + min(col, last) * p.rhs.y) / 4u],
        rhs[(at + min(col + 1u, last) * p.rhs.y) / 4u],
        rhs[(at + min(col + 2u, last) * p.rhs.y) / 4u],
        rhs[(at + min(col + 3u, last) * p.rhs.y) / 4u],
    ));
}
