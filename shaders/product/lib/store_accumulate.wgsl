// y += x w: how a shared weight's gradient lands in one buffer.
@group(0) @binding(4) var<storage, read_write> y: array<Stored>;

fn store_piece(at: u32, col: u32, value: Stored) {
    y[at] = y[at] + value;
}
