// bf16 is the upper half of an f32. Two lie in a word, the low half first. All work is on integers, so no adapter needs a feature for
// it and no driver can flush or round.

fn unpack_bf16(words: vec2<u32>) -> vec4<f32> {
    let low = words << vec2(16u);
    let high = words & vec2(0xffff0000u);
    return bitcast<vec4<f32>>(vec4(low.x, high.x, low.y, high.y));
}

/// Half `which` of a pair.
fn bf16_at(word: u32, which: u32) -> f32 {
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, which == 1u));
}

/// The upper halves of f32, rounded to nearest, ties to even, in the upper bits. What rounds beyond the largest becomes infinite,
/// infinities stay, and NaN stays NaN: its lower bits are cut off and its quiet bit is set.
fn bf16_bits(x: vec4<f32>) -> vec4<u32> {
    let u = bitcast<vec4<u32>>(x);
    let rounded = u + vec4(0x7fffu) + ((u >> vec4(16u)) & vec4(1u));
    let bits = select(rounded, u | vec4(0x400000u), (u & vec4(0x7fffffffu)) > vec4(0x7f800000u));
    return bits & vec4(0xffff0000u);
}

fn pack_bf16(x: vec4<f32>) -> vec2<u32> {
    let b = bf16_bits(x);
    return vec2((b.x >> 16u) | b.y, (b.z >> 16u) | b.w);
}

fn round_bf16(x: vec4<f32>) -> vec4<f32> { return bitcast<vec4<f32>>(bf16_bits(x)); }
