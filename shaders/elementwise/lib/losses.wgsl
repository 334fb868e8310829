// Losses of one prediction and one target, and their derivatives times dy. They use near_zero, elementwise, exp_log and nan.

/// Huber's loss of the difference d: d^2 / 2 up to delta, delta (|d| - delta / 2) beyond it.
fn huber_of(d: vec4<f32>, delta: vec4<f32>) -> vec4<f32> {
    let a = magnitude(d);
    let c = min(a, delta);
    return pick4(c * (a - 0.5 * c), d, nan4(d));
}

/// -ln sigmoid(-x) and -ln sigmoid(x), whose digits do not cancel: max(x, 0) + s and max(-x, 0) + s with s = ln(1 + e^-|x|).
/// `bce_of` weights the first by 1 - t and the second by w t.
fn bce_of(x: vec4<f32>, t: vec4<f32>, w: vec4<f32>) -> vec4<f32> {
    let s = log1p_of(exp_of(-abs(x)));
    let y = (1.0 - t) * (max(x, vec4<f32>(0.0)) + s) + w * t * (max(-x, vec4<f32>(0.0)) + s);
    return pick4(y, x, nan4(x));
}

fn dbce_logit(x: vec4<f32>, t: vec4<f32>, w: vec4<f32>) -> vec4<f32> {
    return (1.0 - t) * sigmoid(x) - w * t * sigmoid(-x);
}

fn dbce_target(x: vec4<f32>, w: vec4<f32>) -> vec4<f32> { return w * softplus_of(-x) - softplus_of(x); }

/// t (ln t - x) with 0 ln 0 = 0: a target of 0 does not count, not even if x is infinite.
fn kl_of(x: vec4<f32>, t: vec4<f32>) -> vec4<f32> {
    let none = is_equal(t, vec4<f32>(0.0)) & !nan4(x);
    return pick4(t * (log_of(t) - x), vec4<f32>(0.0), none);
}

fn dkl_target(x: vec4<f32>, t: vec4<f32>, dy: vec4<f32>) -> vec4<f32> {
    return pick4(dy * (log_of(t) + 1.0 - x), vec4<f32>(0.0), is_equal(t, vec4<f32>(0.0)));
}
