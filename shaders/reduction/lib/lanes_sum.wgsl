// The sum over the LANES neighbouring threads that work on the same row, returned to all of them, for kernels that wait for it: two
// barriers where a tree has one for every bit of LANES. The kernel declares LANES, a power of 2 up to 256, THREADS, and the type
// `Sum`.

const EIGHTH: u32 = max(1u, LANES / 8u);
var<workgroup> lanes_all: array<Sum, THREADS>;
var<workgroup> lanes_part: array<Sum, THREADS / 8u>;

fn lanes_sum(lane: u32, value: Sum) -> Sum {
    if LANES == 1u { return value; }
    let t = lane % LANES;
    let first = lane - t;
    lanes_all[lane] = value;
    workgroupBarrier();
    if LANES <= 8u {
        var few = lanes_all[first];
        for (var i = 1u; i < LANES; i++) { few += lanes_all[first + i]; }
        // The next call writes to `lanes_all`.
        workgroupBarrier();
        return few;
    }
    if t < EIGHTH {
        // Neighbouring threads read neighbouring values.
#unroll i 8
        let v$i = lanes_all[first + t + ${i}u * EIGHTH];
#end
        lanes_part[first / 8u + t] = ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7));
    }
    workgroupBarrier();
    // The next call writes to `lanes_part` after its first barrier.
    var all = lanes_part[first / 8u];
    for (var i = 1u; i < EIGHTH; i++) { all += lanes_part[first / 8u + i]; }
    return all;
}
