// Results are stored one at a time, for any n.
alias Stored = f32;

fn widen(x: Stored) -> vec4<f32> { return vec4<f32>(x); }

fn narrow(x: vec4<f32>) -> Stored { return x.x; }

fn store(batch: u32, row: u32, col: u32, sum: vec4<f32>) {
    if row >= p.m { return; }
    let to = place(row);
    if to == NOWHERE { return; }
    let value = weigh(row, sum);
    let at = (batch * p.m + to) * p.n + col;
    if col < p.n { store_piece(at, col, value.x); }
    if col + 1u < p.n { store_piece(at + 1u, col + 1u, value.y); }
    if col + 2u < p.n { store_piece(at + 2u, col + 2u, value.z); }
    if col + 3u < p.n { store_piece(at + 3u, col + 3u, value.w); }
}
