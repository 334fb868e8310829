// y[b] = store(x[b] w[b]) as in matmul.wgsl, with cooperative matrices: the adapter's matrix units, if it has any.
//
// Products of f16 are summed in f32. Operands that are stored as f16 are copied as they are, so this is exact; f32 is
// rounded to f16 as a tile is filled. A workgroup computes TILE_M x TILE_N from tiles of depth TILE_K in workgroup
// memory. Its subgroups form a grid of HIGH x WIDE, and each computes its part of the tile in SIZE x SIZE matrices.
//
// A tile keeps the orientation of its operand, and the matrices are loaded by rows or by columns. So a word of four
// elements is read from one line of the operand and stored in one piece, beside the words of the neighbouring lanes.
// Lines of a tile are SKEW elements longer than its side. That puts eight lines at different sixteen bytes of the 128
// that memory banks serve at a time, where the units read them.
//
// Threads hold the words of the next tile in registers while the units work on this one. With two STAGES there are two
// tiles in turn and one barrier a step, with one STAGE there are two barriers.
//
// If the sizes are multiples of the tile's and nothing but the sum is asked for (DIRECT), matrices are stored to y, or
// added to it. Otherwise they pass through workgroup memory, because an epilogue cannot access a matrix's elements.
//
// Counts for matrices of 16 and subgroups of 32 lanes. Of one multiply (8192 operations), on an H200's rate of 2400
// operations a cycle and multiprocessor, and of what 128 bytes a cycle of workgroup memory allow:
//
//   tile        subgroups  words of   sums   read and stored   of the units'   memory of one and two
//               and parts  a fetch    (registers of a thread)  rate            stages, and of results
//   128x128x32  8 of 64x32   4 (16)    64    384 + 128 bytes   0.86            20.0, 40.0, 8 KiB
//   64x64x64    4 of 32x32  16 (32)    32    512 + 256 bytes   0.57            18.0, 36.0, 4 KiB
//
// From the caches a workgroup of the large tile reads 16 KiB for 2 x 128 x 128 x 32 operations: 64 operations a byte.

const SIZE: u32 = 16u;     // 16 on Vulkan, 8 on Metal; the names of the types below have it too
const TILE_M: u32 = 64u;
const TILE_N: u32 = 64u;
const TILE_K: u32 = 32u;
const HIGH: u32 = 2u;
const WIDE: u32 = 2u;
const STAGES: u32 = 1u;
const DIRECT: u32 = 0u;    // 0: through workgroup memory, 1: y = x w, 2: y += x w
const LANES: u32 = 32u;    // the most lanes that a subgroup may have
const MATRICES_M: u32 = TILE_M / HIGH / SIZE;
const MATRICES_N: u32 = TILE_N / WIDE / SIZE;
const MATRICES_K: u32 = TILE_K / SIZE;
const SUBGROUPS: u32 = HIGH * WIDE;
const THREADS: u32 = SUBGROUPS * LANES;
const LEFT_WORDS: u32 = TILE_M * TILE_K / 4u / THREADS;
const RIGHT_WORDS: u32 = TILE_N * TILE_K / 4u / THREADS;
const SKEW: u32 = 8u;
const PIECES: u32 = SIZE * SIZE / 4u;
alias MatrixA = coop_mat16x16<f16, A>;
alias MatrixB = coop_mat16x16<f16, B>;
alias MatrixC = coop_mat16x16<f32, C>;

#import matmul
#import lhs = coop_lhs_plain
#import lhs_word = lhs_f32
#import rhs = coop_rhs_plain
#import rhs_word = rhs_f32
#import tile = coop_tile_words
#import site = site_none
#import private = private_none
#import hash
#import store = store_plain
#import place = place_plain
#import pieces = pieces_of_1
#import out = out_stored
#import packed = packed_none
#import epilogue
#import elementwise
#import exp_log
#import nan

// Distances of neighbouring elements and whole tiles, in elements. A tile of the left side has TILE_M lines along k, or
// TILE_K lines along m.
const LEFT_SIDE: u32 = select(TILE_M, TILE_K, LEFT_BY_ROWS == 1u);
const LEFT_LINE: u32 = LEFT_SIDE + SKEW;
const LEFT_M: u32 = select(1u, LEFT_LINE, LEFT_BY_ROWS == 1u);
const LEFT_K: u32 = select(LEFT_LINE, 1u, LEFT_BY_ROWS == 1u);
const LEFT_TILE: u32 = TILE_M * TILE_K / LEFT_SIDE * LEFT_LINE;
const RIGHT_SIDE: u32 = select(TILE_K, TILE_N, RIGHT_BY_ROWS == 1u);
const RIGHT_LINE: u32 = RIGHT_SIDE + SKEW;
const RIGHT_K: u32 = select(1u, RIGHT_LINE, RIGHT_BY_ROWS == 1u);
const RIGHT_N: u32 = select(RIGHT_LINE, 1u, RIGHT_BY_ROWS == 1u);
const RIGHT_TILE: u32 = TILE_N * TILE_K / RIGHT_SIDE * RIGHT_LINE;

var<workgroup> result: array<f32, SUBGROUPS * SIZE * SIZE>;

// The line of word t of a tile whose lines have `side` elements. Sixteen lanes store 128 bytes at a time. In lines of 32
// elements these are two lines, and they are taken four apart, which are 64 bytes apart in the 128 of the banks.
fn line_of(t: u32, side: u32) -> u32 {
    let line = t / (side / 4u);
    return select(line, line / 8u * 8u + line % 2u * 4u + line / 2u % 4u, side == 32u);
}

fn along(t: u32, side: u32) -> u32 { return t % (side / 4u) * 4u; }

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    let row0 = group.y * TILE_M;
    let col0 = group.x * TILE_N;
    let range = range_of(group.z);
    let lhs_base = lhs_at(group.z);
    let rhs_base = rhs_at(group.z);
    // If subgroups are smaller than LANES, there are more than SUBGROUPS of them. The surplus ones repeat the work of the
    // last.
    let own = min(subgroup, SUBGROUPS - 1u);
    let own_m = own / WIDE * (TILE_M / HIGH);
    let own_n = own % WIDE * (TILE_N / WIDE);
    // A thread's words of the tiles: line, position in the line, address of the first tile's word, and the word.
#unroll i LEFT_WORDS
    let lhs_line$i = line_of(lane + ${i}u * THREADS, LEFT_SIDE);
    let lhs_along$i = along(lane + ${i}u * THREADS, LEFT_SIDE);
    let lhs_from$i = lhs_start(lhs_base, row0, lhs_line$i, lhs_along$i);
    var lhs_word$i = lhs_fetch(lhs_from$i, row0, range.x, lhs_line$i, lhs_along$i);
#end
#unroll i RIGHT_WORDS
    let rhs_line$i = line_of(lane + ${i}u * THREADS, RIGHT_SIDE);
    let rhs_along$i = along(lane + ${i}u * THREADS, RIGHT_SIDE);
    let rhs_from$i = rhs_start(rhs_base, col0, rhs_line$i, rhs_along$i);
    var rhs_word$i = rhs_fetch(rhs_from$i, col0, range.x, rhs_line$i, rhs_along$i);
#end
    let first = range.x / TILE_K % STAGES;
#unroll i LEFT_WORDS
    put_left(
        first * LEFT_TILE + lhs_line$i * LEFT_LINE + lhs_along$i,
        lhs_halves(lhs_word$i, range.x, lhs_line$i, lhs_along$i));
#end
#unroll i RIGHT_WORDS
    put_right(
        first * RIGHT_TILE + rhs_line$i * RIGHT_LINE + rhs_along$i,
        rhs_halves(rhs_word$i, range.x, rhs_line$i, rhs_along$i));
#end
#unroll i MATRICES_M
#unroll j MATRICES_N
    var c${i}_${j}: MatrixC;
#end
#end
    for (var k0 = range.x; k0 < range.y; k0 += TILE_K) {
        let next = k0 + TILE_K;
        let stage = k0 / TILE_K % STAGES;
        let left0 = stage * LEFT_TILE + own_m * LEFT_M;
        let right0 = stage * RIGHT_TILE + own_n * RIGHT_N;
        workgroupBarrier();
        if next < range.y {
#unroll i LEFT_WORDS
            lhs_word$i = lhs_fetch(lhs_from$i, row0, next, lhs_line$i, lhs_along$i);
#end
#unroll i RIGHT_WORDS
            rhs_word$i = rhs_fetch(rhs_from$i, col0, next, rhs_line$i, rhs_along$i);
#end
        }
#unroll s MATRICES_K
#unroll i MATRICES_M
#unroll rows LEFT_BY_ROWS
        let a${s}_$i = coopLoadT<MatrixA>(&left[(left0 + ${i}u * SIZE * LEFT_M + ${s}u * SIZE) / UNIT], LEFT_LINE / UNIT);
#end
#unroll columns 1-LEFT_BY_ROWS
        let a${s}_$i = coopLoad<MatrixA>(&left[(left0 + ${i}u * SIZE + ${s}u * SIZE * LEFT_K) / UNIT], LEFT_LINE / UNIT);
#end
#end
#unroll j MATRICES_N
#unroll rows RIGHT_BY_ROWS
        let b${s}_$j = coopLoadT<MatrixB>(&right[(right0 + ${j}u * SIZE + ${s}u * SIZE * RIGHT_K) / UNIT], RIGHT_LINE / UNIT);
#end
#unroll columns 1-RIGHT_BY_ROWS
        let b${s}_$j = coopLoad<MatrixB>(&right[(right0 + ${j}u * SIZE * RIGHT_N + ${s}u * SIZE) / UNIT], RIGHT_LINE / UNIT);
#end
#unroll i MATRICES_M
        c${i}_${j} = coopMultiplyAdd(a${s}_$i, b${s}_$j, c${i}_${j});
#end
#end
#end
        // The only tile is overwritten when all have read it.
#unroll only 2-STAGES
        workgroupBarrier();
#end
        if next < range.y {
            let to = next / TILE_K % STAGES;
#unroll i LEFT_WORDS
            put_left(
                to * LEFT_TILE + lhs_line$i * LEFT_LINE + lhs_along$i,
                lhs_halves(lhs_word$i, next, lhs_line$i, lhs_along$i));
#end
#unroll i RIGHT_WORDS
            put_right(
                to * RIGHT_TILE + rhs_line$i * RIGHT_LINE + rhs_along$i,
                rhs_halves(rhs_word$i, next, rhs_line$i, rhs_along$i));
#end
        }
    }
#unroll direct (DIRECT+1)/2
    let stride = p.n;
#unroll i MATRICES_M
#unroll j MATRICES_N
    let at${i}_$j = (group.z * p.m + row0 + own_m + ${i}u * SIZE) * p.n + col0 + own_n + ${j}u * SIZE;
#end
#end
    // All have read y before any change it, so what a surplus subgroup stores is the same. The order of a read and a later
    // write needs no barrier of storage, and naga would declare that one for a scope that it does not enable.
#unroll add DIRECT-direct-1
#unroll i MATRICES_M
#unroll j MATRICES_N
    c${i}_$j = coopLoadT<MatrixC>(&y[at${i}_$j], stride) + c${i}_$j;
#end
#end
    workgroupBarrier();
#end
#unroll i MATRICES_M
#unroll j MATRICES_N
    coopStoreT(c${i}_$j, &y[at${i}_$j], stride);
#end
#end
#end
#unroll through 1-(DIRECT+1)/2
    let at = own * SIZE * SIZE;
    let stride = SIZE;
#unroll i MATRICES_M
#unroll j MATRICES_N
    coopStoreT(c${i}_${j}, &result[at], stride);
    workgroupBarrier();
    for (var t = lane; t < SUBGROUPS * PIECES; t += THREADS) {
        let source = t / PIECES;
        let row = row0 + source / WIDE * (TILE_M / HIGH) + ${i}u * SIZE + t % PIECES / (SIZE / 4u);
        let col = col0 + source % WIDE * (TILE_N / WIDE) + ${j}u * SIZE + t % (SIZE / 4u) * 4u;
        let value = vec4<f32>(result[4u * t], result[4u * t + 1u], result[4u * t + 2u], result[4u * t + 3u]);
        store(group.z, row, col, value);
    }
    workgroupBarrier();
#end
#end
#end
}
