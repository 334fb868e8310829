// y[b] = store(x[b] w[b]) for x [m, k], w [k, n]. The gradients are the same product with other loads:
// dx = dy w^T, dw = x^T dy. Operands arrive as 4 x 4 blocks through the slots. The fragment in a slot knows the memory
// layout (plain, transposed, any strides, a sharing kind), and the core does not.
//
// Tiled: a workgroup computes TILE_M x TILE_N of y from tiles of depth TILE_K in workgroup memory. A thread computes
// THREAD_M x THREAD_N in named registers. Per workgroup and step of k there are TILE_M + TILE_N loads for 2 TILE_M TILE_N
// flops.
//
// BLOCKED: a running sum ends after 64 terms and is added to a total. In one sum over a long inner axis, rounding errors
// would grow, because those of equal terms do not cancel.

const TILE_M: u32 = 64u;
const TILE_N: u32 = 64u;
const TILE_K: u32 = 16u;
const THREAD_M: u32 = 8u;
const THREAD_N: u32 = 8u;
const WIDE: u32 = TILE_N / THREAD_N;
const THREADS: u32 = WIDE * (TILE_M / THREAD_M);
const ROWS4: u32 = TILE_M / 4u;
const COLS4: u32 = TILE_N / 4u;
const BLOCKED: bool = false;
const BLOCK: u32 = 64u;    // a multiple of TILE_K

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

var<workgroup> left: array<vec4<f32>, TILE_K * ROWS4>;
var<workgroup> right: array<vec4<f32>, TILE_K * COLS4>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row0 = group.y * TILE_M;
    let col0 = group.x * TILE_N;
    let tx = lane % WIDE;
    let ty = lane / WIDE;
    // Computed once: a division in the loads would stay in the loop, since compilers may not move what could trap.
    let outer = group.z / p.batch_inner;
    let inner = group.z % p.batch_inner;
    let lhs_base = p.lhs.x + outer * p.lhs.z + inner * p.lhs.w;
    let rhs_base = p.rhs.x + outer * p.rhs.z + inner * p.rhs.w;
#unroll i THREAD_M
#unroll j THREAD_N/4
    var c${i}_${j} = vec4<f32>(0.0);
    var total${i}_${j} = vec4<f32>(0.0);
#end
#end
    for (var k0 = 0u; k0 < p.k; k0 += TILE_K) {
        for (var t = lane; t < ROWS4 * (TILE_K / 4u); t += THREADS) {
            let r = t % ROWS4;
            let q = (t / ROWS4) * 4u;
            var block = mat4x4<f32>();
            if k0 + q < p.k { block = load_lhs(lhs_rows(lhs_base, row0 + r * 4u), k0 + q); }
            left[q * ROWS4 + r] = block[0];
            left[(q + 1u) * ROWS4 + r] = block[1];
            left[(q + 2u) * ROWS4 + r] = block[2];
            left[(q + 3u) * ROWS4 + r] = block[3];
        }
        for (var t = lane; t < COLS4 * (TILE_K / 4u); t += THREADS) {
            let c = t % COLS4;
            let q = (t / COLS4) * 4u;
            var block = mat4x4<f32>();
            if k0 + q < p.k { block = load_rhs(rhs_base, k0 + q, col0 + c * 4u); }
            right[q * COLS4 + c] = block[0];
            right[(q + 1u) * COLS4 + c] = block[1];
            right[(q + 2u) * COLS4 + c] = block[2];
            right[(q + 3u) * COLS4 + c] = block[3];
        }
        workgroupBarrier();
        for (var q = 0u; q < TILE_K; q++) {
#unroll i THREAD_M/4
            let a$i = left[q * ROWS4 + ty * (THREAD_M / 4u) + ${i}u];
#end
#unroll j THREAD_N/4
            let b$j = right[q * COLS4 + tx * (THREAD_N / 4u) + ${j}u];
#end
#unroll i THREAD_M
#unroll j THREAD_N/4
            c${i}_${j} = fma(vec4<f32>(a${i/4}.$xyzw{i}), b$j, c${i}_${j});
#end
#end
        }
        workgroupBarrier();
        if BLOCKED {
            if (k0 + TILE_K) % BLOCK == 0u {
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
    store(group.z, row0 + ty * THREAD_M + ${i}u, col0 + tx * THREAD_N + ${j*4}u, c${i}_${j});
#end
#end
}
