// tile slot of matmul_coop: tiles in vectors of four, which are stored in one piece. Vulkan loads matrices from vectors.
// Strides count vectors.
const UNIT: u32 = 4u;
var<workgroup> left: array<vec4<f16>, STAGES * LEFT_TILE / UNIT>;
var<workgroup> right: array<vec4<f16>, STAGES * RIGHT_TILE / UNIT>;

fn put_left(at: u32, word: vec4<f16>) { left[at / UNIT] = word; }

fn put_right(at: u32, word: vec4<f16>) { right[at / UNIT] = word; }
