// reduce's max. The result is NaN if any element is, which is tested on the bits, because drivers may assume that there are none.
const MAGNITUDE: u32 = 0x7fffffffu;
const INFINITY: u32 = 0x7f800000u;
fn identity() -> Elem {
    // WGSL has no constant that is not finite.
    var lowest = 0xff800000u;
    return Elem(bitcast<f32>(lowest));
}
fn combine(a: Elem, b: Elem) -> Elem {
    let most = select(max(a, b), b, (bitcast<Bits>(b) & Bits(MAGNITUDE)) > Bits(INFINITY));
    return select(most, a, (bitcast<Bits>(a) & Bits(MAGNITUDE)) > Bits(INFINITY));
}
fn divided(value: Elem, by: f32) -> Elem { return value; }
