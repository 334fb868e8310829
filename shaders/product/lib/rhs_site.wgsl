// w is a site's matrix [k, n], computed as it is read: dx = dy W.
const RHS_BY_K: bool = false;
fn site_numbers() -> vec4<u32> { return p.rhs; }

fn load_rhs(base: u32, k: u32, col: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        load_site(k, col),
        load_site(k + 1u, col),
        load_site(k + 2u, col),
        load_site(k + 3u, col),
    );
}
