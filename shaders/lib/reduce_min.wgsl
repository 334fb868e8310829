// reduce's min.
const HIGHEST: f32 = 3.4028234663852886e38;
fn identity() -> Elem { return Elem(HIGHEST); }
fn combine(a: Elem, b: Elem) -> Elem { return min(a, b); }
fn scaled(value: Elem, scale: f32) -> Elem { return value; }
