// x stored as [k, m]: rows are contiguous and, like every step, m is a multiple of 4. k may be anything.
@group(0) @binding(0) var<storage, read> lhs: array<vec4<f32>>;

fn load_lhs(base: u32, row: u32, k: u32) -> mat4x4<f32> {
    let at = base + min(row, p.m - 4u);
    let last = p.k - 1u;
    return mat4x4<f32>(
        lhs[(at + k * p.lhs.y) / 4u],
        lhs[(at + min(k + 1u, last) * p.lhs.y) / 4u] * f32(k + 1u < p.k),
        lhs[(at + min(k + 2u, last) * p.lhs.y) / 4u] * f32(k + 2u < p.k),
        lhs[(at + min(k + 3u, last) * p.lhs.y) / 4u] * f32(k + 3u < p.k),
    );
}
