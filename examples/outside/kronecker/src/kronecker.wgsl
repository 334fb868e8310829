// W[i, j] = a[i / P, j / Q] b[i % P, j % Q], with a [.., columns / Q] and b [P, Q].
// site_numbers() = (rows, columns, P, Q). Zero outside of the matrix, as products rely on.

@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;

fn kronecker(row: u32, col: u32) -> f32 {
    let size = site_numbers();
    if row >= size.x || col >= size.y { return 0.0; }
    let left = a[row / size.z * (size.y / size.w) + col / size.w];
    return left * b[row % size.z * size.w + col % size.w];
}

fn load_site(row: u32, col: u32) -> vec4<f32> {
    return vec4<f32>(
        kronecker(row, col),
        kronecker(row, col + 1u),
        kronecker(row, col + 2u),
        kronecker(row, col + 3u),
    );
}
