// Forward pass of conv: y at `at` reads x at stride at - pad + dilation k, or nothing (-1) if that is outside.
fn tap(at: vec4<i32>, k: i32, stride: i32, pad: i32, dilation: i32, size: i32) -> vec4<i32> {
    let s = at * stride - pad + k * dilation;
    return select(vec4(-1), s, (s >= vec4(0)) & (s < vec4(size)));
}
