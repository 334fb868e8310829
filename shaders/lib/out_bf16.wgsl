// out slot: results stored as bf16, two per word. They come in vectors of four.
alias Out = vec2<u32>;

fn out_of(x: Out) -> vec4<f32> { return unpack_bf16(x); }

fn to_out(x: vec4<f32>) -> Out { return pack_bf16(x); }
