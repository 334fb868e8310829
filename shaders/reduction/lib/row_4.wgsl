// A row of x for a running log-sum-exp, read by vectors. Its elements are adjacent in memory, and their number is a multiple of
// 4. Arguments count vectors.

fn exp_piece(x: Piece) -> Piece { return exp_of(x); }

fn element(at: u32) -> f32 { return in_of(x[at / 4u])[at % 4u]; }

// Log-sum-exp of vectors t, t + LANES, ... below n of the row at `base`, in blocks of BLOCK of them. A turn takes AHEAD vectors, whose
// loads and exps do not depend on each other. The last turn reads its first vector in place of those beyond the end.
fn walk(base: u32, step: u32, t: u32, n: u32) -> vec2<f32> {
    var all = lse_start();
    for (var start = t; start < n; start += BLOCK * LANES) {
        let stop = min(start + BLOCK * LANES, n);
        var a = lse_start();
        for (var i = start; i < stop; i += AHEAD * LANES) {
#unroll j AHEAD
            let v$j = in_of(x[base + select(i, i + ${j}u * LANES, i + ${j}u * LANES < stop)]);
#end
            var m = a.x;
#unroll j AHEAD
            m = max(m, max(max(v$j.x, v$j.y), max(v$j.z, v$j.w)));
#end
            var s = a.y * exp_of1(a.x - m);
#unroll j AHEAD
            let e$j = exp_of(v$j - m);
            s += select(0.0, (e$j.x + e$j.y) + (e$j.z + e$j.w), i + ${j}u * LANES < stop);
#end
            a = vec2<f32>(m, s);
        }
        // The first block needs no merging, which saves short rows the cost.
        if start == t { all = a; } else { all = lse_merge(all, a); }
    }
    return all;
}
