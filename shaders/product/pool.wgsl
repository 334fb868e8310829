// Windows of kernel_y x kernel_x at steps of stride, over planes padded by pad.
// max: y = the largest element of the window without its padding. NaN counts as the largest. The first of equal elements
// gets the gradient.
// avg: y = sum of the window / (kernel_y kernel_x), with padding as zeros. Each element gets dy / (kernel_y kernel_x).
// Backward is a gather: an element sums over the windows that hold it, row by row. Everywhere a thread computes one
// result.

struct Params {
    groups_x: u32,
    n: u32,             // number of results: of y forward, of dx backward
    height: u32,        // of x
    width: u32,
    out_height: u32,    // of y
    out_width: u32,
    kernel_y: u32,
    kernel_x: u32,
    stride_y: u32,
    stride_x: u32,
    pad_y: u32,
    pad_x: u32,
    accumulate: u32,
}
var<immediate> p: Params;

// The bits of x forward, of dy backward.
@group(0) @binding(0) var<storage, read> x: array<u32>;
// For each window, the place of its largest element in the plane.
@group(0) @binding(1) var<storage, read> winners: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read_write> chosen: array<u32>;

#import order
#import cascade

/// The part of the window of result `at` that lies in the plane.
struct Window {
    base: u32,          // of the plane in x
    top: u32,
    bottom: u32,        // one past
    left: u32,
    right: u32,
}

fn window(at: u32) -> Window {
    let out = p.out_height * p.out_width;
    let top = at % out / p.out_width * p.stride_y;
    let left = at % p.out_width * p.stride_x;
    return Window(
        at / out * (p.height * p.width),
        max(top, p.pad_y) - p.pad_y,
        min(max(top + p.kernel_y, p.pad_y) - p.pad_y, p.height),
        max(left, p.pad_x) - p.pad_x,
        min(max(left + p.kernel_x, p.pad_x) - p.pad_x, p.width),
    );
}

/// Returns the place in its plane of the first largest element of a window.
fn winner(win: Window) -> u32 {
    var best = 0u;
    var place = win.top * p.width + win.left;
    for (var i = win.top; i < win.bottom; i++) {
        for (var j = win.left; j < win.right; j++) {
            let key = order_key(x[win.base + i * p.width + j]);
            if key > best {
                best = key;
                place = i * p.width + j;
            }
        }
    }
    return place;
}

@compute @workgroup_size(64)
fn max_forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.n { return; }
    let win = window(at);
    y[at] = bitcast<f32>(x[win.base + winner(win)]);
}

/// The same, with the winners kept for the backward pass.
@compute @workgroup_size(64)
fn max_chosen(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.n { return; }
    let win = window(at);
    let place = winner(win);
    y[at] = bitcast<f32>(x[win.base + place]);
    chosen[at] = place;
}

@compute @workgroup_size(64)
fn avg_forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.n { return; }
    let win = window(at);
    var sum = vec4<f32>();
    for (var i = win.top; i < win.bottom; i++) {
        for (var j = win.left; j < win.right; j++) {
            sum = cascade_add(sum, bitcast<f32>(x[win.base + i * p.width + j]));
        }
    }
    y[at] = cascade_sum(sum) / f32(p.kernel_y * p.kernel_x);
}

/// The windows that hold element `at` of x, as a window in y's plane.
fn holders(at: u32) -> Window {
    let plane = p.height * p.width;
    let row = at % plane / p.width + p.pad_y;
    let column = at % p.width + p.pad_x;
    // Windows start at multiples of the stride: from the first one that still reaches this element to the last one that
    // starts at or before it.
    return Window(
        at / plane * (p.out_height * p.out_width),
        (max(row + p.stride_y, p.kernel_y) - p.kernel_y) / p.stride_y,
        min(row / p.stride_y + 1u, p.out_height),
        (max(column + p.stride_x, p.kernel_x) - p.kernel_x) / p.stride_x,
        min(column / p.stride_x + 1u, p.out_width),
    );
}

fn store(at: u32, value: f32) {
    if p.accumulate != 0u { y[at] = y[at] + value; } else { y[at] = value; }
}

@compute @workgroup_size(64)
fn max_backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.n { return; }
    let own = at % (p.height * p.width);
    let held = holders(at);
    var sum = vec4<f32>();
    for (var i = held.top; i < held.bottom; i++) {
        for (var j = held.left; j < held.right; j++) {
            let win = held.base + i * p.out_width + j;
            if winners[win] == own { sum = cascade_add(sum, bitcast<f32>(x[win])); }
        }
    }
    store(at, cascade_sum(sum));
}

@compute @workgroup_size(64)
fn avg_backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.n { return; }
    let held = holders(at);
    var sum = vec4<f32>();
    for (var i = held.top; i < held.bottom; i++) {
        for (var j = held.left; j < held.right; j++) {
            sum = cascade_add(sum, bitcast<f32>(x[held.base + i * p.out_width + j]));
        }
    }
    store(at, cascade_sum(sum) / f32(p.kernel_y * p.kernel_x));
}
