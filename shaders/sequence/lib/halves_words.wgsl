// halves slot of attention_coop and attention_coop_backward: tiles in vectors of four, which are stored in one piece. Vulkan loads
// matrices from vectors. Strides count vectors.
const UNIT: u32 = 4u;
var<workgroup> halves: array<vec4<f16>, HALVES / UNIT>;

fn put(at: u32, word: vec4<f16>) { halves[at / UNIT] = word; }
