// Results are stored four at a time: n is a multiple of 4.
alias Stored = vec4<f32>;

fn widen(x: Stored) -> vec4<f32> { return x; }

fn narrow(x: vec4<f32>) -> Stored { return x; }

fn store(batch: u32, row: u32, col: u32, sum: vec4<f32>) {
    if row >= p.m || col >= p.n { return; }
    let to = place(row);
    if to == NOWHERE { return; }
    store_piece(((batch * p.m + to) * p.n + col) / 4u, col / 4u, weigh(row, sum));
}
