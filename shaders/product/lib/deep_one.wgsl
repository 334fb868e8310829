// deep slot of matmul_direct: one lane takes the whole inner axis.

fn total(sum: vec4<f32>, lane: u32) -> vec4<f32> { return sum; }
