// sums slot of matmul_join: four columns of a part's row, where n is a multiple of 4.
@group(0) @binding(0) var<storage, read> sums_of_parts: array<vec4<f32>>;

fn piece(part: u32, row: u32, col: u32) -> vec4<f32> { return sums_of_parts[((part * p.m + row) * p.n + col) / 4u]; }
