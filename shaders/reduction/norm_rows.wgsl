// forward and backward of norm.wgsl for GPUs, with a row in the registers of LANES neighbouring threads. The formulas are there.
//
// A thread holds up to HELD pieces t, t + LANES, ... of its row, which it reads once, all loads under way together. A row then
// costs one trip to memory (about 0.6 us on an H200), two sums over its lanes and the stores, however few rows there are. With 8
// threads to a row of 768 elements it was 72 trips one after the other. Bytes: x is read and y written once. 4096 rows of 768 are
// 4096 workgroups of 64 threads with 3 loads of 16 bytes each, so that the whole 12.6 MB of x are in flight at once.
// Registers: 4 HELD for x and as many each for gain and shift, so 48 for HELD = 4, and 64 for h and x^ in backward at HELD = 8.
//
// Sums over a row have at most 4 HELD terms a thread, then 8 lanes at a time and the eighths in order. The bits are the same every
// time.

const LANES: u32 = 64u;
const HELD: u32 = 4u;
const CENTRED: bool = true;
const THREADS: u32 = max(64u, LANES);

struct Params {
    groups_x: u32,
    rows: u32,
    width: u32,
    eps: f32,
    weighted: u32,    // 1 if there is a weight
    biased: u32,      // 1 if there is a bias
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<In>;
// A weight or bias that is absent is bound to x, a row of which is long enough. Its value is then not used.
@group(0) @binding(1) var<storage, read> weight: array<Piece>;
@group(0) @binding(2) var<storage, read> bias: array<Piece>;
@group(0) @binding(3) var<storage, read_write> y: array<Out>;
@group(0) @binding(4) var<storage, read_write> made: array<f32>;         // [rows, 3]: mean, r, q; mean and q are 0 for rms_norm
@group(0) @binding(5) var<storage, read> statistics: array<f32>;
@group(0) @binding(6) var<storage, read> dy: array<Grad>;
@group(0) @binding(7) var<storage, read_write> dx: array<Out>;

#import piece = piece_4
#import in = in_piece
#import grad = grad_piece
#import out = out_piece
#import packed = packed_none

alias Sum = vec2<f32>;
#import lanes_sum
#import norm
#import nan

@compute @workgroup_size(THREADS)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * (THREADS / LANES) + lane / LANES;
    let t = lane % LANES;
    // Threads beyond the last row hold nothing, but take part in the barriers.
    let n = select(0u, p.width / PIECE, row < p.rows);
    let base = row * (p.width / PIECE);
    let size = f32(p.width);
    // Pieces beyond the row are the first one of x, which is not used, so that no load is behind a branch.
#unroll j HELD
    let x$j = in_of(x[select(0u, base + t + ${j}u * LANES, t + ${j}u * LANES < n)]);
#end
#unroll j HELD
    let g$j = select(Piece(1.0), weight[select(0u, t + ${j}u * LANES, t + ${j}u * LANES < n)], p.weighted != 0u);
    let b$j = select(Piece(0.0), bias[select(0u, t + ${j}u * LANES, t + ${j}u * LANES < n)], p.biased != 0u);
#end
    var mean = 0.0;
    if CENTRED {
        var sum = Piece(0.0);
#unroll j HELD
        sum += select(Piece(0.0), x$j, t + ${j}u * LANES < n);
#end
        mean = lanes_sum(lane, vec2<f32>(sum_of(sum), 0.0)).x / size;
    }
    var first = Piece(0.0);
    var second = Piece(0.0);
#unroll j HELD
    let d$j = select(Piece(0.0), x$j - mean, t + ${j}u * LANES < n);
    first += select(d$j * SMALL, d$j, CENTRED);
    second = fma(d$j, d$j, second);
#end
    let moments = lanes_sum(lane, vec2<f32>(sum_of(first), sum_of(second))) / size;
    let scale = scale_of(moments);
    let r = scale.x;
    let q = scale.y;
#unroll j HELD
    if t + ${j}u * LANES < n { y[base + t + ${j}u * LANES] = to_out(((x$j - mean) * r + q) * g$j + b$j); }
#end
    if t == 0u && row < p.rows {
        made[3u * row] = mean;
        made[3u * row + 1u] = r;
        made[3u * row + 2u] = q;
    }
}

@compute @workgroup_size(THREADS)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * (THREADS / LANES) + lane / LANES;
    let t = lane % LANES;
    let n = select(0u, p.width / PIECE, row < p.rows);
    let base = row * (p.width / PIECE);
    let of_row = 3u * min(row, p.rows - 1u);
    let mean = statistics[of_row];
    let r = statistics[of_row + 1u];
    let q = statistics[of_row + 2u];
#unroll j HELD
    let x$j = in_of(x[select(0u, base + t + ${j}u * LANES, t + ${j}u * LANES < n)]);
    let dy$j = grad_of(dy[select(0u, base + t + ${j}u * LANES, t + ${j}u * LANES < n)]);
#end
#unroll j HELD
    let g$j = select(Piece(1.0), weight[select(0u, t + ${j}u * LANES, t + ${j}u * LANES < n)], p.weighted != 0u);
#end
    var sum_h = Piece(0.0);
    var sum_hx = Piece(0.0);
#unroll j HELD
    let h$j = dy$j * g$j;
    let unit$j = (x$j - mean) * r + q;
    sum_h += select(Piece(0.0), h$j, t + ${j}u * LANES < n);
    sum_hx = select(sum_hx, fma(h$j, unit$j, sum_hx), t + ${j}u * LANES < n);
#end
    let sums = lanes_sum(lane, vec2<f32>(sum_of(sum_h), sum_of(sum_hx))) / f32(p.width);
    let mean_h = select(0.0, sums.x, CENTRED);
    // A single element equals its mean, so dx is 0. Without this it would be a rounding error that depends on where a driver
    // fuses.
    let slope = select(r, r * 0.0, CENTRED && p.width == 1u);
#unroll j HELD
    if t + ${j}u * LANES < n { dx[base + t + ${j}u * LANES] = to_out(slope * (h$j - mean_h - unit$j * sums.y)); }
#end
}
