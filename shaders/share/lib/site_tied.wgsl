// W[row, col .. col + 3] of a stored matrix, the identity map, and what slot `private` adds. site_numbers() = (rows, columns,
// rank, bits of a factor); the last two are those of `private`.
// Zero outside, so that the matmul needs no check in its last step of k.
@group(0) @binding(1) var<storage, read> theta: array<f32>;

fn load_site(row: u32, col: u32) -> vec4<f32> {
    if row >= site_numbers().x { return vec4<f32>(0.0); }
    let at = row * site_numbers().y;
    let last = site_numbers().y - 1u;
    let four = vec4<f32>(
        theta[at + min(col, last)],
        theta[at + min(col + 1u, last)],
        theta[at + min(col + 2u, last)],
        theta[at + min(col + 3u, last)],
    );
    return select(vec4<f32>(0.0), with_private(row, col, four), vec4<u32>(col, col + 1u, col + 2u, col + 3u) <= vec4<u32>(last));
}
