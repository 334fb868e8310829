// The sum over the LANES neighbouring threads that work on the same row or block of rows, returned to all of them. The kernel
// declares LANES and the type `Sum`.

const TREE: u32 = max(64u, LANES);
var<workgroup> tree: array<Sum, TREE>;

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
    // The next call writes to `tree`.
    workgroupBarrier();
    return all;
}
