// layer_norm (CENTRED):  y = x^ g + b,  x^ = (x - mean) r,  r = 1 / sqrt(var + eps), var = mean((x - mean)^2)
// rms_norm:              y = x^ g,      x^ = x r,           r = 1 / sqrt(mean(x^2) + eps)
// backward:   with h = dy g:  dx = r (h - [mean(h)] - x^ mean(h x^)), [] for layer_norm only
// weights:    dg = sum over rows of dy x^,  db = sum over rows of dy: partial sums over blocks of rows (`columns`),
//             then the sum over blocks (`blocks`), in an order that the sizes fix.
//
// LANES neighbouring threads share a row of `forward` and `backward`, as in softmax.wgsl. The variance takes a second
// pass over the row, which is in the cache by then: a large mean must not cancel. x^ is kept as (x - mean) r + q, where q
// is what the rounding of the mean left over.

const LANES: u32 = 64u;
const CENTRED: bool = true;

struct Params {
    groups_x: u32,
    rows: u32,
    width: u32,
    eps: f32,
    weighted: u32,    // 1 where there is a weight
    biased: u32,      // 1 where there is a bias
    span: u32,        // rows of a block, in `columns`; blocks, in `blocks`
    part: u32,        // of `blocks`: 0 for dg, 1 for db
    accumulate: u32,  // of `blocks`: 1 adds to what is there
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<Piece>;
// Bound to x where absent, and then its value is not used; a row of x is long enough.
@group(0) @binding(1) var<storage, read> weight: array<Piece>;
@group(0) @binding(2) var<storage, read> bias: array<Piece>;
@group(0) @binding(3) var<storage, read_write> y: array<Piece>;
@group(0) @binding(4) var<storage, read_write> made: array<f32>;         // [rows, 3]: mean, r, q; mean and q are 0 for rms_norm
@group(0) @binding(5) var<storage, read> statistics: array<f32>;
@group(0) @binding(6) var<storage, read> dy: array<Piece>;
@group(0) @binding(7) var<storage, read_write> dx: array<Piece>;
@group(0) @binding(8) var<storage, read_write> partial: array<vec2<f32>>;     // [blocks, width]: dg, db
@group(0) @binding(9) var<storage, read> partials: array<vec2<f32>>;
@group(0) @binding(10) var<storage, read_write> total: array<f32>;            // dg or db

#import piece = piece_1

alias Sum = vec2<f32>;
#import row_sum

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * (64u / LANES) + lane / LANES;
    let t = lane % LANES;
    // Threads past the last row stay for the barriers, with nothing to walk.
    let n = select(0u, p.width / PIECE, row < p.rows);
    let base = row * (p.width / PIECE);
    let size = f32(p.width);
    var mean = 0.0;
    if CENTRED {
        var sum = Piece();
        for (var i = t; i < n; i += LANES) { sum += x[base + i]; }
        mean = row_sum(lane, vec2<f32>(sum_of(sum), 0.0)).x / size;
    }
    // The deviations' own mean is what rounding left in the mean: Chan, Golub & LeVeque's correction takes it out.
    var first = Piece();
    var second = Piece();
    for (var i = t; i < n; i += LANES) {
        let d = x[base + i] - mean;
        first += d;
        second = fma(d, d, second);
    }
    let moments = row_sum(lane, vec2<f32>(sum_of(first), sum_of(second))) / size;
    let left = select(0.0, moments.x, CENTRED);
    let r = inverseSqrt(max(moments.y - left * left, 0.0) + p.eps);
    let q = -left * r;
    for (var i = t; i < n; i += LANES) {
        let g = select(Piece(1.0), weight[i], p.weighted != 0u);
        let b = select(Piece(0.0), bias[i], p.biased != 0u);
        y[base + i] = ((x[base + i] - mean) * r + q) * g + b;
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

@compute @workgroup_size(64)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * (64u / LANES) + lane / LANES;
    let t = lane % LANES;
    let n = select(0u, p.width / PIECE, row < p.rows);
    let base = row * (p.width / PIECE);
    let of_row = statistics_of(min(row, p.rows - 1u));
    var sum_h = Piece();
    var sum_hx = Piece();
    for (var i = t; i < n; i += LANES) {
        let h = dy[base + i] * select(Piece(1.0), weight[i], p.weighted != 0u);
        sum_h += h;
        sum_hx = fma(h, (x[base + i] - of_row.x) * of_row.y + of_row.z, sum_hx);
    }
    let sums = row_sum(lane, vec2<f32>(sum_of(sum_h), sum_of(sum_hx))) / f32(p.width);
    let mean_h = select(0.0, sums.x, CENTRED);
    for (var i = t; i < n; i += LANES) {
        let h = dy[base + i] * select(Piece(1.0), weight[i], p.weighted != 0u);
        let unit = (x[base + i] - of_row.x) * of_row.y + of_row.z;
        dx[base + i] = of_row.y * (h - mean_h - unit * sums.y);
    }
}

// One thread a column (four, by vectors) and block of rows: neighbouring threads read neighbours, all of them one row's
// statistics.
@compute @workgroup_size(64)
fn columns(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let width = p.width / PIECE;
    let across = (width + 63u) / 64u;
    let at = group.y * p.groups_x + group.x;
    let block = at / across;
    let column = (at % across) * 64u + lane;
    let first = block * p.span;
    if column >= width || first >= p.rows { return; }
    let last = min(first + p.span, p.rows);
    var dg = Piece();
    var db = Piece();
    for (var row = first; row < last; row++) {
        let i = row * width + column;
        let of_row = statistics_of(row);
        let d = dy[i];
        dg = fma(d, (x[i] - of_row.x) * of_row.y + of_row.z, dg);
        db += d;
    }
    for (var i = 0u; i < PIECE; i++) {
        partial[block * p.width + column * PIECE + i] = vec2<f32>(part(dg, i), part(db, i));
    }
}

@compute @workgroup_size(64)
fn blocks(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = (group.y * p.groups_x + group.x) * 64u + lane;
    if column >= p.width { return; }
    var sum = vec2<f32>(0.0);
    for (var block = 0u; block < p.span; block++) {
        sum += partials[block * p.width + column];
    }
    let value = select(sum.x, sum.y, p.part != 0u);
    if p.accumulate != 0u {
        total[column] = total[column] + value;
    } else {
        total[column] = value;
    }
}
