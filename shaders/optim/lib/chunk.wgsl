// Vector `i` of a chunk of `length` elements, with zeros behind the end: what lies there belongs to no tensor.
fn inside(x: vec4<f32>, i: u32, length: u32) -> vec4<f32> {
    return select(vec4<f32>(0.0), x, vec4<u32>(0u, 1u, 2u, 3u) + 4u * i < vec4<u32>(length));
}

// By its bits: compilers may assume that arithmetic never sees the others.
fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}
