// halves slot of attention_coop and attention_coop_backward: tiles in single elements, because Metal loads matrices from nothing
// else.
const UNIT: u32 = 1u;
var<workgroup> halves: array<f16, HALVES>;

fn put(at: u32, word: vec4<f16>) {
    halves[at] = word.x;
    halves[at + 1u] = word.y;
    halves[at + 2u] = word.z;
    halves[at + 3u] = word.w;
}
