// y = x w
@group(0) @binding(4) var<storage, read_write> y: array<Out>;

fn store_piece(at: u32, col: u32, value: Stored) {
    y[at] = to_out(value);
}
