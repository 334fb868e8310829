// A row of x for a running log-sum-exp, read by vectors. Its elements are adjacent in memory, and their number is a multiple of
// 4. Arguments count vectors.

fn exp_piece(x: Piece) -> Piece { return exp_of(x); }

fn element(at: u32) -> f32 { return x[at / 4u][at % 4u]; }

// Log-sum-exp of vectors t, t + LANES, ... below n of the row at `base`, in blocks of BLOCK iterations.
fn walk(base: u32, step: u32, t: u32, n: u32) -> vec2<f32> {
    var all = lse_start();
    for (var start = t; start < n; start += BLOCK * LANES) {
        let stop = min(start + BLOCK * LANES, n);
        var a = lse_start();
        for (var i = start; i < stop; i += LANES) { a = lse_push4(a, x[base + i]); }
        // The first block needs no merging, which saves short rows the cost.
        if start == t { all = a; } else { all = lse_merge(all, a); }
    }
    return all;
}
