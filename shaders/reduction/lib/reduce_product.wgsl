// The product, for reduce and cumsum.
fn identity() -> Elem { return Elem(1); }
fn combine(a: Elem, b: Elem) -> Elem { return a * b; }
fn divided(value: Elem, by: f32) -> Elem { return value; }
