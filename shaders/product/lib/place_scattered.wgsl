// place slot of matmul: row i of the product, times gate[i], goes to row rows[i] of y. A row that y does not have is left
// out.
@group(0) @binding(7) var<storage, read> rows: array<u32>;
@group(0) @binding(8) var<storage, read> gate: array<f32>;

fn place(row: u32) -> u32 { return select(NOWHERE, rows[row], rows[row] < p.rows); }

fn weigh(row: u32, value: vec4<f32>) -> vec4<f32> { return gate[row] * value; }
