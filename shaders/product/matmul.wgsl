// y[b] = store(x[b] w[b]) for x [m, k], w [k, n]. The gradients are the same product with other loads:
// dx = dy w^T, dw = x^T dy. Operands arrive as 4 x 4 blocks through the slots. The fragment in a slot knows the memory
// layout (plain, transposed, any strides, a sharing kind), and the core does not.
//
// Tiled: a workgroup computes TILE_M x TILE_N of y from tiles of depth TILE_K in workgroup memory. A thread computes
// THREAD_M x THREAD_N in named registers.
//
// Count, for each workgroup and step of k: TILE_M + TILE_N elements from storage for TILE_M TILE_N multiply-adds, so 8 to
// 64 for each element. For each thread and step of k: THREAD_M + THREAD_N elements from workgroup memory for
// THREAD_M THREAD_N multiply-adds. Registers: two sums for each result, one block for each of FILLS, and both sides of
// one step: 8 x 8 results need about 180, 8 x 4 about 130.
//
// Threads lie in columns of eight: 32 neighbours cover 8 x 4 threads, which read 128 bytes of w and 64 of x at a step. A
// thread's four-column pieces are WIDE pieces apart and its rows HIGH pieces, so neighbours read neighbouring vectors and
// store whole rows of 128 bytes.
//
// The next tile is read into registers before the sums of this one, so that storage answers meanwhile. If the tiles are
// kept in two places in turn (STAGES = 2), one barrier a tile suffices.
//
// BLOCKED: a running sum ends after 64 terms and is added to a total. In one sum over a long inner axis, rounding errors
// would grow, because those of equal terms do not cancel.

const TILE_M: u32 = 64u;
const TILE_N: u32 = 64u;
const TILE_K: u32 = 16u;                  // 16 or 32
const THREAD_M: u32 = 8u;
const THREAD_N: u32 = 8u;
const STAGES: u32 = 2u;
const WIDE: u32 = TILE_N / THREAD_N;      // a multiple of 8, like HIGH
const HIGH: u32 = TILE_M / THREAD_M;
const THREADS: u32 = WIDE * HIGH;
const ROWS4: u32 = TILE_M / 4u;
const COLS4: u32 = TILE_N / 4u;
const DEEP4: u32 = TILE_K / 4u;
const LEFTS: u32 = ROWS4 * DEEP4;         // 4 x 4 blocks of the left tile
const BLOCKS: u32 = LEFTS + COLS4 * DEEP4;
const FILLS: u32 = (BLOCKS + THREADS - 1u) / THREADS;
const BLOCKED: bool = false;
const BLOCK: u32 = 64u;    // a multiple of TILE_K

#import matmul
#import lhs = lhs_plain
#import lhs_word = lhs_f32
#import rhs = rhs_plain
#import rhs_word = rhs_f32
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

var<workgroup> left: array<vec4<f32>, STAGES * TILE_K * ROWS4>;
var<workgroup> right: array<vec4<f32>, STAGES * TILE_K * COLS4>;

// Which four rows or columns a block has, and which four steps of k. Where k is contiguous in storage, neighbouring
// threads read neighbouring steps of k, else neighbouring rows or columns.
fn left_block(t: u32) -> vec2<u32> {
    return select(vec2<u32>(t % ROWS4, t / ROWS4), vec2<u32>(t / DEEP4, t % DEEP4), LHS_BY_K);
}
fn right_block(t: u32) -> vec2<u32> {
    let s = t - LEFTS;
    return select(vec2<u32>(s % COLS4, s / COLS4), vec2<u32>(s / DEEP4, s % DEEP4), RHS_BY_K);
}

// Where piece `at` of the steps `4 deep` to `4 deep + 3` lies. Eight pieces, all banks, are exchanged differently for each
// `deep`: else threads that store neighbouring steps of k would meet in the same banks.
fn swizzled(at: u32, deep: u32) -> u32 { return at ^ (deep * (8u / DEEP4)); }

// Block t of the tile at k0. Blocks past k are zero.
fn fetch(t: u32, rows: vec4<u32>, block: vec2<u32>, rhs_base: u32, col0: u32, k0: u32) -> mat4x4<f32> {
    let k = k0 + block.y * 4u;
    if t >= BLOCKS || k >= p.k { return mat4x4<f32>(); }
    if t < LEFTS { return load_lhs(rows, k); }
    return load_rhs(rhs_base, k, col0 + block.x * 4u);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row0 = group.y * TILE_M;
    let col0 = group.x * TILE_N;
    let tx = lane % 8u + lane / (8u * HIGH) * 8u;
    let ty = lane / 8u % HIGH;
    // Computed once: a division in the loads would stay in the loop, since compilers may not move what could trap.
    let range = range_of(group.z);
    let lhs_base = lhs_at(group.z);
    let rhs_base = rhs_at(group.z);
#unroll i THREAD_M
#unroll j THREAD_N/4
    var c${i}_${j} = vec4<f32>(0.0);
    var total${i}_${j} = vec4<f32>(0.0);
#end
#end
#unroll f FILLS
    // Block t of a tile: the left tile's blocks come first.
    let t$f = lane + ${f}u * THREADS;
    let is_left$f = t$f < LEFTS;
    let block$f = select(right_block(t$f), left_block(t$f), is_left$f);
    var rows$f = vec4<u32>(0u);
    if is_left$f { rows$f = lhs_rows(lhs_base, row0 + block$f.x * 4u); }
#end
#unroll f FILLS
    var next$f = fetch(t$f, rows$f, block$f, rhs_base, col0, range.x);
#end
    for (var k0 = range.x; k0 < range.y; k0 += TILE_K) {
        let stage = select(0u, k0 / TILE_K % STAGES, STAGES > 1u);
        let left0 = stage * (TILE_K * ROWS4);
        let right0 = stage * (TILE_K * COLS4);
#unroll f FILLS
        if is_left$f {
            let to = left0 + block$f.y * 4u * ROWS4 + swizzled(block$f.x, block$f.y);
#unroll q 4
            left[to + ${q}u * ROWS4] = next$f[$q];
#end
        } else if t$f < BLOCKS {
            let to = right0 + block$f.y * 4u * COLS4 + swizzled(block$f.x, block$f.y);
#unroll q 4
            right[to + ${q}u * COLS4] = next$f[$q];
#end
        }
#end
        workgroupBarrier();
        let k1 = k0 + TILE_K;
        if k1 < range.y {
#unroll f FILLS
            next$f = fetch(t$f, rows$f, block$f, rhs_base, col0, k1);
#end
        }
        for (var deep = 0u; deep < DEEP4; deep++) {
            let a = left0 + deep * 4u * ROWS4 + swizzled(ty, deep);
            let b = right0 + deep * 4u * COLS4 + swizzled(tx, deep);
#unroll q 4
#unroll i THREAD_M/4
            let a${q}_$i = left[a + ${q}u * ROWS4 + ${i}u * HIGH];
#end
#unroll j THREAD_N/4
            let b${q}_$j = right[b + ${q}u * COLS4 + ${j}u * WIDE];
#end
#unroll i THREAD_M
#unroll j THREAD_N/4
            c${i}_${j} = fma(vec4<f32>(a${q}_${i/4}.$xyzw{i}), b${q}_$j, c${i}_${j});
#end
#end
#end
        }
        if STAGES == 1u { workgroupBarrier(); }
        if BLOCKED {
            if k1 % BLOCK == 0u {
#unroll i THREAD_M
#unroll j THREAD_N/4
                total${i}_${j} += c${i}_${j};
                c${i}_${j} = vec4<f32>(0.0);
#end
#end
            }
        }
    }
#unroll i THREAD_M
#unroll j THREAD_N/4
    if BLOCKED { c${i}_${j} += total${i}_${j}; }
    store(group.z, row0 + (${i/4}u * HIGH + ty) * 4u + ${i%4}u, col0 + (${j}u * WIDE + tx) * 4u, c${i}_${j});
#end
#end
}
