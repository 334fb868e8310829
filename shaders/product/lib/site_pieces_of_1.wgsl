// The weights of a site are written one at a time, for any number of columns.
alias Piece = f32;

@group(0) @binding(4) var<storage, read_write> y: array<Out>;

fn write(row: u32, col: u32, w: vec4<f32>) {
    let columns = site_numbers().y;
    let at = row * columns + col;
    y[at] = to_out(w.x);
    if col + 1u < columns { y[at + 1u] = to_out(w.y); }
    if col + 2u < columns { y[at + 2u] = to_out(w.z); }
    if col + 3u < columns { y[at + 3u] = to_out(w.w); }
}
