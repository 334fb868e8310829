// What every store of matmul shares; each store defines `store_one`, one element at row start `at`.
// 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu. A constant: the compiler keeps one branch.
const ACTIVATION: u32 = 0u;

fn activated(x: f32) -> f32 {
    switch ACTIVATION {
        case 1u: { return max(x, 0.0); }
        case 2u: { return gelu(vec4<f32>(x)).x; }
        case 3u: { return gelu_tanh(vec4<f32>(x)).x; }
        case 4u: { return silu(vec4<f32>(x)).x; }
        default: { return x; }
    }
}

fn store(batch: u32, row: u32, col: u32, value: vec4<f32>) {
    if row >= p.m { return; }
    let at = (batch * p.m + row) * p.n;
    store_one(at, row, col, value.x);
    store_one(at, row, col + 1u, value.y);
    store_one(at, row, col + 2u, value.z);
    store_one(at, row, col + 3u, value.w);
}
