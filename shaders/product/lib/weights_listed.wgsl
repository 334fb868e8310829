// weights slot of matmul_join: row i weighs atom s by coefficients[layers[i], s], where an atom has p.lhs.x parts and
// there are p.lhs.y atoms. Rows at a layer from p.lhs.z on, which does not exist, are zero.
@group(0) @binding(7) var<storage, read> layers: array<u32>;
@group(0) @binding(8) var<storage, read> coefficients: array<f32>;

fn weight(part: u32, row: u32) -> f32 {
    let layer = layers[row];
    let known = layer < p.lhs.z;
    return select(0.0, coefficients[select(0u, layer * p.lhs.y, known) + part / p.lhs.x], known);
}
