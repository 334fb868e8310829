// reduce's max.
const LOWEST: f32 = -3.4028234663852886e38;
fn identity() -> Elem { return Elem(LOWEST); }
fn combine(a: Elem, b: Elem) -> Elem { return max(a, b); }
fn scaled(value: Elem, scale: f32) -> Elem { return value; }
