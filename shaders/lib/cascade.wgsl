// Sums any number of terms, in blocks of 32 blocks of 32 terms. A single running sum would drift, because the rounding errors of
// equal terms do not cancel.
//
// The state is (total, middle, block, number of terms modulo 1024). It is a vector and not a struct: naga gives structs a layout,
// which SPIR-V 1.4 and later forbid in local variables (VUID-StandaloneSpirv-None-10684).

fn cascade_add(s: vec4<f32>, value: f32) -> vec4<f32> {
    let block = s.z + value;
    let count = u32(s.w) + 1u;
    if count % 32u != 0u { return vec4<f32>(s.x, s.y, block, f32(count)); }
    let middle = s.y + block;
    if count != 1024u { return vec4<f32>(s.x, middle, 0.0, f32(count)); }
    return vec4<f32>(s.x + middle, 0.0, 0.0, 0.0);
}

fn cascade_sum(s: vec4<f32>) -> f32 { return s.x + (s.y + s.z); }
