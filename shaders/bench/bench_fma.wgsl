// Measures the adapter's rate of multiply-adds on registers: CHAINS chains of a = a * m + b per thread, each on a vec4, 4 x
// ROUNDS steps. `nothing` is the smallest dispatch.

const CHAINS: u32 = 4u;
const ROUNDS: u32 = 256u;
const THREADS: u32 = 64u;
alias Elem = f32;

struct Params {
    m: f32,
    b: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(THREADS)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let m = vec4<Elem>(Elem(p.m));
    let b = vec4<Elem>(Elem(p.b));
#unroll i CHAINS
    var a$i = vec4<Elem>(Elem(id.x & 15u), Elem(${i}u), Elem(1.0), Elem(2.0));
#end
    for (var round = 0u; round < ROUNDS; round++) {
#unroll step 4
#unroll i CHAINS
        a$i = fma(a$i, m, b);
#end
#end
    }
    var all = vec4<Elem>();
#unroll i CHAINS
    all += a$i;
#end
    y[id.x] = f32(all.x + all.y + all.z + all.w);
}

@compute @workgroup_size(1)
fn nothing() {
    if p.m == 1.0 { y[0] = p.b; }
}
