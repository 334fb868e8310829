// private slot of a sharing kind: nothing is added to the weight that all sites share.

fn with_private(row: u32, col: u32, w: vec4<f32>) -> vec4<f32> { return w; }
