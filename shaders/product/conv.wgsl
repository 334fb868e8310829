// y[b, o, i, j] = bias[o] + sum over u, v, c of x[b, c, i sy - py + u dy, j sx - px + v dx] w[o, c, u, v], c in o's group.
// dx is the same sum with the roles of x and y exchanged: only the tap and the strides of w differ.
// One thread computes CHANNELS channels at four positions, 64 apart. The positions that a tap reads are computed once for
// all c.
// The sizes fix the order of the sum: taps, then input channels. Sums are in blocks of channels, then in rows of taps,
// because rounding errors would grow in one long sum. A launch takes a range of the taps' rows and columns and of the
// channels. Larger windows take several launches, each of which adds to y.

const CHANNELS: u32 = 4u;   // channels of y per thread; 1 for depthwise
const BLOCK: u32 = 64u;

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
    w_x: u32,           // stride of w between channels of x
    w_y: u32,           // stride of w between channels of y
    kernel_y: u32,
    kernel_x: u32,
    stride_y: i32,
    stride_x: i32,
    pad_y: i32,
    pad_x: i32,
    dilation_y: i32,
    dilation_x: i32,
    has_bias: u32,
    accumulate: u32,
    first_u: u32,       // rows of taps in this launch
    last_u: u32,
    first_v: u32,       // columns of taps
    last_v: u32,
    first_c: u32,       // channels of x
    last_c: u32,
}
@group(0) @binding(4) var<uniform> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> w: array<f32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

#import tap = conv_gather

fn store(at: u32, value: f32) {
    if p.accumulate != 0u { y[at] = y[at] + value; } else { y[at] = value; }
}

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let id = group.y * p.groups_x + group.x;
    let blocks = (p.y_channels + CHANNELS - 1u) / CHANNELS;
    // Neighbouring workgroups share positions, so that x stays in the cache.
    let first = id / (p.groups * blocks) * 256u + lane;
    if first >= p.positions { return; }
    let side = id / blocks % p.groups;
    let channel = id % blocks * CHANNELS;

    let at = min(vec4(first) + vec4(0u, 64u, 128u, 192u), vec4(p.positions - 1u));
    let image = at / p.plane;
    let inside = at % p.plane;
    let row = vec4<i32>(inside / p.width);
    let column = vec4<i32>(inside % p.width);
    let x_plane = p.x_height * p.x_width;
    let base = (image * p.groups + side) * (p.x_channels * x_plane);
    let w_base = side * p.y_channels * p.x_channels * p.kernel_y * p.kernel_x;
#unroll c CHANNELS
    // A block may reach past the last channel. Those results are not stored.
    let w$c = w_base + min(channel + ${c}u, p.y_channels - 1u) * p.w_y;
    var acc$c = vec4(0.0);
#end
    for (var u = p.first_u; u < p.last_u; u++) {
        let from_row = tap(row, i32(u), p.stride_y, p.pad_y, p.dilation_y, i32(p.x_height));
#unroll c CHANNELS
        var line$c = vec4(0.0);
#end
        for (var v = p.first_v; v < p.last_v; v++) {
            let from_column = tap(column, i32(v), p.stride_x, p.pad_x, p.dilation_x, i32(p.x_width));
            let is_inside = (from_row >= vec4(0)) & (from_column >= vec4(0));
            if !any(is_inside) { continue; }
            var i = base + vec4<u32>(select(vec4(0), from_row * i32(p.x_width) + from_column, is_inside)) + vec4(p.first_c * x_plane);
            var j = u * p.kernel_x + v + p.first_c * p.w_x;
            for (var start = p.first_c; start < p.last_c; start += BLOCK) {
                let stop = min(start + BLOCK, p.last_c);
#unroll c CHANNELS
                var block$c = vec4(0.0);
#end
                for (var c = start; c < stop; c++) {
                    let value = select(vec4(0.0), vec4(x[i.x], x[i.y], x[i.z], x[i.w]), is_inside);
#unroll c CHANNELS
                    block$c += w[w$c + j] * value;
#end
                    i += vec4(x_plane);
                    j += p.w_x;
                }
#unroll c CHANNELS
                line$c += block$c;
#end
            }
        }
#unroll c CHANNELS
        acc$c += line$c;
#end
    }
#unroll c CHANNELS
    if channel + ${c}u < p.y_channels {
        let y_channel = side * p.y_channels + channel + ${c}u;
        var value = acc$c;
        if p.has_bias != 0u { value += vec4(bias[y_channel]); }
        let to = (image * (p.groups * p.y_channels) + vec4(y_channel)) * p.plane + inside;
#unroll j 4
        if first + ${j*64}u < p.positions { store(to.$xyzw{j}, value.$xyzw{j}); }
#end
    }
#end
}
