// y += x w: how a shared weight's gradient lands in one buffer.
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

fn store_one(at: u32, row: u32, col: u32, value: f32) {
    if col < p.n { y[at + col] = y[at + col] + value; }
}

fn store(batch: u32, row: u32, col: u32, value: vec4<f32>) {
    if row >= p.m { return; }
    let at = (batch * p.m + row) * p.n;
    store_one(at, row, col, value.x);
    store_one(at, row, col + 1u, value.y);
    store_one(at, row, col + 2u, value.z);
    store_one(at, row, col + 3u, value.w);
}
