// A row of x for a running log-sum-exp, element by element `step` apart.

fn element(at: u32) -> f32 { return x[at]; }

// Of elements t, t + LANES, ... below n of the row at `base`; four at a time, so that loads do not wait for each other.
fn walk(base: u32, step: u32, t: u32, n: u32) -> vec2<f32> {
    var a = lse_start();
    var i = t;
    for (; i + 3u * LANES < n; i += 4u * LANES) {
        let at = base + i * step;
        let far = LANES * step;
        a = lse_push4(a, vec4<f32>(x[at], x[at + far], x[at + 2u * far], x[at + 3u * far]));
    }
    for (; i < n; i += LANES) {
        a = lse_push(a, x[base + i * step]);
    }
    return a;
}
