// w in rows [k, n]: n is contiguous and, like every step, a multiple of 4. Columns past the end repeat the last four.
@group(0) @binding(1) var<storage, read> rhs: array<vec4<f32>>;

fn load_rhs(base: u32, k: u32, col: u32) -> mat4x4<f32> {
    let at = base + min(col, p.n - 4u);
    let last = p.k - 1u;
    return mat4x4<f32>(
        rhs[(at + k * p.rhs.y) / 4u],
        rhs[(at + min(k + 1u, last) * p.rhs.y) / 4u] * f32(k + 1u < p.k),
        rhs[(at + min(k + 2u, last) * p.rhs.y) / 4u] * f32(k + 2u < p.k),
        rhs[(at + min(k + 3u, last) * p.rhs.y) / 4u] * f32(k + 3u < p.k),
    );
}
