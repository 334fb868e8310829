// sums slot of matmul_join: four columns of a part's row, for any n. Columns past the end repeat the last one and are
// never stored.
@group(0) @binding(0) var<storage, read> sums_of_parts: array<f32>;

fn piece(part: u32, row: u32, col: u32) -> vec4<f32> {
    let at = (part * p.m + row) * p.n;
    let last = p.n - 1u;
    return vec4<f32>(
        sums_of_parts[at + col],
        sums_of_parts[at + min(col + 1u, last)],
        sums_of_parts[at + min(col + 2u, last)],
        sums_of_parts[at + min(col + 3u, last)],
    );
}
