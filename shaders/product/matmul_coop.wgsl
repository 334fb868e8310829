// y[b] = store(x[b] w[b]) as in matmul.wgsl, with cooperative matrices: the adapter's matrix units, if it has any.
//
// Operands are rounded to f16 as a tile is filled, and their products are summed in f32. This is exact if they are stored
// as f16. A workgroup computes TILE_M x TILE_N from tiles of depth TILE_K in workgroup memory. Its subgroups form a grid
// of HIGH x WIDE, and each computes its part of the tile in SIZE x SIZE matrices. Results pass through workgroup memory
// on their way out, because an epilogue cannot access the elements of a matrix.
// The tile of x is [k, m], that of w is [k, n]. Their rows are SKEW longer than the tile, which spreads them over memory
// banks.

const SIZE: u32 = 16u;     // 16 on Vulkan, 8 on Metal; the names of the types below have it too
const TILE_M: u32 = 64u;
const TILE_N: u32 = 64u;
const TILE_K: u32 = 32u;
const HIGH: u32 = 2u;
const WIDE: u32 = 2u;
const LANES: u32 = 32u;    // the most lanes that a subgroup may have
const MATRICES_M: u32 = TILE_M / HIGH / SIZE;
const MATRICES_N: u32 = TILE_N / WIDE / SIZE;
const MATRICES_K: u32 = TILE_K / SIZE;
const SUBGROUPS: u32 = HIGH * WIDE;
const THREADS: u32 = SUBGROUPS * LANES;
const ROWS4: u32 = TILE_M / 4u;
const COLS4: u32 = TILE_N / 4u;
const SKEW: u32 = 8u;
const LEFT: u32 = TILE_M + SKEW;
const RIGHT: u32 = TILE_N + SKEW;
const PIECES: u32 = SIZE * SIZE / 4u;
alias MatrixA = coop_mat16x16<f16, A>;
alias MatrixB = coop_mat16x16<f16, B>;
alias MatrixC = coop_mat16x16<f32, C>;

#import matmul
#import lhs = lhs_plain
#import lhs_word = lhs_f32
#import rhs = rhs_plain
#import rhs_word = rhs_f32
#import site = site_none
#import hash
#import store = store_plain
#import place = place_plain
#import pieces = pieces_of_1
#import epilogue
#import elementwise
#import exp_log
#import nan

var<workgroup> left: array<f16, TILE_K * LEFT>;
var<workgroup> right: array<f16, TILE_K * RIGHT>;
var<workgroup> result: array<f32, SUBGROUPS * SIZE * SIZE>;

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
#unroll i MATRICES_M
#unroll j MATRICES_N
    var c${i}_${j}: MatrixC;
#end
#end
    for (var k0 = range.x; k0 < range.y; k0 += TILE_K) {
        for (var t = lane; t < ROWS4 * (TILE_K / 4u); t += THREADS) {
            let r = t % ROWS4 * 4u;
            let q = t / ROWS4 * 4u;
            var block = mat4x4<f32>();
            if k0 + q < p.k { block = load_lhs(lhs_rows(lhs_base, row0 + r), k0 + q); }
#unroll q 4
#unroll e 4
            left[(q + ${q}u) * LEFT + r + ${e}u] = f16(block[$q][$e]);
#end
#end
        }
        for (var t = lane; t < COLS4 * (TILE_K / 4u); t += THREADS) {
            let c = t % COLS4 * 4u;
            let q = t / COLS4 * 4u;
            var block = mat4x4<f32>();
            if k0 + q < p.k { block = load_rhs(rhs_base, k0 + q, col0 + c); }
#unroll q 4
#unroll e 4
            right[(q + ${q}u) * RIGHT + c + ${e}u] = f16(block[$q][$e]);
#end
#end
        }
        workgroupBarrier();
#unroll s MATRICES_K
#unroll i MATRICES_M
        let a${s}_$i = coopLoad<MatrixA>(&left[${s}u * SIZE * LEFT + own_m + ${i}u * SIZE], LEFT);
#end
#unroll j MATRICES_N
        let b${s}_$j = coopLoadT<MatrixB>(&right[${s}u * SIZE * RIGHT + own_n + ${j}u * SIZE], RIGHT);
#unroll i MATRICES_M
        c${i}_${j} = coopMultiplyAdd(a${s}_$i, b${s}_$j, c${i}_${j});
#end
#end
#end
        workgroupBarrier();
    }
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
}
