// x in rows: k is contiguous and, like every step, a multiple of 4. Rows past the end repeat the last: never stored.
@group(0) @binding(0) var<storage, read> lhs: array<vec4<f32>>;

fn load_lhs(base: u32, row: u32, k: u32) -> mat4x4<f32> {
    let at = base + k;
    let last = p.m - 1u;
    return transpose(mat4x4<f32>(
        lhs[(at + min(row, last) * p.lhs.y) / 4u],
        lhs[(at + min(row + 1u, last) * p.lhs.y) / 4u],
        lhs[(at + min(row + 2u, last) * p.lhs.y) / 4u],
        lhs[(at + min(row + 3u, last) * p.lhs.y) / 4u],
    ));
}
