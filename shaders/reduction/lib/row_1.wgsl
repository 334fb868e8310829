// A row of x for a running log-sum-exp, read by single elements that are `step` apart.

fn exp_piece(x: Piece) -> Piece { return exp_of1(x); }

fn element(at: u32) -> f32 { return in_of(x[at]); }

// Log-sum-exp of elements t, t + LANES, ... below n of the row at `base`, in blocks of BLOCK iterations. An iteration takes four
// elements, whose loads do not depend on each other.
fn walk(base: u32, step: u32, t: u32, n: u32) -> vec2<f32> {
    var all = lse_start();
    var i = t;
    while i < n {
        let stop = min(i + 4u * BLOCK * LANES, n);
        var a = lse_start();
        for (; i + 3u * LANES < stop; i += 4u * LANES) {
            let at = base + i * step;
            let far = LANES * step;
            a = lse_push4(a, vec4<f32>(in_of(x[at]), in_of(x[at + far]), in_of(x[at + 2u * far]), in_of(x[at + 3u * far])));
        }
        for (; i < stop; i += LANES) { a = lse_push(a, in_of(x[base + i * step])); }
        // The first block needs no merging, which saves short rows the cost.
        if stop <= 4u * BLOCK * LANES { all = a; } else { all = lse_merge(all, a); }
    }
    return all;
}
