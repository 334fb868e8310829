// forward:  lse[r] = log sum_c exp x[r, c], loss[r] = lse[r] - x[r, target[r]], kept[r] = 1; ignored rows give 0 and 0.
//           A target outside the classes that is not ignored gives NaN, never a read outside.
// backward: dx[r, c] = (exp(x[r, c] - lse[r]) - [c = target[r]]) * kept[r] * scale, scale = dy / number of kept rows.
// One workgroup a row; probabilities are never stored.

struct Params {
    groups_x: u32,
    rows: u32,
    classes: u32,
    ignores: u32,   // 1 when `ignore` means something
    ignore: u32,
    nan: u32,       // the bits of a NaN, which WGSL cannot spell
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> targets: array<u32>;
@group(0) @binding(2) var<storage, read> lse_in: array<f32>;
@group(0) @binding(3) var<storage, read> scale: array<f32>;
@group(0) @binding(4) var<storage, read_write> loss: array<f32>;
@group(0) @binding(5) var<storage, read_write> kept: array<f32>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;
@group(0) @binding(7) var<storage, read_write> dx: array<f32>;

var<workgroup> highest: array<f32, 64>;
var<workgroup> total: array<f32, 64>;

fn is_kept(target_class: u32) -> bool {
    return p.ignores == 0u || target_class != p.ignore;
}

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * p.groups_x + group.x;
    if row >= p.rows { return; }
    let base = row * p.classes;
    var most = -3.4e38;
    for (var c = lane; c < p.classes; c += 64u) { most = max(most, x[base + c]); }
    highest[lane] = most;
    workgroupBarrier();
    for (var step = 32u; step > 0u; step = step >> 1u) {
        if lane < step { highest[lane] = max(highest[lane], highest[lane + step]); }
        workgroupBarrier();
    }
    let top = highest[0];
    var sum = 0.0;
    for (var c = lane; c < p.classes; c += 64u) { sum += exp(x[base + c] - top); }
    total[lane] = sum;
    workgroupBarrier();
    for (var step = 32u; step > 0u; step = step >> 1u) {
        if lane < step { total[lane] = total[lane] + total[lane + step]; }
        workgroupBarrier();
    }
    if lane == 0u {
        let value = top + log(total[0]);
        let chosen = targets[row];
        let keep = is_kept(chosen);
        let inside = chosen < p.classes;
        let off = value - x[base + select(0u, chosen, inside)];
        lse[row] = value;
        loss[row] = select(0.0, select(bitcast<f32>(p.nan), off, inside), keep);
        kept[row] = select(0.0, 1.0, keep);
    }
}

@compute @workgroup_size(64)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * p.groups_x + group.x;
    if row >= p.rows { return; }
    let base = row * p.classes;
    let chosen = targets[row];
    let factor = select(0.0, scale[0], is_kept(chosen));
    let value = lse_in[row];
    for (var c = lane; c < p.classes; c += 64u) {
        dx[base + c] = (exp(x[base + c] - value) - select(0.0, 1.0, c == chosen)) * factor;
    }
}
