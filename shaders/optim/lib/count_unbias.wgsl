// Counts the steps s that a tensor took part in, and computes 1 / (1 - b1^s) and 1 / (1 - b2^s), correct to a rounding.
// All in integers, because f32 keeps few digits of 1 - b^s, and so that every adapter gets the same bits. A fraction of 64 bits
// has the word of its low bits first. b^s is a product over the digits of s to the base 16.

// Per tensor: s, the bits of both factors, nothing.
@group(0) @binding(7) var<storage, read_write> taken: array<vec4<u32>>;
// b1^(d 16^k) at 16 k + d, for digits d = 1 .. 15 and k = 0 .. 7, then those of b2.
@group(0) @binding(8) var<storage, read> powers: array<vec2<u32>>;

// The whole product of two words.
fn wide(a: u32, b: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let left = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let right = (a & 0xffffu) * (b >> 16u) + (left & 0xffffu);
    return vec2<u32>((right << 16u) | (low & 0xffffu), (a >> 16u) * (b >> 16u) + (left >> 16u) + (right >> 16u));
}

// The product of two fractions, too small by less than 3 in the last of its 64 bits.
fn times(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let high = wide(a.y, b.y);
    let left = wide(a.y, b.x).y;
    let right = wide(a.x, b.y).y;
    let some = high.x + left;
    let all = some + right;
    return vec2<u32>(all, high.y + select(0u, 1u, some < left) + select(0u, 1u, all < right));
}

// b^s for s above 0, with b's powers from `first` on.
fn power(first: u32, s: u32) -> vec2<u32> {
    var product = vec2<u32>(0u);
    var begun = false;
    for (var k = 0u; k < 8u; k++) {
        let digit = (s >> (4u * k)) & 15u;
        if digit > 0u {
            let factor = powers[first + 16u * k + digit];
            product = select(factor, times(product, factor), vec2<bool>(begun));
            begun = true;
        }
    }
    return product;
}

// The bits of 1 / (1 - x) in f32.
fn unbias(x: vec2<u32>) -> u32 {
    if (x.x | x.y) == 0u { return bitcast<u32>(1.0); }
    // 1 - x, then its first 32 bits from the highest one that is set.
    let rest = vec2<u32>(~x.x + 1u, ~x.y + select(0u, 1u, x.x == 0u));
    let zeros = select(countLeadingZeros(rest.y), 32u + countLeadingZeros(rest.x), rest.y == 0u);
    let shift = zeros & 31u;
    let word = select(rest.y, rest.x, rest.y == 0u);
    let below = select(rest.x, 0u, rest.y == 0u);
    let divisor = (word << shift) | select(0u, below >> ((32u - shift) & 31u), shift > 0u);
    // 2^62 / divisor, between 2^30 and 2^31, by long division.
    var remainder = 1u << 30u;
    var quotient = 0u;
    for (var i = 0u; i < 32u; i++) {
        let carry = remainder >> 31u;
        remainder = remainder << 1u;
        quotient = quotient << 1u;
        if carry > 0u || remainder >= divisor {
            remainder -= divisor;
            quotient += 1u;
        }
    }
    // Rounded half up to the 24 bits of f32, because adapters may round either way. A power of two rounds nothing.
    return bitcast<u32>(f32((quotient + 64u) & 0xffffff80u) * bitcast<f32>((127u + zeros - 30u) << 23u));
}

fn count_step(leaf: u32) {
    let s = taken[leaf].x + 1u;
    taken[leaf] = vec4<u32>(s, unbias(power(0u, s)), unbias(power(128u, s)), 0u);
}
