// Tests and selections on the bits of floats. WGSL lets a driver assume that no float is NaN or infinite: `x != x` may be false for
// NaN, max and min may return either argument, and a select of floats may drop a NaN. So these functions test and select bits.

fn nan4(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
}

fn nan1(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }

// Returns `yes` where `is` is true, else `no`. Unlike in WGSL's select, the values may be NaN or infinite.
fn pick4(no: vec4<f32>, yes: vec4<f32>, is: vec4<bool>) -> vec4<f32> {
    return bitcast<vec4<f32>>(select(bitcast<vec4<u32>>(no), bitcast<vec4<u32>>(yes), is));
}

fn pick1(no: f32, yes: f32, is: bool) -> f32 {
    return bitcast<f32>(select(bitcast<u32>(no), bitcast<u32>(yes), is));
}

// Returns x. A compiler cannot regroup x with the operations that follow, because it does not know that `zero` is 0.
fn kept(x: vec4<f32>, zero: vec4<u32>) -> vec4<f32> { return bitcast<vec4<f32>>(bitcast<vec4<u32>>(x) | zero); }

// The larger of a and b, or NaN where either is NaN.
fn max_nan(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> { return pick4(pick4(max(a, b), b, nan4(b)), a, nan4(a)); }

// The smaller of a and b, or NaN where either is NaN.
fn min_nan(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> { return pick4(pick4(min(a, b), b, nan4(b)), a, nan4(a)); }

// Returns x where y is finite, else NaN. Results that are computed from a y that overflowed could otherwise look valid.
fn finite_or_nan4(x: vec4<f32>, y: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(select(vec4<u32>(0x7fc00000u), bitcast<vec4<u32>>(x), finite4(y)));
}

fn finite_or_nan1(x: f32, y: f32) -> f32 {
    return bitcast<f32>(select(0x7fc00000u, bitcast<u32>(x), finite1(y)));
}

fn finite4(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) < vec4<u32>(0x7f800000u);
}

fn finite1(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) < 0x7f800000u; }
