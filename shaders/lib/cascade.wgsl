// A sum of any number of terms, in blocks of 32 of blocks of 32: one running sum would drift, since the roundings of equal terms
// do not cancel.

struct Cascade { total: f32, middle: f32, block: f32, count: u32 }

fn cascade() -> Cascade { return Cascade(0.0, 0.0, 0.0, 0u); }

fn cascade_add(s: ptr<function, Cascade>, value: f32) {
    (*s).block += value;
    (*s).count += 1u;
    if (*s).count % 32u != 0u { return; }
    (*s).middle += (*s).block;
    (*s).block = 0.0;
    if (*s).count % 1024u != 0u { return; }
    (*s).total += (*s).middle;
    (*s).middle = 0.0;
}

fn cascade_sum(s: Cascade) -> f32 { return s.total + (s.middle + s.block); }
