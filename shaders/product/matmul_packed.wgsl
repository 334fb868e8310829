// y[b] = store(x[b] W^T) for a few rows of x [m, k] and packed W [n, k], as in decoding, whose time is that of reading W.
// A lane takes THREAD_N rows of W, and of each a unit of 32 columns at a time: one load for 4 bits, one for the scale.
// Each weight is unpacked once and multiplied with THREAD_M rows of x. DEEP lanes share the inner axis: on GPUs, where
// neighbouring lanes should read neighbouring units.
//
// By count, for m = 1 and 4 bits: 5/8 bytes of W and 4.5 instructions for a weight. A card of 10 instructions a byte of
// its memory's rate is limited by memory.
// A sum of a unit has 8 terms, and the sums of units are added in turn.

const THREAD_M: u32 = 1u;
const THREAD_N: u32 = 4u;
const WIDE: u32 = 16u;     // lanes along a row of y
const DEEP: u32 = 1u;      // lanes along the inner axis
const FLAT: u32 = WIDE;
const THREADS: u32 = FLAT * DEEP;

#import matmul
#import lhs = lhs_plain
#import lhs_word = lhs_f32
#import site = site_packed
#import private = private_none
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

fn site_numbers() -> vec4<u32> { return p.rhs; }

// Scale and offset of both halves of the unit at column k.
fn unit_scales(start: u32, k: u32) -> vec4<f32> {
    if GROUP % 32u != 0u { return vec4(scale_of(start, k), scale_of(start, min(k + 16u, p.k - 1u))); }
    return scale_of(start, k).xyxy;
}

// The words of the low part of the unit at column k: `second` are those of 8 bits beyond the first four.
fn unit_low(start: u32, k: u32, second: u32) -> vec4<u32> {
    let at = start + k / 32u * LOW_BITS;
    if LOW_BITS == 2u { return vec4(word_at(at), word_at(at + 1u), 0u, 0u); }
    return packed[at / 4u + second];
}

fn unit_high(start: u32, k: u32) -> vec2<u32> {
    if HIGH_BITS == 0u { return vec2(0u); }
    let at = start + (p.k + 31u) / 32u * LOW_BITS + k / 32u * HIGH_BITS;
    return vec2(word_at(at), word_at(at + HIGH_BITS - 1u));
}

fn unit_weights(low: vec4<u32>, more: vec4<u32>, high: vec2<u32>, i: u32, scales: vec4<f32>) -> vec4<f32> {
    let scale = select(scales.xy, scales.zw, i >= 4u);
    var word = low[i % min(LOW_BITS, 4u)];
    if LOW_BITS == 8u && i >= 4u { word = more[i % 4u]; }
    return unpack(word, high[i % max(HIGH_BITS, 1u)], i, scale);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * THREAD_M;
    let col = (group.x * WIDE + lane % WIDE) * THREAD_N;
    let range = range_of(group.z);
    let base = lhs_at(group.z);
    // A lane outside y has nothing to compute, but must come to the barriers, if there are any.
    let end = select(0u, range.y, col < p.n);
#unroll i THREAD_M
    let x$i = base + row_at(row + ${i}u) * p.lhs.y;
#unroll j THREAD_N
    var sum${i}_${j} = vec4<f32>(0.0);
#end
#end
#unroll j THREAD_N
    let w$j = row_start(col_at(col + ${j}u));
#end
    for (var k = range.x + lane / FLAT * 32u; k < end; k += 32u * DEEP) {
#unroll j THREAD_N
        let scales$j = unit_scales(w$j, k);
        let low$j = unit_low(w$j, k, 0u);
        var more$j = low$j;
        if LOW_BITS == 8u { more$j = unit_low(w$j, k, 1u); }
        let high$j = unit_high(w$j, k);
#unroll i THREAD_M
        var c${i}_${j} = vec4<f32>(0.0);
#end
#end
#unroll q 8
#unroll i THREAD_M
        let x${i}_${q} = in_k(k + ${q*4}u, lhs_row(x$i + min(k + ${q*4}u, p.k - 4u)));
#end
#unroll j THREAD_N
        let v${j}_${q} = unit_weights(low$j, more$j, high$j, ${q}u, scales$j);
#unroll i THREAD_M
        c${i}_${j} = fma(v${j}_${q}, x${i}_${q}, c${i}_${j});
#end
#end
#end
#unroll i THREAD_M
#unroll j THREAD_N
        sum${i}_${j} += c${i}_${j};
#end
#end
    }
#unroll i THREAD_M
#unroll j THREAD_N
    let y${i}_${j} = sum${i}_${j}.x + sum${i}_${j}.y + (sum${i}_${j}.z + sum${i}_${j}.w);
#end
#unroll j THREAD_N/4
    let total${i}_${j} = total(vec4(y${i}_${j*4}, y${i}_${j*4+1}, y${i}_${j*4+2}, y${i}_${j*4+3}), lane);
    if lane < FLAT { store(group.z, row + ${i}u, col + ${j*4}u, total${i}_${j}); }
#end
#end
}
