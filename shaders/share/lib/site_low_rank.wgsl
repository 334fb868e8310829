// W = theta + scale * b a, with theta [rows, columns], b [rows, rank], a [rank, columns], computed as it is read.
// site_numbers() = (rows, columns, rank, bits of scale). Zero outside.
@group(0) @binding(1) var<storage, read> theta: array<f32>;
@group(0) @binding(2) var<storage, read> lora_a: array<f32>;
@group(0) @binding(3) var<storage, read> lora_b: array<f32>;

fn load_site(row: u32, col: u32) -> vec4<f32> {
    if row >= site_numbers().x { return vec4<f32>(0.0); }
    let last = site_numbers().y - 1u;
    let columns = vec4<u32>(col, col + 1u, col + 2u, col + 3u);
    let c = min(columns, vec4<u32>(last));
    var low = vec4<f32>(0.0);
    for (var r = 0u; r < site_numbers().z; r++) {
        let at = r * site_numbers().y;
        let a = vec4<f32>(lora_a[at + c.x], lora_a[at + c.y], lora_a[at + c.z], lora_a[at + c.w]);
        low = fma(vec4<f32>(lora_b[row * site_numbers().z + r]), a, low);
    }
    let at = row * site_numbers().y;
    let stored = vec4<f32>(theta[at + c.x], theta[at + c.y], theta[at + c.z], theta[at + c.w]);
    let four = fma(vec4<f32>(bitcast<f32>(site_numbers().w)), low, stored);
    return select(vec4<f32>(0.0), four, columns <= vec4<u32>(last));
}
