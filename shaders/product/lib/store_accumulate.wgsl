// y += x w: all uses of a shared weight add to one gradient buffer.
@group(0) @binding(4) var<storage, read_write> y: array<Out>;

fn store_piece(at: u32, col: u32, value: Stored) {
    y[at] = to_out(out_of(y[at]) + value);
}
