// out slot: results stored as f32, in vectors of four.
alias Out = vec4<f32>;

fn out_of(x: Out) -> vec4<f32> { return x; }

fn to_out(x: vec4<f32>) -> Out { return x; }
