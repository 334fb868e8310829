// A float's place among all floats, as an integer: order_key(a) < order_key(b) exactly where a < b. Works on the bits,
// so no driver's fast math can change it. -0 equals +0; every NaN is the same key, above infinity. Never 0.
fn order_key(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > 0x7f800000u { return 0xffffffffu; }
    if bits == 0x80000000u { return 0x80000000u; }
    // Negative: all bits turn, so that larger magnitudes come first. Positive: above the negatives.
    return bits ^ select(0x80000000u, 0xffffffffu, bits >= 0x80000000u);
}
