// W = sum_s c[layer, s] atoms[s] with atoms [S, rows, columns], c [layers, S], computed as it is read.
// site_numbers() = (rows, columns, S, layer). Zero outside.
@group(0) @binding(1) var<storage, read> theta: array<f32>;
@group(0) @binding(2) var<storage, read> coefficients: array<f32>;

fn load_site(row: u32, col: u32) -> vec4<f32> {
    if row >= site_numbers().x { return vec4<f32>(0.0); }
    let last = site_numbers().y - 1u;
    let columns = vec4<u32>(col, col + 1u, col + 2u, col + 3u);
    let c = min(columns, vec4<u32>(last));
    var sum = vec4<f32>(0.0);
    for (var s = 0u; s < site_numbers().z; s++) {
        let at = (s * site_numbers().x + row) * site_numbers().y;
        let atom = vec4<f32>(theta[at + c.x], theta[at + c.y], theta[at + c.z], theta[at + c.w]);
        sum = fma(vec4<f32>(coefficients[site_numbers().w * site_numbers().z + s]), atom, sum);
    }
    return select(vec4<f32>(0.0), sum, columns <= vec4<u32>(last));
}
