// tile slot of matmul_coop: tiles in single elements, because Metal loads matrices from nothing else.
const UNIT: u32 = 1u;
var<workgroup> left: array<f16, STAGES * LEFT_TILE>;
var<workgroup> right: array<f16, STAGES * RIGHT_TILE>;

fn put_left(at: u32, word: vec4<f16>) {
    left[at] = word.x;
    left[at + 1u] = word.y;
    left[at + 2u] = word.z;
    left[at + 3u] = word.w;
}

fn put_right(at: u32, word: vec4<f16>) {
    right[at] = word.x;
    right[at + 1u] = word.y;
    right[at + 2u] = word.z;
    right[at + 3u] = word.w;
}
