// Random numbers with the same bits as those of src/rng.rs: Philox 4x32-10, and uniform and normal draws from one word each.
//
//   element i of a stream:  philox(vec4(i / 4, stream.x, stream.y, 0), key)[i % 4]
//
// This file declares no binding. A kernel that draws normals binds the host's rng::normal_table():
//
//   @group(0) @binding(1) var<storage, read> normal_table: array<u32>;
//   let c = normal_cell(x);
//   let z = normal_from_bits(x, normal_table[c], normal_table[c + 1u], normal_table[c + 2u]);
//
// Everything up to the last bitcast is u32 arithmetic, because log, cos and contraction to fma differ between
// adapters.

// Multiplies 32 x 32 -> 64 bits, as vec2(low, high). It uses 16-bit halves, because WGSL has no wide multiply.
fn multiply_wide(a: u32, b: u32) -> vec2<u32> {
    let al = a & 0xffffu;
    let ah = a >> 16u;
    let bl = b & 0xffffu;
    let bh = b >> 16u;
    let low = al * bl;
    // Each sum is at most (2^16 - 1)^2 + 2 (2^16 - 1) = 2^32 - 1, so no carry is lost.
    let middle = ah * bl + (low >> 16u);
    let carry = al * bh + (middle & 0xffffu);
    return vec2<u32>((carry << 16u) | (low & 0xffffu), ah * bh + (middle >> 16u) + (carry >> 16u));
}

// Four random words from a 128-bit counter and a 64-bit key (Salmon, Moraes, Dror, Shaw 2011).
fn philox(counter: vec4<u32>, key: vec2<u32>) -> vec4<u32> {
    var c = counter;
    var k = key;
    for (var round = 0u; round < 10u; round++) {
        let a = multiply_wide(0xd2511f53u, c.x);
        let b = multiply_wide(0xcd9e8d57u, c.z);
        c = vec4<u32>(b.y ^ c.y ^ k.x, b.x, a.y ^ c.w ^ k.y, a.x);
        k += vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
    }
    return c;
}

// Uniform in [0, 1). 24 bits convert to an f32 exactly, and the product with 2^-24 is exact too.
fn uniform_from_bits(x: u32) -> f32 {
    return f32(x >> 8u) * 5.9604644775390625e-8;
}

// Index in the table of the three words a, b, c for x. The leading zeros of the tail probability select an octave,
// and the 6 bits after the leading one select a cell in it.
fn normal_cell(x: u32) -> u32 {
    let u = (x << 1u) | 1u;
    let octave = countLeadingZeros(u);
    return 3u * (octave * 64u + (((u << octave) >> 25u) & 63u));
}

// z = a - (b - c f) f in units of 2^-28, where f is the 25 bits below those of the cell. The top bit of x is the
// sign. The result is never 0.
fn normal_from_bits(x: u32, a: u32, b: u32, c: u32) -> f32 {
    let u = (x << 1u) | 1u;
    let f = (u << countLeadingZeros(u)) << 7u;
    let step = multiply_wide(b - multiply_wide(c, f).y, f).y;
    // Where the quantile approaches 0, truncated products may exceed a by one unit. So the difference is signed, and
    // at least one unit.
    let z = u32(max(i32(a - step), 1));
    // Packs the f32. The 24 bits are rounded half up, and a carry out of them correctly raises the exponent.
    let s = countLeadingZeros(z);
    let mantissa = (((z << s) >> 7u) + 1u) >> 1u;
    return bitcast<f32>((x & 0x80000000u) | (((129u - s) << 23u) + mantissa));
}
