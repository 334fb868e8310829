//! The `tying` family's dictionaries, routed recursion, hashed weights and shards.
//! Formulas: `tests/vectors/tying/README.md`.

use super::tying::{close, need, open, values};
use crate::support::{download, gpu};
use std::path::Path;
use std::sync::Arc;
use tiebeam::models::mor::{Keys, Mor, Routing, capacities};
use tiebeam::nn::{Activation, Attention, Block, Linear, Mask, Mlp, Norm};
use tiebeam::ops::product::matmul::Epilogue;
use tiebeam::share::{
    CoefficientNet, DepthLora, Dictionary, Draw, Hashed, Mapping, ShardPool, Site, Tied, hashed, matrix_pca,
};
use tiebeam::store::File;
use tiebeam::{Grads, Tensor};

pub const FILES: &[(&str, super::Check)] = &[
    ("masa", masa),
    ("mor_expert_choice", mor_expert_choice),
    ("rps_hashed", rps_hashed),
    ("shards_and_mixed_depth", shards_and_mixed_depth),
];

pub fn tensor(file: &File, name: &str) -> Tensor {
    let shape = &file.info(name).unwrap_or_else(|e| panic!("{e}")).shape;
    Tensor::from_slice(gpu(), &file.tensor_f32(name).unwrap(), &shape[..])
}

pub fn leaf(file: &File, name: &str) -> Tensor {
    tensor(file, name).requires_grad()
}

pub fn integers(file: &File, name: &str) -> Vec<u32> {
    file.tensor_u32(name)
        .or_else(|_| file.tensor_i32(name).map(|v| v.into_iter().map(|x| x as u32).collect()))
        .unwrap_or_else(|e| panic!("{e}"))
}

/// Compares with a value of the file, within the README's bound.
pub fn same(file: &File, name: &str, got: &Tensor) {
    close(name, &download(got), &values(file, name), 2e-5, 1e-6);
}

pub fn same_gradient(file: &File, name: &str, grads: &Grads, leaf: &Tensor) {
    same(file, name, grads.get(leaf).unwrap_or_else(|| panic!("{name}: no gradient")));
}

fn site(w: &Tensor) -> Arc<dyn Site> {
    Tied::new(w).shared()
}

/// Tests six layers of attention with two atoms per projection, the coefficient network, and matrix PCA.
pub fn masa(path: &Path) {
    let file = open(path);
    let (heads, kv_heads): (usize, usize) = (need(&file, "H"), need(&file, "Hkv"));
    let eps: f32 = need(&file, "eps");
    let names = ["q", "k", "v", "o"];
    let dictionaries = names.map(|p| {
        Dictionary::new(&leaf(&file, &format!("param.atoms.{p}")), &leaf(&file, &format!("param.coef.{p}")))
    });
    let gain = leaf(&file, "param.norm.g");
    let x0 = leaf(&file, "param.x");
    let combined: Vec<Vec<Tensor>> = dictionaries.iter().map(|d| d.atoms.combine(&d.coefficients)).collect();
    let layers = dictionaries[0].layers();
    let run = |weights: &dyn Fn(usize, usize) -> Arc<dyn Site>, check: bool| {
        let mut x = x0.clone();
        for l in 0..layers {
            let width = gain.shape()[1];
            let norm = Norm { gain: gain.slice(0, l..l + 1).reshape([width]), bias: None, eps };
            let [q, k, v, o] = [0, 1, 2, 3].map(|p| Linear::from_site(weights(p, l), None));
            let attention = Attention { q, k, v, o, heads, kv_heads };
            x = attention.forward(&norm.forward(&x), &Mask::Causal, Some(&x));
            if check {
                same(&file, &format!("out.layer.{l}"), &x);
            }
        }
        x.mul(&tensor(&file, "in.gout")).sum_all()
    };
    let loss = run(&|p, l| site(&combined[p][l]), true);
    let grads = loss.backward().unwrap();
    for (p, d) in names.iter().zip(&dictionaries) {
        same_gradient(&file, &format!("grad.atoms.{p}"), &grads, &d.atoms);
        same_gradient(&file, &format!("grad.coef.{p}"), &grads, &d.coefficients);
    }
    same_gradient(&file, "grad.norm.g", &grads, &gain);
    same_gradient(&file, "grad.x", &grads, &x0);
    for (p, all) in names.iter().zip(&combined) {
        same(&file, &format!("out.w.{p}"), &Tensor::stack(&all.iter().collect::<Vec<_>>(), 0));
    }
    // Each layer's weight is its own leaf here. The one pass combines the gradients of these.
    let own: Vec<Vec<Tensor>> = combined
        .iter()
        .map(|all| all.iter().map(|w| w.detach().contiguous().requires_grad()).collect())
        .collect();
    let grads = run(&|p, l| site(&own[p][l]), false).backward().unwrap();
    for (p, all) in names.iter().zip(&own) {
        let all: Vec<&Tensor> = all.iter().map(|w| grads.get(w).expect("used")).collect();
        same(&file, &format!("grad_w.{p}"), &Tensor::stack(&all, 0));
    }
    coefficients(&file, &dictionaries[0].coefficients);
    pca(&file);
    // The same model with weights that are computed when they are read, without any W in memory.
    let fused = run(&|p, l| dictionaries[p].site(l), true).backward().unwrap();
    for (p, d) in names.iter().zip(&dictionaries) {
        same_gradient(&file, &format!("grad.atoms.{p}"), &fused, &d.atoms);
        same_gradient(&file, &format!("grad.coef.{p}"), &fused, &d.coefficients);
    }
}

/// Tests the coefficient network and its gradients.
fn coefficients(file: &File, direct: &Tensor) {
    let of = |name: &str| leaf(file, &format!("coefnet.param.{name}"));
    let net = CoefficientNet {
        embedding: of("emb"),
        layers: [["w1", "b1"], ["w2", "b2"], ["w3", "b3"]].map(|pair| pair.map(of)),
        base: None,
    };
    let c = net.forward();
    assert_eq!(c.shape(), direct.shape());
    same(file, "coefnet.out", &c);
    let grads = c.mul(&tensor(file, "coefnet.gout")).sum_all().backward().unwrap();
    same_gradient(file, "coefnet.grad.emb", &grads, &net.embedding);
    for (i, [w, b]) in net.layers.iter().enumerate() {
        same_gradient(file, &format!("coefnet.grad.w{}", i + 1), &grads, w);
        same_gradient(file, &format!("coefnet.grad.b{}", i + 1), &grads, b);
    }
}

fn pca(file: &File) {
    let w = tensor(file, "pca.w");
    let (layers, atoms) = (w.shape()[0], need(file, "S"));
    let (dictionary, eigenvalues) = matrix_pca(&w, atoms).unwrap();
    close("eigenvalues", &eigenvalues, &values(file, "pca.gram_eigenvalues"), 2e-5, 1e-6);
    let all = dictionary.atoms.combine(&dictionary.coefficients);
    let all = Tensor::stack(&all.iter().collect::<Vec<_>>(), 0);
    same(file, "pca.reconstruction", &all);
    let error: f64 = download(&all.sub(&w).square().sum_all())[0];
    close("pca.sq_error", &[error], &values(file, "pca.sq_error"), 2e-5, 1e-6);
    // The atoms are orthonormal.
    let flat = dictionary.atoms.reshape([atoms, w.count() / layers]);
    let unit: Vec<f64> = (0..atoms * atoms).map(|i| (i % (atoms + 1) == 0) as u8 as f64).collect();
    close("atoms", &download(&flat.matmul(&flat.t())), &unit, 2e-5, 1e-6);
}

fn block(file: &File, heads: usize) -> Block {
    let linear = |name: &str| Linear::from_site(site(&leaf(file, &format!("param.{name}"))), None);
    let eps = need(file, "eps");
    let norm = |name: &str| Norm { gain: leaf(file, &format!("param.{name}.g")), bias: None, eps };
    Block {
        norm1: norm("norm1"),
        attention: Attention {
            q: linear("wq"),
            k: linear("wk"),
            v: linear("wv"),
            o: linear("wo"),
            heads,
            kv_heads: heads,
        },
        norm2: norm("norm2"),
        mlp: Mlp { gate: None, up: linear("w1"), down: linear("w2"), activation: Activation::GeluTanh },
    }
}

/// Tests expert choice over three recursions, with the keys of each recursion and with those of the first.
pub fn mor_expert_choice(path: &Path) {
    let file = open(path);
    let (heads, recursions): (usize, usize) = (need(&file, "H"), need(&file, "R"));
    for (prefix, keys) in [("", Keys::Recursion), ("kvshare.", Keys::Shared)] {
        let x = leaf(&file, "param.x");
        let router = leaf(&file, "param.router");
        let width = router.shape()[1];
        let routers = (0..recursions).map(|r| router.slice(0, r..r + 1).reshape([width])).collect();
        let block = block(&file, heads);
        let model = Mor::from_parts(block, routers, recursions, Routing::Expert, keys);
        let k = capacities(x.shape()[1], recursions);
        let (y, done) = model.forward(&x, &k).unwrap();
        for (r, one) in done.iter().enumerate() {
            let name = |what: &str| format!("{prefix}r{r}.{what}");
            for (what, got) in [("candidates", &one.candidates), ("selected", &one.selected)] {
                if file.contains(&name(what)) {
                    assert_eq!(got.to_vec::<u32>().unwrap(), integers(&file, &name(what)), "{}", name(what));
                }
            }
            let output = one.output();
            for (what, got) in [("score", &one.scores), ("gate", &one.gates), ("block_out", &output)] {
                if file.contains(&name(what)) {
                    same(&file, &name(what), got);
                }
            }
        }
        same(&file, &format!("{prefix}out.y"), &y);
        let loss = y.mul(&tensor(&file, "in.gout")).sum_all();
        if file.contains(&format!("{prefix}out.loss")) {
            same(&file, &format!("{prefix}out.loss"), &loss);
        }
        let grads = loss.backward().unwrap();
        let b = &model.block;
        let of = |layer: &Linear| layer.weight.leaves().remove(0);
        let leaves = [
            ("x", x.clone()),
            ("router", router.clone()),
            ("wq", of(&b.attention.q)),
            ("wk", of(&b.attention.k)),
            ("wv", of(&b.attention.v)),
            ("wo", of(&b.attention.o)),
            ("w1", of(&b.mlp.up)),
            ("w2", of(&b.mlp.down)),
            ("norm1.g", b.norm1.gain.clone()),
            ("norm2.g", b.norm2.gain.clone()),
        ];
        let mut compared = 0;
        for (name, leaf) in &leaves {
            let name = format!("{prefix}grad.{name}");
            if file.contains(&name) {
                same_gradient(&file, &name, &grads, leaf);
                compared += 1;
            }
        }
        let given = file.names().filter(|n| n.starts_with(&format!("{prefix}grad."))).count();
        assert_eq!(compared, given, "gradients of '{prefix}' compared");
    }
}

/// Tests two layers that are drawn from one store, with each mapping.
pub fn rps_hashed(path: &Path) {
    let file = open(path);
    let inputs = integers(&file, "hash.in");
    let hashes: Vec<u32> = inputs.iter().map(|&x| hashed::hash(x, need(&file, "s_idx"))).collect();
    assert_eq!(hashes, integers(&file, "hash.out"), "the hash itself");
    let stored = file.info("param.omega").unwrap().shape[0];
    let mappings = [
        ("element", Mapping::Element),
        ("chunk", Mapping::Chunk(need(&file, "Z"))),
        ("tile", Mapping::Tile([need(&file, "bk"), need(&file, "bn")])),
        ("stable", Mapping::Stable),
    ];
    let seeds = [need(&file, "s_idx"), need(&file, "s_sign")];
    let lambda = file.tensor_f32("in.lambda").unwrap();
    for (name, mapping) in mappings {
        let mut offset = 0;
        let draws: Vec<Draw> = (0..2)
            .map(|layer| {
                let shape = &file.info(&format!("{name}.w.{layer}")).unwrap().shape;
                let size = [shape[0], shape[1]];
                let draw = Draw { stored, size, offset, layer, scale: lambda[layer], mapping, seeds };
                offset += size[0] * size[1];
                draw
            })
            .collect();
        let omega = leaf(&file, "param.omega");
        let x = leaf(&file, "param.x");
        let mut h = x.clone();
        for (layer, draw) in draws.iter().enumerate() {
            assert_eq!(draw.positions(), integers(&file, &format!("{name}.idx.{layer}")), "{name} {layer}");
            let signs = values(&file, &format!("sign.{layer}"));
            assert_eq!(draw.signs().iter().map(|&s| s as f64).collect::<Vec<_>>(), signs);
            let hashed = Hashed::new(&omega, *draw).shared();
            same(&file, &format!("{name}.w.{layer}"), &hashed.expand());
            h = h.linear(&hashed, Epilogue::default());
            if layer == 0 {
                h = h.relu();
            }
        }
        same(&file, &format!("{name}.out.y"), &h);
        let loss = |y: &Tensor| y.mul(&tensor(&file, "in.gout")).sum_all();
        let grads = loss(&h).backward().unwrap();
        same_gradient(&file, &format!("{name}.grad.omega"), &grads, &omega);
        same_gradient(&file, &format!("{name}.grad.x"), &grads, &x);
        let mut count = vec![0u32; stored];
        draws.iter().flat_map(Draw::positions).for_each(|at| count[at as usize] += 1);
        assert_eq!(count, integers(&file, &format!("{name}.count")), "{name}.count");
        let gamma = Draw::stabilizer(&draws);
        let exact: Vec<f64> = gamma.iter().map(|&g| g as f64).collect();
        close(&format!("{name}.gamma"), &exact, &values(&file, &format!("{name}.gamma")), 2e-5, 1e-6);
        // The same with the stabilised gradient.
        let inverse: Vec<f32> = gamma.iter().map(|g| 1.0 / g).collect();
        let scaled = omega.scale_gradient(&Tensor::from_slice(gpu(), &inverse, [stored]));
        let through =
            |x: &Tensor, draw: &Draw| x.linear(&Hashed::new(&scaled, *draw).shared(), Epilogue::default());
        let grads = loss(&through(&through(&x, &draws[0]).relu(), &draws[1])).backward().unwrap();
        same_gradient(&file, &format!("{name}.grad_scaled.omega"), &grads, &omega);
    }
}

/// Tests low-rank parts from shard pools, and rows at different depths in one product.
pub fn shards_and_mixed_depth(path: &Path) {
    let file = open(path);
    let (pool_a, pool_b) = (leaf(&file, "shards.param.pool_a"), leaf(&file, "shards.param.pool_b"));
    let shape = file.info("shards.index_a").unwrap().shape.clone();
    let index = |name: &str| {
        let all = integers(&file, &format!("shards.{name}"));
        all.chunks(all.len() / shape[0]).map(<[u32]>::to_vec).collect::<Vec<_>>()
    };
    let pool = ShardPool {
        pool_a: pool_a.clone(),
        pool_b: pool_b.clone(),
        index_a: index("index_a"),
        index_b: index("index_b"),
        rank: shape[1],
        scale: need(&file, "scale"),
    };
    let x = leaf(&file, "shards.param.x");
    let all: Vec<Tensor> = (0..shape[0]).map(|k| pool.forward(k, &x)).collect();
    let y = Tensor::stack(&all.iter().collect::<Vec<_>>(), 0);
    same(&file, "shards.out.y", &y);
    let grads = y.mul(&tensor(&file, "shards.in.gout")).sum_all().backward().unwrap();
    same_gradient(&file, "shards.grad.pool_a", &grads, &pool_a);
    same_gradient(&file, "shards.grad.pool_b", &grads, &pool_b);
    same_gradient(&file, "shards.grad.x", &grads, &x);

    let names = ["x", "w", "a", "b"];
    let leaves = names.map(|n| leaf(&file, &format!("mixed.param.{n}")));
    let [x, w, a, b] = leaves.clone();
    let depth = integers(&file, "mixed.depth");
    let depths = Tensor::from_slice(gpu(), &depth, [depth.len()]);
    let y = DepthLora::new(&a, &b, 1.0).linear(&x, &site(&w), &depths);
    same(&file, "mixed.out.y", &y);
    let grads = y.mul(&tensor(&file, "mixed.in.gout")).sum_all().backward().unwrap();
    for (name, leaf) in names.iter().zip(&leaves) {
        same_gradient(&file, &format!("mixed.grad.{name}"), &grads, leaf);
    }
}
