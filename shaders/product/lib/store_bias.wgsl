// y = act(x w + bias)
@group(0) @binding(4) var<storage, read_write> y: array<Out>;
@group(0) @binding(5) var<storage, read> bias: array<Stored>;

fn store_piece(at: u32, col: u32, value: Stored) {
    y[at] = to_out(activated(value + bias[col]));
}
