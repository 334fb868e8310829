// reduce's sum.
fn identity() -> Elem { return Elem(0); }
fn combine(a: Elem, b: Elem) -> Elem { return a + b; }
// Divides a mean by its count. A count of 1 is skipped, because division by 1 may not be exact.
fn divided(value: Elem, by: f32) -> Elem { return select(value / Elem(by), value, by == 1.0); }
