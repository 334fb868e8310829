// The weights of a site are written four at a time: the number of columns is a multiple of 4.
alias Piece = vec4<f32>;

@group(0) @binding(4) var<storage, read_write> y: array<Out>;

fn write(row: u32, col: u32, w: vec4<f32>) {
    y[(row * site_numbers().y + col) / 4u] = to_out(w);
}
