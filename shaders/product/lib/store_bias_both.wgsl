// before = x w + bias, y = act(before)
@group(0) @binding(4) var<storage, read_write> y: array<Out>;
@group(0) @binding(5) var<storage, read> bias: array<Stored>;
@group(0) @binding(9) var<storage, read_write> before: array<Stored>;

fn store_piece(at: u32, col: u32, value: Stored) {
    let x = value + bias[col];
    before[at] = x;
    y[at] = to_out(activated(x));
}
