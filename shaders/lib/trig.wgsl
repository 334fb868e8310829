// sin and cos with known accuracy. WGSL promises 2^-11 (absolute) from -pi to pi and nothing beyond. These are within 4 roundoffs
// (2^-24 of the result, also near their zeros) for every x. NaN and infinity give NaN. sin -0 = -0.
//
// x = q pi/2 + r with |r| <= pi/4 (a little more by rounding), then Cephes' polynomials (S. Moshier).

// The reduced argument r, and q, of which only the last two bits matter.
struct Turn {
    r: vec4<f32>,
    q: vec4<u32>,
}

// Cody and Waite's reduction, for |x| < 4096. pi/2 is split into three parts of at most 11 bits and a rest. The products of the
// parts with q < 2^12 are exact, as is the first difference. The total error is below 0.06 roundoffs of r at the worst x.
fn near_turn(x: vec4<f32>) -> Turn {
    // Adding 1.5 2^23 rounds to a whole number, which is then in the low bits of the sum.
    let q = bitcast<vec4<u32>>(x * 0.6366197723675814 + 12582912.0) - vec4<u32>(0x4b400000u);
    let n = vec4<f32>(bitcast<vec4<i32>>(q));
    // A zero that no compiler can recognise as zero. Combined with the bits of a sum, it keeps a driver from regrouping.
    let zero = bitcast<vec4<u32>>(n) & vec4<u32>(1u);
    let a = bitcast<vec4<f32>>(bitcast<vec4<u32>>(x - n * 1.5703125) | zero);
    let b = bitcast<vec4<f32>>(bitcast<vec4<u32>>(a - n * 4.837512969970703e-4) | zero);
    let c = bitcast<vec4<f32>>(bitcast<vec4<u32>>(b - n * 7.549533620476723e-8) | zero);
    return Turn(c - n * 2.5633440682570896e-12, q);
}

// The upper 32 bits of a * b, from 16-bit halves, because WGSL has no wide multiply.
fn upper_product(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
    let half = vec4<u32>(16u);
    let mask = vec4<u32>(0xffffu);
    let middle = (a >> half) * (b & mask) + (((a & mask) * (b & mask)) >> half);
    let other = (a & mask) * (b >> half) + (middle & mask);
    return (a >> half) * (b >> half) + (middle >> half) + (other >> half);
}

// The 32 bits that begin `shift` < 32 bits below the top of the 64 bits (a, b). WGSL has no shift by 32, so b takes two shifts.
fn joined(a: vec4<u32>, b: vec4<u32>, shift: vec4<u32>) -> vec4<u32> {
    return (a << shift) | ((b >> vec4<u32>(1u)) >> (vec4<u32>(31u) - shift));
}

// Payne and Hanek's reduction in integers, for finite |x| >= 2^-7. With |x| = m 2^(e - 150) and m of 24 bits, only the 96 bits of
// 2/pi from the weight 2^(151 - e) down matter: higher bits add multiples of 4 to q, lower bits add less than 2^-70.
fn far_turn(x: vec4<f32>) -> Turn {
    let u = bitcast<vec4<u32>>(x);
    let m = (u & vec4<u32>(0x007fffffu)) | vec4<u32>(0x00800000u);
    let start = ((u >> vec4<u32>(23u)) & vec4<u32>(0xffu)) - vec4<u32>(120u);
    // Words start / 32 to start / 32 + 3 of a zero word followed by 2/pi, where start / 32 is at most 4. They are chosen by
    // selects, because indexing is slow on CPUs.
    let four = (start & vec4<u32>(128u)) != vec4<u32>(0u);
    let two = (start & vec4<u32>(64u)) != vec4<u32>(0u);
    let one = (start & vec4<u32>(32u)) != vec4<u32>(0u);
    let a0 = select(vec4<u32>(0u), vec4<u32>(0xf534ddc0u), four);
    let a1 = select(vec4<u32>(0xa2f9836eu), vec4<u32>(0xdb629599u), four);
    let a2 = select(vec4<u32>(0x4e441529u), vec4<u32>(0x3c439041u), four);
    let a3 = select(vec4<u32>(0xfc2757d1u), vec4<u32>(0xfe5163abu), four);
    let b0 = select(a0, a2, two);
    let b1 = select(a1, a3, two);
    let b2 = select(a2, vec4<u32>(0xf534ddc0u), two);
    let b3 = select(a3, vec4<u32>(0xdb629599u), two);
    let b4 = select(vec4<u32>(0xf534ddc0u), vec4<u32>(0x3c439041u), two);
    let w0 = select(b0, b1, one);
    let w1 = select(b1, b2, one);
    let w2 = select(b2, b3, one);
    let w3 = select(b3, b4, one);
    let shift = start & vec4<u32>(31u);
    let middle = joined(w1, w2, shift);
    // m times the three words modulo 2^96, of which the upper 64 bits are kept: two bits of q, then 62 of the fraction.
    let carry = upper_product(m, joined(w2, w3, shift));
    var low = m * middle + carry;
    var high = m * joined(w0, w1, shift) + upper_product(m, middle) + vec4<u32>(low < carry);
    // Rounds q to nearest, which makes the rest signed. A negative rest is replaced by its two's complement, its magnitude.
    let q = (high + vec4<u32>(0x20000000u)) >> vec4<u32>(30u);
    high -= q << vec4<u32>(30u);
    let below = high >> vec4<u32>(31u);
    low = (low ^ (vec4<u32>(0u) - below)) + below;
    high = (high ^ (vec4<u32>(0u) - below)) + (below & vec4<u32>(low == vec4<u32>(0u)));
    // The 64 bits are in units of 2^-62 of pi/2.
    let upper = vec4<f32>(bitcast<vec4<i32>>(high)) * 9.313225746154785e-10;
    let lower = vec4<f32>(bitcast<vec4<i32>>(low >> vec4<u32>(1u))) * 4.336808689942018e-19;
    let size = bitcast<vec4<u32>>((upper + lower) * 1.5707963267948966);
    // For negative x, r and q change sign.
    let negative = u >> vec4<u32>(31u);
    let r = bitcast<vec4<f32>>(size ^ ((below ^ negative) << vec4<u32>(31u)));
    return Turn(r, (q ^ (vec4<u32>(0u) - negative)) + negative);
}

// sin(x + quarter pi/2)
fn turned(x: vec4<f32>, quarter: u32) -> vec4<f32> {
    let size = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
    // Two vectors and not a struct: naga gives structs a layout, which SPIR-V 1.4 and later forbid in local variables.
    let near = near_turn(x);
    var r = near.r;
    var quarters = near.q;
    let far = size >= vec4<u32>(0x45800000u);
    if any(far) {
        let f = far_turn(x);
        r = bitcast<vec4<f32>>(select(bitcast<vec4<u32>>(r), bitcast<vec4<u32>>(f.r), far));
        quarters = select(quarters, f.q, far);
    }
    let z = r * r;
    let sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r;
    let cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0;
    let q = quarters + vec4<u32>(quarter);
    var y = select(bitcast<vec4<u32>>(sine), bitcast<vec4<u32>>(cosine), (q & vec4<u32>(1u)) == vec4<u32>(1u));
    y = y ^ ((q & vec4<u32>(2u)) << vec4<u32>(30u));
    return bitcast<vec4<f32>>(select(y, vec4<u32>(0x7fc00000u), size >= vec4<u32>(0x7f800000u)));
}

// Below 2^-12 x itself is returned as sin x, so -0 and subnormals stay unchanged.
fn sin_of(x: vec4<f32>) -> vec4<f32> {
    let u = bitcast<vec4<u32>>(x);
    let tiny = (u & vec4<u32>(0x7fffffffu)) < vec4<u32>(0x39800000u);
    return bitcast<vec4<f32>>(select(bitcast<vec4<u32>>(turned(x, 0u)), u, tiny));
}

fn cos_of(x: vec4<f32>) -> vec4<f32> { return turned(x, 1u); }
