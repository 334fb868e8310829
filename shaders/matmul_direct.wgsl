// y[b] = store(x[b] w[b]) for x [m, k], w [k, n]; the gradients are the same product with other loads:
// dx = dy w^T, dw = x^T dy. Operands arrive as 4 x 4 blocks through the slots, so that a slot decides how memory is
// laid out (plain, transposed, any strides, a sharing kind) and the core never asks.
//
// Direct: no workgroup memory. A thread makes THREAD_M x THREAD_N in named registers and reads 4 x 4 blocks from
// storage; the lanes of a subgroup lie along a row of y where it is long enough, so that all read the same block of x.
// This is the fastest shape on CPU drivers, where registers are wide and workgroup memory is only memory.

const THREAD_M: u32 = 16u;
const THREAD_N: u32 = 16u;
const WIDE: u32 = 8u;
const HIGH: u32 = 4u;
const THREADS: u32 = WIDE * HIGH;

struct Params {
    m: u32,
    n: u32,
    k: u32,
    batch_inner: u32,   // batches are (outer, inner): operands step by lhs.z, rhs.z and lhs.w, rhs.w elements
    lhs: vec4<u32>,     // offset, stride of the axis that is not contiguous, outer step, inner step
    rhs: vec4<u32>,
    any: vec2<u32>,     // strides of the other axis, for loads with any strides
    first_row: u32,
    pad: u32,
    site: vec4<u32>,    // the sharing kind's own numbers
}
var<immediate> p: Params;

#import lhs = lhs_plain
#import rhs = rhs_plain
#import site = site_none
#import store = store_plain
#import pieces = pieces_of_1
#import epilogue
#import elementwise

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * HIGH + lane / WIDE) * THREAD_M;
    let col = (group.x * WIDE + lane % WIDE) * THREAD_N;
    if row >= p.m || col >= p.n { return; }
    // Once: a division in the loads would stay in the loop, since compilers may not move what could trap.
    let outer = group.z / p.batch_inner;
    let inner = group.z % p.batch_inner;
    let lhs_base = p.lhs.x + outer * p.lhs.z + inner * p.lhs.w;
    let rhs_base = p.rhs.x + outer * p.rhs.z + inner * p.rhs.w;
#unroll i THREAD_M
#unroll j THREAD_N/4
    var c${i}_${j} = vec4<f32>();
#end
#end
    for (var k = 0u; k < p.k; k += 4u) {
#unroll i THREAD_M/4
        let a$i = load_lhs(lhs_base, row + ${i*4}u, k);
#end
#unroll j THREAD_N/4
        let b$j = load_rhs(rhs_base, k, col + ${j*4}u);
#unroll i THREAD_M
#unroll q 4
        c${i}_${j} = fma(vec4<f32>(a${i/4}[$q].$xyzw{i}), b$j[$q], c${i}_${j});
#end
#end
#end
    }
#unroll i THREAD_M
#unroll j THREAD_N/4
    store(group.z, row + ${i}u, col + ${j*4}u, c${i}_${j});
#end
#end
}
