// Tiles of attention_coop.wgsl and attention_coop_backward.wgsl, for cooperative matrices.
//
// A workgroup has ROWS rows (queries, or in `keys` keys) and walks WALKED others at a time. Each of its SUBGROUPS multiplies the
// matrices of PART rows. Between products, all threads work on single scores: PER threads share a row, and each has QUADS vectors of
// four of its scores, whichever subgroup computed them.
//
// Workgroup memory holds two tiles of walked rows, at TILE_0 and TILE_1, then the weights of the workgroup's rows in f16, at
// WEIGHTS, and scores in f32. Lines are eight halves or four scores longer than their contents. That puts eight lines at different
// sixteen bytes of the 128 that memory banks serve at a time.

const SIZE: u32 = 16u;     // 16 on Vulkan, 8 on Metal; the names of the types below have it too
const PART: u32 = 16u;     // rows of a subgroup
const LANES: u32 = 32u;    // the most lanes that a subgroup may have
const HEAD: u32 = 16u;     // vectors of a head
const DIM: u32 = 64u;      // elements of a head, filled up with zeros to a multiple of WALKED
const SUBGROUPS: u32 = 4u;
const WALKED: u32 = 32u;
const ROWS: u32 = SUBGROUPS * PART;
const THREADS: u32 = SUBGROUPS * LANES;
const PER: u32 = THREADS / ROWS;
const QUADS: u32 = WALKED / PER / 4u;
const TALL: u32 = PART / SIZE;       // matrices of a subgroup's rows
const WIDE: u32 = WALKED / SIZE;     // matrices of a tile's rows
const DEEP: u32 = DIM / SIZE;        // matrices of a head
const BLOCKS: u32 = DIM / WALKED;    // parts of a head that have the size of a row's scores
const WORDS: u32 = WALKED * DIM / 4u / THREADS;   // of a tile, for each thread
const LINE: u32 = DIM + 8u;
const WEIGHT_LINE: u32 = WALKED + 8u;
const SCORE_LINE: u32 = WALKED + 4u;
const TILE_0: u32 = 0u;
const TILE_1: u32 = WALKED * LINE;
const WEIGHTS: u32 = 2u * WALKED * LINE;
const HALVES: u32 = WEIGHTS + ROWS * WEIGHT_LINE;
alias MatrixA = coop_mat16x16<f16, A>;
alias MatrixB = coop_mat16x16<f16, B>;
alias MatrixC = coop_mat16x16<f32, C>;

var<workgroup> scores: array<f32, ROWS * SCORE_LINE>;

// A tile is filled in WORDS turns, in which neighbours have neighbouring vectors: the row and the vector of a thread in turn f.
fn row_of(lane: u32, f: u32) -> u32 { return (f * THREADS + lane) / (DIM / 4u); }
fn vector_of(lane: u32, f: u32) -> u32 { return (f * THREADS + lane) % (DIM / 4u); }

// Where the vector lies in storage, clamped to what there is, if rows from `first` to `end` begin at `base`, `step` vectors apart.
fn source_of(lane: u32, f: u32, base: u32, step: u32, first: u32, end: u32) -> u32 {
    return base + min(first + row_of(lane, f), end - 1u) * step + min(vector_of(lane, f), HEAD - 1u);
}

// Stores it in a tile. Rows from `end` on are zeros: their weights are 0 as well, but 0 times infinity is NaN.
fn put_walked(lane: u32, f: u32, tile: u32, first: u32, end: u32, word: vec4<f16>) {
    let there = first + row_of(lane, f) < end && vector_of(lane, f) < HEAD;
    let to = tile + row_of(lane, f) * LINE + 4u * vector_of(lane, f);
    put(to, select(vec4<f16>(0.0h), word, there));
}

// Stores vector t of the workgroup's own rows, which take both tiles before the walk.
fn put_own(t: u32, word: vec4<f16>) {
    let vector = t % (DIM / 4u);
    put(t / (DIM / 4u) * LINE + 4u * vector, select(vec4<f16>(0.0h), word, vector < HEAD));
}

// Four neighbouring scores.
fn score_at(at: u32) -> vec4<f32> { return vec4<f32>(scores[at], scores[at + 1u], scores[at + 2u], scores[at + 3u]); }
