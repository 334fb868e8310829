// mask slot of attention: no additive mask.

fn mask_row(pair: u32, row: u32) -> u32 { return 0u; }

fn masked(s: vec4<f32>, at: u32, key: u32) -> vec4<f32> { return s; }

fn masked_rows(s: vec4<f32>, at: vec4<u32>, key: u32) -> vec4<f32> { return s; }
