// place slot of matmul: row i of the product is row i of y.

fn place(row: u32) -> u32 { return row; }

fn weigh(row: u32, value: vec4<f32>) -> vec4<f32> { return value; }
