// dw[o, c, u, v] = sum over b, i, j of dy[b, o, i, j] x[b, c, i sy - py + u dy, j sx - px + v dx].
// weights: one workgroup computes OUT x IN weights of one tap over one piece of the positions. Lanes take neighbouring
//          positions, then each weight's 64 partial sums are added in the order of lanes.
// fold:    adds the pieces in order, if there are several.

const OUT: u32 = 4u;    // channels of y in a block; 1 for depthwise
const IN: u32 = 4u;     // channels of x in a block
const BLOCK: u32 = 64u; // positions per partial sum of a thread

struct Params {
    groups_x: u32,
    positions: u32,     // batch * plane
    plane: u32,         // positions of y in an image
    width: u32,         // of y
    x_height: u32,
    x_width: u32,
    x_channels: u32,    // per group
    y_channels: u32,    // per group
    groups: u32,
    kernel_y: u32,
    kernel_x: u32,
    stride_y: i32,
    stride_x: i32,
    pad_y: i32,
    pad_x: i32,
    dilation_y: i32,
    dilation_x: i32,
    count: u32,         // number of weights
    parts: u32,         // number of pieces of the positions
    span: u32,          // positions per piece
    accumulate: u32,
}
@group(0) @binding(3) var<uniform> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> dy: array<f32>;
@group(0) @binding(2) var<storage, read_write> dw: array<f32>;

// A row has 65 numbers, so that lanes that read down a column do not all hit one bank.
var<workgroup> sums: array<f32, OUT * IN * 65u>;

fn store(at: u32, value: f32) {
    if p.accumulate != 0u { dw[at] = dw[at] + value; } else { dw[at] = value; }
}

@compute @workgroup_size(64)
fn weights(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let taps = p.kernel_y * p.kernel_x;
    let out_blocks = (p.y_channels + OUT - 1u) / OUT;
    let in_blocks = (p.x_channels + IN - 1u) / IN;
    let id = group.y * p.groups_x + group.x;
    let tap = id % taps;
    let in_first = id / taps % in_blocks * IN;
    let out_first = id / (taps * in_blocks) % out_blocks * OUT;
    let side = id / (taps * in_blocks * out_blocks) % p.groups;
    let part = id / (taps * in_blocks * out_blocks * p.groups);
    // The condition is the same for the whole workgroup, so all or none reach the barrier below.
    if part >= p.parts { return; }

    let row_shift = i32(tap / p.kernel_x) * p.dilation_y - p.pad_y;
    let column_shift = i32(tap % p.kernel_x) * p.dilation_x - p.pad_x;
    let x_plane = p.x_height * p.x_width;
#unroll i IN
    let x$i = min(in_first + ${i}u, p.x_channels - 1u) * x_plane;
#end
#unroll o OUT
    let y$o = min(out_first + ${o}u, p.y_channels - 1u) * p.plane;
#end
#unroll a OUT*IN
    var acc$a = 0.0;
#end
    let last = min((part + 1u) * p.span, p.positions);
    for (var start = part * p.span + lane; start < last; start += 64u * BLOCK) {
        let stop = min(start + 64u * BLOCK, last);
#unroll a OUT*IN
        var block$a = 0.0;
#end
        for (var at = start; at < stop; at += 64u) {
            let image = at / p.plane;
            let inside = at % p.plane;
            let row = i32(inside / p.width) * p.stride_y + row_shift;
            let column = i32(inside % p.width) * p.stride_x + column_shift;
            if row < 0 || row >= i32(p.x_height) || column < 0 || column >= i32(p.x_width) { continue; }
            let x_at = (image * p.groups + side) * p.x_channels * x_plane + u32(row) * p.x_width + u32(column);
            let y_at = (image * p.groups + side) * p.y_channels * p.plane + inside;
#unroll i IN
            let from_x$i = x[x_at + x$i];
#end
#unroll o OUT
            let from_y$o = dy[y_at + y$o];
#unroll i IN
            block${o*IN+i} += from_y$o * from_x$i;
#end
#end
        }
#unroll a OUT*IN
        acc$a += block$a;
#end
    }
#unroll a OUT*IN
    sums[${a*65}u + lane] = acc$a;
#end
    workgroupBarrier();
    let o = out_first + lane / IN;
    let c = in_first + lane % IN;
    if lane < OUT * IN && o < p.y_channels && c < p.x_channels {
        var sum = 0.0;
        for (var i = 0u; i < 64u; i++) {
            sum += sums[lane * 65u + i];
        }
        store(part * p.count + ((side * p.y_channels + o) * p.x_channels + c) * taps + tap, sum);
    }
}

/// x holds the pieces, [parts, count].
@compute @workgroup_size(64)
fn fold(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.count { return; }
    var sum = 0.0;
    for (var part = 0u; part < p.parts; part++) {
        sum += x[part * p.count + at];
    }
    store(at, sum);
}
