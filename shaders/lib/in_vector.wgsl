// in slot: an operand stored as f32, read in vectors of four.
alias In = vec4<f32>;

fn in_of(x: In) -> vec4<f32> { return x; }
