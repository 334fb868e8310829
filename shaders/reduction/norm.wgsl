// layer_norm (CENTRED):  y = x^ g + b,  x^ = (x - mean) r,  r = 1 / sqrt(var + eps), var = mean((x - mean)^2)
// rms_norm:              y = x^ g,      x^ = x r,           r = 1 / sqrt(mean(x^2) + eps)
// backward:   with h = dy g:  dx = r (h - [mean(h)] - x^ mean(h x^)), [] for layer_norm only
// weights:    dg = sum over rows of dy x^,  db = sum over rows of dy. `columns` computes partial sums over parts of the rows,
//             which a reduction adds up.
//
// LANES neighbouring threads share a row of `forward` and `backward`, as in softmax.wgsl. The variance takes a second pass over
// the row, which is in the cache by then, because a one-pass variance would cancel for a large mean. x^ is (x - mean) r + q,
// where q corrects the rounding error of the mean. A variance beyond f32 makes the row NaN, since 1 / sqrt(infinity) would hide
// the overflow as zeros. Sums are in blocks of BLOCK terms, because a single running sum would drift.

const LANES: u32 = 64u;
const THREADS: u32 = max(64u, LANES);
const BLOCK: u32 = 64u;
const CENTRED: bool = true;

struct Params {
    groups_x: u32,
    rows: u32,
    width: u32,
    eps: f32,
    weighted: u32,    // 1 if there is a weight
    biased: u32,      // 1 if there is a bias
    span: u32,        // rows per part, in `columns`
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
@group(0) @binding(8) var<storage, read_write> partial: array<Piece>;         // [parts, 2, width]: dg, db

#import piece = piece_1
#import in = in_piece
#import grad = grad_piece
#import out = out_piece
#import packed = packed_none

alias Sum = vec2<f32>;
#import row_sum
#import norm
#import nan

@compute @workgroup_size(THREADS)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * (THREADS / LANES) + lane / LANES;
    let t = lane % LANES;
    // Threads beyond the last row walk nothing, but take part in the barriers.
    let n = select(0u, p.width / PIECE, row < p.rows);
    let base = row * (p.width / PIECE);
    let size = f32(p.width);
    var mean = 0.0;
    if CENTRED {
        var sum = 0.0;
        for (var start = t; start < n; start += BLOCK * LANES) {
            let stop = min(start + BLOCK * LANES, n);
            var block = Piece(0.0);
            for (var i = start; i < stop; i += LANES) { block += in_of(x[base + i]); }
            sum += sum_of(block);
        }
        mean = row_sum(lane, vec2<f32>(sum, 0.0)).x / size;
    }
    var deviations = vec2<f32>(0.0);
    for (var start = t; start < n; start += BLOCK * LANES) {
        let stop = min(start + BLOCK * LANES, n);
        var first = Piece(0.0);
        var second = Piece(0.0);
        for (var i = start; i < stop; i += LANES) {
            let d = in_of(x[base + i]) - mean;
            first += select(d * SMALL, d, CENTRED);
            second = fma(d, d, second);
        }
        deviations += vec2<f32>(sum_of(first), sum_of(second));
    }
    let moments = row_sum(lane, deviations) / size;
    let scale = scale_of(moments);
    let r = scale.x;
    let q = scale.y;
    for (var i = t; i < n; i += LANES) {
        let g = select(Piece(1.0), weight[i], p.weighted != 0u);
        let b = select(Piece(0.0), bias[i], p.biased != 0u);
        y[base + i] = to_out(((in_of(x[base + i]) - mean) * r + q) * g + b);
    }
    if t == 0u && row < p.rows {
        made[3u * row] = mean;
        made[3u * row + 1u] = r;
        made[3u * row + 2u] = q;
    }
}

fn statistics_of(row: u32) -> vec3<f32> {
    return vec3<f32>(statistics[3u * row], statistics[3u * row + 1u], statistics[3u * row + 2u]);
}

@compute @workgroup_size(THREADS)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * (THREADS / LANES) + lane / LANES;
    let t = lane % LANES;
    let n = select(0u, p.width / PIECE, row < p.rows);
    let base = row * (p.width / PIECE);
    let of_row = statistics_of(min(row, p.rows - 1u));
    var both = vec2<f32>(0.0);
    for (var start = t; start < n; start += BLOCK * LANES) {
        let stop = min(start + BLOCK * LANES, n);
        var sum_h = Piece(0.0);
        var sum_hx = Piece(0.0);
        for (var i = start; i < stop; i += LANES) {
            let h = grad_of(dy[base + i]) * select(Piece(1.0), weight[i], p.weighted != 0u);
            sum_h += h;
            sum_hx = fma(h, (in_of(x[base + i]) - of_row.x) * of_row.y + of_row.z, sum_hx);
        }
        both += vec2<f32>(sum_of(sum_h), sum_of(sum_hx));
    }
    let sums = row_sum(lane, both) / f32(p.width);
    let mean_h = select(0.0, sums.x, CENTRED);
    // A single element equals its mean, so dx is 0. Without this it would be a rounding error that depends on where a driver
    // fuses.
    let slope = select(of_row.y, of_row.y * 0.0, CENTRED && p.width == 1u);
    for (var i = t; i < n; i += LANES) {
        let h = grad_of(dy[base + i]) * select(Piece(1.0), weight[i], p.weighted != 0u);
        let unit = (in_of(x[base + i]) - of_row.x) * of_row.y + of_row.z;
        dx[base + i] = to_out(slope * (h - mean_h - unit * sums.y));
    }
}

// One thread per column (or per four, with vectors) and part of the rows. Neighbouring threads read neighbouring elements, and
// all read the statistics of the same row.
@compute @workgroup_size(64)
fn columns(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let width = p.width / PIECE;
    let across = (width + 63u) / 64u;
    let at = group.y * p.groups_x + group.x;
    let part = at / across;
    let column = (at % across) * 64u + lane;
    if column >= width || part * p.span >= p.rows { return; }
    let last = min((part + 1u) * p.span, p.rows);
    var dg = Piece(0.0);
    var db = Piece(0.0);
    for (var start = part * p.span; start < last; start += BLOCK) {
        let stop = min(start + BLOCK, last);
        var block_g = Piece(0.0);
        var block_b = Piece(0.0);
        for (var row = start; row < stop; row++) {
            let i = row * width + column;
            let of_row = statistics_of(row);
            let d = grad_of(dy[i]);
            block_g = fma(d, (in_of(x[i]) - of_row.x) * of_row.y + of_row.z, block_g);
            block_b += d;
        }
        dg += block_g;
        db += block_b;
    }
    partial[2u * part * width + column] = dg;
    partial[(2u * part + 1u) * width + column] = db;
}
