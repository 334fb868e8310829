// in slot: an operand stored as bf16, two per word. It is read in vectors of four.
alias In = vec2<u32>;

fn in_of(x: In) -> vec4<f32> { return unpack_bf16(x); }
