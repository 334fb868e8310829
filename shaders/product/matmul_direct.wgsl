// y[b] = store(x[b] w[b]) for x [m, k], w [k, n]. The gradients are the same product with other loads:
// dx = dy w^T, dw = x^T dy. Operands arrive as 4 x 4 blocks through the slots. The fragment in a slot knows the memory
// layout (plain, transposed, any strides, a sharing kind), and the core does not.
//
// Direct: a thread computes THREAD_M x THREAD_N in named registers and reads 4 x 4 blocks from storage. Each element is
// read once for every thread that needs it. This is the fastest form on CPU drivers, where registers are wide and
// workgroup memory is ordinary memory. There the lanes of a subgroup lie along a row of y, so that all of them read the
// same block of x. On GPUs it serves products with a short side, whose time is that of reading the long operand once.
// There DEEP lanes share the inner axis, and slot `deep` adds up their sums.
//
// BLOCKED: as in matmul.wgsl, a running sum ends after 64 terms of a lane and is added to a total.

const THREAD_M: u32 = 16u;
const THREAD_N: u32 = 16u;
const WIDE: u32 = 8u;      // lanes along a row of y
const HIGH: u32 = 4u;      // lanes along a column
const DEEP: u32 = 1u;      // lanes along the inner axis
const FLAT: u32 = WIDE * HIGH;
const THREADS: u32 = FLAT * DEEP;
const BLOCKED: bool = false;
const BLOCK: u32 = 64u * DEEP;
// Tiles of 12 rows and more, which are for CPU drivers, store two rows in each turn of a loop. Every store is a loop over
// lanes in llvmpipe, so one copy for each row would nearly double the time that LLVM takes for the kernel.
const LARGE: u32 = THREAD_M / 12u;
const TURNS: u32 = 1u + LARGE * (THREAD_M / 2u - 1u);
const ROWS: u32 = THREAD_M / TURNS;

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
#import deep = deep_one
#import epilogue
#import elementwise
#import exp_log
#import nan

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * HIGH + lane % FLAT / WIDE) * THREAD_M;
    let col = (group.x * WIDE + lane % WIDE) * THREAD_N;
    // Computed once: a division in the loads would stay in the loop, since compilers may not move what could trap.
    let range = range_of(group.z);
    let lhs_base = lhs_at(group.z);
    let rhs_base = rhs_at(group.z);
    // A lane outside y has nothing to compute, but must come to the barriers, if there are any.
    let end = select(0u, range.y, row < p.m && col < p.n);
    // Also once: a list of rows is read here and not in every step.
#unroll i THREAD_M/4
    let rows$i = lhs_rows(lhs_base, row + ${i*4}u);
#end
#unroll i THREAD_M
#unroll j THREAD_N/4
    var c${i}_${j} = vec4<f32>(0.0);
    var sum${i}_${j} = vec4<f32>(0.0);
#end
#end
    for (var start = range.x + lane / FLAT * 4u; start < end; start += BLOCK) {
        var stop = end;
        if BLOCKED { stop = min(start + BLOCK, end); }
        for (var k = start; k < stop; k += 4u * DEEP) {
#unroll i THREAD_M/4
            let a$i = load_lhs(rows$i, k);
#end
#unroll j THREAD_N/4
            let b$j = load_rhs(rhs_base, k, col + ${j*4}u);
#unroll i THREAD_M
#unroll q 4
            // One component four times, in a form that DX12's compiler accepts for a column of a matrix.
            c${i}_${j} = fma(a${i/4}[$q].$xyzw{i}$xyzw{i}$xyzw{i}$xyzw{i}, b$j[$q], c${i}_${j});
#end
#end
#end
        }
        if !BLOCKED { break; }
#unroll i THREAD_M
#unroll j THREAD_N/4
        sum${i}_${j} += c${i}_${j};
        c${i}_${j} = vec4<f32>(0.0);
#end
#end
    }
#unroll i THREAD_M
#unroll j THREAD_N/4
    if BLOCKED { c${i}_${j} = sum${i}_${j}; }
#end
#end
    // Rows of a large tile are stored in turns of a loop that compilers cannot unroll, since p.m is not known to them.
    var turn = 0u;
#unroll many LARGE
    for (; turn < TURNS && row + turn * ROWS < p.m; turn += 1u) {
#end
#unroll i THREAD_M/TURNS
#unroll j THREAD_N/4
    var total${i}_${j} = c${i}_${j};
#unroll t TURNS-1
    total${i}_${j} = select(total${i}_${j}, c${i+(t+1)*ROWS}_${j}, turn == ${t+1}u);
#end
    total${i}_${j} = total(total${i}_${j}, lane);
    if lane < FLAT { store(group.z, row + turn * ROWS + ${i}u, col + ${j*4}u, total${i}_${j}); }
#end
#end
#unroll many LARGE
    }
#end
}
