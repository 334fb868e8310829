// Gradient dx of conv: x at `at` was read by y at (at + pad - dilation k) / stride, or by none (-1) if that is not whole.
fn tap(at: vec4<i32>, k: i32, stride: i32, pad: i32, dilation: i32, size: i32) -> vec4<i32> {
    let s = at + pad - k * dilation;
    let q = s / stride;
    return select(vec4(-1), q, (s >= vec4(0)) & (q * stride == s) & (q < vec4(size)));
}
