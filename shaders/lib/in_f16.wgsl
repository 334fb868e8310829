// in slot: an operand stored as f16, two per word. It is read in vectors of four.
alias In = vec2<u32>;

fn in_of(x: In) -> vec4<f32> { return unpack_half4(x); }
