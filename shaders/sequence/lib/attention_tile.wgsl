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

// A tile is filled by its threads in CHUNK / 2 turns, in which neighbours have neighbouring vectors. The row of the tile, the row
// in storage, and the vector that a thread has in turn f, clamped to what there is.
fn row_of(lane: u32, f: u32) -> u32 { return (f * 64u + lane) / CHUNK; }
fn source_of(lane: u32, f: u32, first: u32, end: u32) -> u32 { return min(first + row_of(lane, f), end - 1u); }
fn vector_of(lane: u32, chunk: u32) -> u32 { return min(chunk * CHUNK + lane % CHUNK, HEAD - 1u); }

// Rows from `end` on are zeros: their weights are 0 as well, but 0 times infinity is NaN.
fn put(lane: u32, f: u32, first: u32, end: u32, chunk: u32, vector: vec4<f32>) {
    let row = row_of(lane, f);
    let there = chunk * CHUNK + lane % CHUNK < HEAD && first + row < end;
    tile[swizzled(row, lane % CHUNK, CHUNK, row / 4u)] = select(vec4<f32>(0.0), vector, there);
}
