// y = x w + bias + residual
@group(0) @binding(4) var<storage, read_write> y: array<Stored>;
@group(0) @binding(5) var<storage, read> bias: array<Stored>;
@group(0) @binding(6) var<storage, read> residual: array<Stored>;

fn store_piece(at: u32, col: u32, value: Stored) {
    y[at] = value + bias[col] + residual[at];
}
