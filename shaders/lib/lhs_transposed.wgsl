// x stored as [k, m]: rows are contiguous and, like every step, m is a multiple of 4. k may be anything.
@group(0) @binding(0) var<storage, read> lhs: array<LhsWord>;

fn lhs_rows(at: u32, k: u32) -> vec4<f32> { return lhs_of(lhs[(at + k_at(k) * p.lhs.y) / 4u]) * in_k(k); }

fn load_lhs(base: u32, row: u32, k: u32) -> mat4x4<f32> {
    let at = base + select(row, min(row, p.m - 4u), EDGES);
    return mat4x4<f32>(lhs_rows(at, k), lhs_rows(at, k + 1u), lhs_rows(at, k + 2u), lhs_rows(at, k + 3u));
}
