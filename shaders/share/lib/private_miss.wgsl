// private slot of a sharing kind: w + d[col % r, row % m], with d [r, m]. site_numbers() = (rows, columns, r, m).
// Source: MiSS (Bone), arXiv 2409.15371.
@group(0) @binding(2) var<storage, read> shard: array<f32>;

fn with_private(row: u32, col: u32, w: vec4<f32>) -> vec4<f32> {
    let r = site_numbers().z;
    let m = site_numbers().w;
    // The next columns' places in the shard follow without another division, which is slow in CPU drivers.
    let a = col % r;
    let b = select(a + 1u, 0u, a + 1u == r);
    let c = select(b + 1u, 0u, b + 1u == r);
    let d = select(c + 1u, 0u, c + 1u == r);
    let at = row % m;
    return w + vec4<f32>(shard[a * m + at], shard[b * m + at], shard[c * m + at], shard[d * m + at]);
}
