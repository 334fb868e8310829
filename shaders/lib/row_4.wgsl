// A row of x for a running log-sum-exp, by vectors: neighbours in memory, a multiple of 4 of them. Counts in vectors.

fn element(at: u32) -> f32 { return x[at / 4u][at % 4u]; }

// Of vectors t, t + LANES, ... below n of the row at `base`.
fn walk(base: u32, step: u32, t: u32, n: u32) -> vec2<f32> {
    var a = lse_start();
    for (var i = t; i < n; i += LANES) {
        a = lse_push4(a, x[base + i]);
    }
    return a;
}
