// w is the transpose of a site's matrix [n, k], computed as it is read: y = x W^T.
const RHS_BY_K: bool = true;
fn site_numbers() -> vec4<u32> { return p.rhs; }

fn load_rhs(base: u32, k: u32, col: u32) -> mat4x4<f32> {
    return transpose(mat4x4<f32>(
        load_site(col, k),
        load_site(col + 1u, k),
        load_site(col + 2u, k),
        load_site(col + 3u, k),
    ));
}
