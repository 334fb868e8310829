// private slot of a sharing kind: w + factor b a, with b [rows, rank], a [rank, columns]. site_numbers() = (rows, columns,
// rank, bits of the factor).
@group(0) @binding(2) var<storage, read> lora_a: array<f32>;
@group(0) @binding(3) var<storage, read> lora_b: array<f32>;

fn with_private(row: u32, col: u32, w: vec4<f32>) -> vec4<f32> {
    let columns = site_numbers().y;
    let c = min(vec4(col, col + 1u, col + 2u, col + 3u), vec4(columns - 1u));
    var low = vec4<f32>(0.0);
    for (var r = 0u; r < site_numbers().z; r++) {
        let at = r * columns;
        let a = vec4<f32>(lora_a[at + c.x], lora_a[at + c.y], lora_a[at + c.z], lora_a[at + c.w]);
        low = fma(vec4<f32>(lora_b[row * site_numbers().z + r]), a, low);
    }
    return fma(vec4<f32>(bitcast<f32>(site_numbers().w)), low, w);
}
