// f16, two in a word, the low half first. It is packed by integers and unpacked by a function of WGSL, so no adapter needs a feature for
// it.

fn unpack_half4(words: vec2<u32>) -> vec4<f32> { return vec4(unpack2x16float(words.x), unpack2x16float(words.y)); }

/// Half `which` of a packed pair, as f32.
fn half_at(word: u32, which: u32) -> f32 {
    return select(unpack2x16float(word).x, unpack2x16float(word).y, which == 1u);
}

/// f32 to f16 bits, rounded to nearest even, in integer arithmetic, because `pack2x16float` may round either way.
fn half_bits(x: vec4<f32>) -> vec4<u32> {
    let u = bitcast<vec4<u32>>(x);
    let sign = (u >> vec4(16u)) & vec4(0x8000u);
    let a = u & vec4(0x7fffffffu);
    // A normal result: rebias the exponent by 112, then round off 13 bits.
    let odd = (a >> vec4(13u)) & vec4(1u);
    let normal = (a - vec4(0x38000000u) + vec4(0xfffu) + odd) >> vec4(13u);
    // A subnormal result: the value in units of 2^-24, rounded explicitly from the 24-bit significand.
    let shift = clamp(vec4(126u) - (a >> vec4(23u)), vec4(14u), vec4(25u));
    let m = (a & vec4(0x7fffffu)) | vec4(0x800000u);
    let floor_m = m >> shift;
    let rest = m & ((vec4(1u) << shift) - vec4(1u));
    let half = vec4(1u) << (shift - vec4(1u));
    let up = select(vec4(0u), vec4(1u), (rest > half) | ((rest == half) & ((floor_m & vec4(1u)) == vec4(1u))));
    let subnormal = select(floor_m + up, vec4(0u), a < vec4(0x33000000u));
    var h = select(normal, subnormal, a < vec4(0x38800000u));
    h = select(h, vec4(0x7c00u), a >= vec4(0x477ff000u));
    h = select(h, vec4(0x7e00u), a > vec4(0x7f800000u));
    return h | sign;
}

fn pack_half4(x: vec4<f32>) -> vec2<u32> {
    let h = half_bits(x);
    return vec2(h.x | (h.y << 16u), h.z | (h.w << 16u));
}

fn round_half4(x: vec4<f32>) -> vec4<f32> { return unpack_half4(pack_half4(x)); }
