// Measures the adapter's rate of cooperative multiply-adds on registers: CHAINS chains of c = a b + c per subgroup, with f16
// operands and f32 sums, 4 x ROUNDS steps each.

const SIZE: u32 = 16u;
const LANES: u32 = 32u;
const CHAINS: u32 = 4u;
const ROUNDS: u32 = 256u;
alias MatrixA = coop_mat16x16<f16, A>;
alias MatrixB = coop_mat16x16<f16, B>;
alias MatrixC = coop_mat16x16<f32, C>;

struct Params {
    a: f32,
    b: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read_write> y: array<f32>;

var<workgroup> tile: array<f16, 2u * SIZE * SIZE>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    for (var i = lane; i < 2u * SIZE * SIZE; i += LANES) {
        tile[i] = f16(select(p.a, p.b, i < SIZE * SIZE));
    }
    workgroupBarrier();
    let a = coopLoad<MatrixA>(&tile[0], SIZE);
    let b = coopLoad<MatrixB>(&tile[SIZE * SIZE], SIZE);
#unroll i CHAINS
    var c$i: MatrixC;
#end
    for (var round = 0u; round < ROUNDS; round++) {
#unroll step 4
#unroll i CHAINS
        c$i = coopMultiplyAdd(a, b, c$i);
#end
#end
    }
    let stride = SIZE;
#unroll i CHAINS
    let at$i = (group.x * CHAINS + ${i}u) * SIZE * SIZE;
    coopStore(c$i, &y[at$i], stride);
#end
}
