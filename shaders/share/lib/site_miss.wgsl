// W[row, col] = theta[row, col] + d[col % r, row], with theta [rows, columns], d [r, rows], computed as it is read.
// site_numbers() = (rows, columns, r, _). Zero outside.
// Source: MiSS (Bone), arXiv 2409.15371.
@group(0) @binding(1) var<storage, read> theta: array<f32>;
@group(0) @binding(2) var<storage, read> shard: array<f32>;

fn weight(row: u32, col: u32) -> f32 {
    if col >= site_numbers().y { return 0.0; }
    return theta[row * site_numbers().y + col] + shard[col % site_numbers().z * site_numbers().x + row];
}

fn load_site(row: u32, col: u32) -> vec4<f32> {
    if row >= site_numbers().x { return vec4<f32>(0.0); }
    return vec4<f32>(weight(row, col), weight(row, col + 1u), weight(row, col + 2u), weight(row, col + 3u));
}
