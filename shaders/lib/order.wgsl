// Maps the bits of a float to an integer in the same order: order_key(a) < order_key(b) exactly where a < b. It works on
// bits, so no driver's fast math can change it. -0 has the key of +0. All NaN have one key, above infinity. No key is 0.
fn order_key(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > 0x7f800000u { return 0xffffffffu; }
    if bits == 0x80000000u { return 0x80000000u; }
    // All bits of a negative float are flipped, so larger magnitudes come first. The sign bit of a positive float is set,
    // so it comes after the negatives.
    return bits ^ select(0x80000000u, 0xffffffffu, bits >= 0x80000000u);
}
