// kept slot of attention_tiled_backward: the gradients of the scores are not kept.

fn keep(pair: u32, key: u32, head: u32, query: u32, slopes: vec4<f32>) {}
