// reduce's sum.
fn identity() -> Elem { return Elem(0); }
fn combine(a: Elem, b: Elem) -> Elem { return a + b; }
fn scaled(value: Elem, scale: f32) -> Elem { return value * Elem(scale); }
