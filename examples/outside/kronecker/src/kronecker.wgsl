// W[i, j] = a[i / P, j / Q] b[i % P, j % Q], with a [.., columns / Q] and b [P, Q].
// site_numbers() = (rows, columns, P, Q). Zero outside of the matrix, as products rely on. b is bound in vectors of four, to which
// arrays are padded.

@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;

// W[row, col], where the row begins at `begin.x` in a and at `begin.y` in b.
fn kronecker(begin: vec2<u32>, col: u32) -> f32 {
    let size = site_numbers();
    if col >= size.y { return 0.0; }
    let block = col / size.w;
    let at = begin.y + col - block * size.w;
    return a[begin.x + block] * b[at / 4u][at % 4u];
}

fn load_site(row: u32, col: u32) -> vec4<f32> {
    let size = site_numbers();
    if row >= size.x || col >= size.y { return vec4<f32>(0.0); }
    let row_of_a = row / size.z;
    let begin = vec2<u32>(row_of_a * (size.y / size.w), (row - row_of_a * size.z) * size.w);
    // If the four columns lie in one block, one division finds them, and one load reads them.
    if (size.w | col) % 4u == 0u {
        let block = col / size.w;
        return a[begin.x + block] * b[(begin.y + col - block * size.w) / 4u];
    }
    return vec4<f32>(
        kronecker(begin, col),
        kronecker(begin, col + 1u),
        kronecker(begin, col + 2u),
        kronecker(begin, col + 3u),
    );
}
