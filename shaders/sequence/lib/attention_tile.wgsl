// Tiles of attention_tiled.wgsl and attention_tiled_backward.wgsl.

const WIDTH: u32 = CHUNK * CHUNKS;   // vectors of a head in workgroup memory: HEAD, filled up with zeros
const ROWS: u32 = 8u * TALL;         // rows of a workgroup

// One chunk of 32 keys, values or queries.
var<workgroup> tile: array<vec4<f32>, 32u * CHUNK>;

// Where vector x of a row of `width` vectors lies. The eight vectors that fill all banks are exchanged, differently for each
// `turn`: threads that read the same vector of different rows would else meet in the same banks.
fn swizzled(row: u32, x: u32, width: u32, turn: u32) -> u32 { return row * width + (x ^ (turn % 8u)); }

// Vector x of a head, or zeros past its end.
fn inside(vector: vec4<f32>, x: u32) -> vec4<f32> { return select(vec4<f32>(0.0), vector, x < HEAD); }
