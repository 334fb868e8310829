// weights slot of matmul_join: all parts count alike.
fn weight(part: u32, row: u32) -> f32 { return 1.0; }
