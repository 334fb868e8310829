// grad slot: an incoming gradient stored as bf16, two per word. It is read in vectors of four.
alias Grad = vec2<u32>;

fn grad_of(x: Grad) -> vec4<f32> { return unpack_bf16(x); }
