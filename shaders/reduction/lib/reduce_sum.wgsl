// reduce's sum.
fn identity() -> Elem { return Elem(0); }
fn combine(a: Elem, b: Elem) -> Elem { return a + b; }
// Of a mean, whose count is no 1: dividing by 1 need not be exact.
fn divided(value: Elem, by: f32) -> Elem { return select(value / Elem(by), value, by == 1.0); }
