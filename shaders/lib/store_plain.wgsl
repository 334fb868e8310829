// y = x w
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

fn store_one(at: u32, row: u32, col: u32, value: f32) {
    if col < p.n { y[at + col] = value; }
}
