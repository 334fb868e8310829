// deep slot of matmul_direct: DEEP lanes share the inner axis, FLAT apart. Their sums are added in the order of lanes.

var<workgroup> sums: array<vec4<f32>, THREADS>;

fn total(sum: vec4<f32>, lane: u32) -> vec4<f32> {
    sums[lane] = sum;
    workgroupBarrier();
    var all = sums[lane % FLAT];
    for (var at = lane % FLAT + FLAT; at < THREADS; at += FLAT) { all += sums[at]; }
    // The next sum may only come when all have read this one.
    workgroupBarrier();
    return all;
}
