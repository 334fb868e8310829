// Results leave four at a time: n is a multiple of 4.
alias Stored = vec4<f32>;

fn widen(x: Stored) -> vec4<f32> { return x; }

fn narrow(x: vec4<f32>) -> Stored { return x; }

fn store(batch: u32, row: u32, col: u32, value: vec4<f32>) {
    if row < p.m && col < p.n { store_piece(((batch * p.m + row) * p.n + col) / 4u, col / 4u, value); }
}
