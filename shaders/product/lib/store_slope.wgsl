// y = (x w) gelu'(before): the gradient of a GELU's input
@group(0) @binding(4) var<storage, read_write> y: array<Out>;
@group(0) @binding(6) var<storage, read> before: array<Stored>;

fn store_piece(at: u32, col: u32, value: Stored) {
    y[at] = to_out(value * narrow(dgelu(widen(before[at]))));
}
