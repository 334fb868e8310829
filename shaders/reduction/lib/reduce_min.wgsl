// reduce's min. The result is NaN if any element is, which is tested on the bits, because drivers may assume that there are none.
const MAGNITUDE: u32 = 0x7fffffffu;
const INFINITY: u32 = 0x7f800000u;
fn identity() -> Elem {
    // WGSL has no constant that is not finite.
    var highest = 0x7f800000u;
    return Elem(bitcast<f32>(highest));
}
fn combine(a: Elem, b: Elem) -> Elem {
    let least = select(min(a, b), b, (bitcast<Bits>(b) & Bits(MAGNITUDE)) > Bits(INFINITY));
    return select(least, a, (bitcast<Bits>(a) & Bits(MAGNITUDE)) > Bits(INFINITY));
}
fn divided(value: Elem, by: f32) -> Elem { return value; }
