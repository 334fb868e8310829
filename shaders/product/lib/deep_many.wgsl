// deep slot of matmul_direct: DEEP lanes, FLAT apart, share the inner axis. Their sums are added in the order of lanes.

var<workgroup> sums: array<vec4<f32>, THREADS>;

fn total(sum: vec4<f32>, lane: u32) -> vec4<f32> {
    sums[lane] = sum;
    workgroupBarrier();
    var all = sums[lane % FLAT];
    for (var at = lane % FLAT + FLAT; at < THREADS; at += FLAT) { all += sums[at]; }
    // No lane may store the next sum before all have read this one.
    workgroupBarrier();
    return all;
}
