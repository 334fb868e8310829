// The sum over the LANES neighbouring threads that work on the same row or block of rows, for all of them. LANES and the type `Sum` are the kernel's.

var<workgroup> tree: array<Sum, 64>;

fn row_sum(lane: u32, value: Sum) -> Sum {
    if LANES == 1u { return value; }
    let t = lane % LANES;
    tree[lane] = value;
    workgroupBarrier();
    for (var reach = LANES / 2u; reach > 0u; reach = reach >> 1u) {
        if t < reach { tree[lane] += tree[lane + reach]; }
        workgroupBarrier();
    }
    let all = tree[lane - t];
    // The next sum writes here.
    workgroupBarrier();
    return all;
}
