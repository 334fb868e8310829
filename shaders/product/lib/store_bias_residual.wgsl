// y = x w + bias + residual
@group(0) @binding(4) var<storage, read_write> y: array<Out>;
@group(0) @binding(5) var<storage, read> bias: array<Stored>;
@group(0) @binding(6) var<storage, read> residual: array<Out>;

fn store_piece(at: u32, col: u32, value: Stored) {
    y[at] = to_out(value + bias[col] + out_of(residual[at]));
}
