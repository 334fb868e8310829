// Vector `i` of a chunk of `length` elements, with zeros beyond the end, where the arena has only padding.
fn inside(x: vec4<f32>, i: u32, length: u32) -> vec4<f32> {
    return select(vec4<f32>(0.0), x, vec4<u32>(0u, 1u, 2u, 3u) + 4u * i < vec4<u32>(length));
}

// Tests the bits, because compilers may assume that floats are always finite.
fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}
