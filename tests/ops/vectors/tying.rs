//! The `tying` family: a weight-tied transformer with low-rank parts, its gradients, and five AdamW steps.
//! Formulas: `tests/vectors/tying/README.md`.

use crate::support::{download, gpu, within};
use std::collections::BTreeMap;
use std::path::Path;
use tiebeam::models::lm::{FeedForward, Lm, LmBlock, LmConfig, TokenTable};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::{Activation, Attention, Embedding, Linear, Mlp, Norm};
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::share::{LowRank, Site};
use tiebeam::store::File;
use tiebeam::{Grads, Rng, Tensor};

pub const FILES: &[(&str, super::Check)] =
    &[("tied_gpt_rms", tied_gpt), ("tied_gpt_ln", tied_gpt), ("adamw_tied", adamw_tied)];

const MATRICES: [&str; 6] = ["wq", "wk", "wv", "wo", "w1", "w2"];

pub fn open(path: &Path) -> File {
    File::open(path).unwrap_or_else(|e| panic!("{e}"))
}

fn setting<T: std::str::FromStr>(file: &File, name: &str) -> Option<T> {
    file.metadata().get(name)?.parse().ok()
}

pub fn need<T: std::str::FromStr>(file: &File, name: &str) -> T {
    setting(file, name).unwrap_or_else(|| panic!("the metadata has no usable {name}"))
}

pub fn values(file: &File, name: &str) -> Vec<f64> {
    file.tensor_f32(name).unwrap_or_else(|e| panic!("{e}")).into_iter().map(f64::from).collect()
}

/// Checks `|a - b| <= relative * max|b| + absolute`, the bound of the vectors' README.
pub fn close(what: &str, got: &[f64], want: &[f64], relative: f64, absolute: f64) {
    let most = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    within(what, got, want, |_| relative * most + absolute);
}

/// The model of a file, and its leaves by the file's names. Per-depth leaves have one tensor per depth.
struct Model {
    net: Lm,
    leaves: BTreeMap<String, Vec<Tensor>>,
    scale: f32,
}

fn model(file: &File, prefix: &str) -> Model {
    let gpu = gpu();
    let depth: usize = need(file, "R");
    let mut leaves: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
    let mut load = |name: &str, split: bool| -> Vec<Tensor> {
        let full = format!("{prefix}.{name}");
        let shape = &file.info(&full).unwrap_or_else(|e| panic!("{e}")).shape;
        let data = file.tensor_f32(&full).unwrap();
        let parts: Vec<Tensor> = if split {
            data.chunks(data.len() / depth)
                .map(|part| Tensor::from_slice(gpu, part, &shape[1..]).requires_grad())
                .collect()
        } else {
            vec![Tensor::from_slice(gpu, &data, &shape[..]).requires_grad()]
        };
        leaves.insert(name.to_string(), parts.clone());
        parts
    };
    let emb = load("emb", false).remove(0);
    let pos = load("pos", false).remove(0);
    let theta: Vec<Tensor> = MATRICES.iter().map(|m| load(m, false).remove(0)).collect();
    let lora_a: Vec<Vec<Tensor>> = MATRICES.iter().map(|m| load(&format!("lora_a.{m}"), true)).collect();
    let lora_b: Vec<Vec<Tensor>> = MATRICES.iter().map(|m| load(&format!("lora_b.{m}"), true)).collect();
    let ln = file.contains(&format!("{prefix}.norm1.b"));
    let bias: Vec<Option<Tensor>> =
        ["bq", "bk", "bv", "bo", "b1", "b2"].iter().map(|b| ln.then(|| load(b, false).remove(0))).collect();
    // In the file of optimizer steps, `eps` is Adam's. The eps of its norms is given in the README.
    let eps = if prefix == "param" { need(file, "eps") } else { 1e-5 };
    let mut norms = |name: &str, per_depth: bool| -> Vec<Norm> {
        let gains = load(&format!("{name}.g"), per_depth);
        let biases = if ln { load(&format!("{name}.b"), per_depth) } else { Vec::new() };
        let count = if name == "normf" { 1 } else { depth };
        (0..count)
            .map(|t| Norm {
                gain: gains[t.min(gains.len() - 1)].clone(),
                bias: biases.get(t.min(biases.len().max(1) - 1)).cloned(),
                eps,
            })
            .collect()
    };
    let (norm1, norm2, normf) = (norms("norm1", ln), norms("norm2", ln), norms("normf", false));
    let scale: f32 = setting(file, "lora_scale").unwrap_or(2.0);
    let heads: usize = need(file, "H");
    let blocks = (0..depth)
        .map(|t| {
            let layer = |i: usize| {
                let site = LowRank::new(&theta[i], &lora_a[i][t], &lora_b[i][t], scale).shared();
                Linear::from_site(site, bias[i].clone())
            };
            LmBlock {
                norm1: norm1[t].clone(),
                attention: Attention {
                    q: layer(0),
                    k: layer(1),
                    v: layer(2),
                    o: layer(3),
                    heads,
                    kv_heads: heads,
                },
                norm2: norm2[t].clone(),
                mlp: FeedForward::Dense(Mlp {
                    gate: None,
                    up: layer(4),
                    down: layer(5),
                    activation: Activation::GeluTanh,
                }),
            }
        })
        .collect();
    let config = LmConfig::small()
        .vocab(need(file, "V"))
        .width(need(file, "d"))
        .heads(heads)
        .kv_heads(heads)
        .hidden(need(file, "f"))
        .context(need(file, "T"))
        .depth(depth)
        .sharing(Sharing::tied_lora(need(file, "r"), scale));
    // Everything that is drawn is replaced by what the file has.
    let mut net = Lm::new(gpu, config, &mut Rng::new(0));
    net.embedding = TokenTable::Stored(Embedding { table: emb });
    net.positions = Some(pos);
    net.blocks = blocks;
    net.norm = normf[0].clone();
    Model { net, leaves, scale }
}

/// Returns all parts of a leaf, in order, on the host.
fn joined(parts: &[Tensor], mut of: impl FnMut(&Tensor) -> Tensor) -> Vec<f64> {
    parts.iter().flat_map(|part| download(&of(part))).collect()
}

fn gradient(grads: &Grads, leaf: &Tensor) -> Tensor {
    grads.get(leaf).expect("every parameter has a gradient").clone()
}

/// Tests forward, every gradient, and the contributions of each depth if the file has them.
pub fn tied_gpt(path: &Path) {
    let file = open(path);
    let model = model(&file, "param");
    let shape: Vec<usize> = file.info("in.tokens").unwrap().shape.clone();
    let tokens = Tensor::from_slice(gpu(), &file.tensor_u32("in.tokens").unwrap(), &shape[..]);
    let targets = Tensor::from_slice(gpu(), &file.tensor_u32("in.targets").unwrap(), &shape[..]);
    let hidden = model.net.streams(&tokens);
    for (t, x) in hidden.iter().enumerate() {
        let name = format!("out.hidden.{t}");
        close(&name, &download(x), &values(&file, &name), 2e-5, 1e-6);
    }
    let logits = model.net.logits(&hidden[hidden.len() - 1]);
    close("out.logits", &download(&logits), &values(&file, "out.logits"), 2e-5, 1e-6);
    let loss = logits.cross_entropy(&targets, None);
    close("out.loss", &download(&loss), &values(&file, "out.loss"), 2e-5, 1e-6);
    let grads = loss.backward().unwrap();
    for (name, parts) in &model.leaves {
        let name = format!("grad.{name}");
        let got = joined(parts, |leaf| gradient(&grads, leaf));
        // A key bias cannot change a softmax, so its gradient is only rounding error.
        let absolute = if name == "grad.bk" { 1e-5 } else { 1e-6 };
        close(&name, &got, &values(&file, &name), 2e-5, absolute);
    }
    for name in file.names().filter(|n| n.starts_with("grad.")) {
        assert!(model.leaves.contains_key(&name[5..]), "{name} was not compared");
    }
    per_depth(&file, &model, &tokens, &targets);
}

/// Compares the contribution of each use of a tied matrix, which is the gradient when that depth has its own leaf.
fn per_depth(file: &File, model: &Model, tokens: &Tensor, targets: &Tensor) {
    for name in file.names().filter_map(|n| n.strip_prefix("grad_per_depth.")) {
        let index = MATRICES.iter().position(|m| *m == name).expect("a matrix");
        let depth = model.net.config.depth;
        let scale = model.scale;
        let copies: Vec<Tensor> =
            (0..depth).map(|_| model.leaves[name][0].detach().requires_grad()).collect();
        let mut blocks = model.net.blocks.clone();
        for (t, block) in blocks.iter_mut().enumerate() {
            let a = &model.leaves[&format!("lora_a.{name}")][t];
            let b = &model.leaves[&format!("lora_b.{name}")][t];
            let site = LowRank::new(&copies[t], a, b, scale).shared();
            let layer = block.linear_mut(["q", "k", "v", "o", "up", "down"][index]);
            layer.weight = site;
        }
        let mut untied = model.net.clone();
        untied.blocks = blocks;
        let grads = untied.loss(tokens, targets).backward().unwrap();
        let got = joined(&copies, |leaf| gradient(&grads, leaf));
        close(name, &got, &values(file, &format!("grad_per_depth.{name}")), 2e-5, 1e-6);
        // The tie law on the file's own numbers: the shared leaf's gradient is the sum over depths.
        let one = got.len() / depth;
        let sum: Vec<f64> = (0..one).map(|i| (0..depth).map(|t| got[t * one + i]).sum()).collect();
        close(
            &format!("sum over depths of {name}"),
            &sum,
            &values(file, &format!("grad.{name}")),
            2e-5,
            1e-6,
        );
    }
}

/// Tests five steps: losses, gradient norms, parameters after the first and the last, moments after the last.
pub fn adamw_tied(path: &Path) {
    let file = open(path);
    let model = model(&file, "param0");
    let (undecayed, decayed): (Vec<_>, Vec<_>) = model
        .leaves
        .iter()
        .flat_map(|(name, parts)| {
            parts.iter().enumerate().map(move |(i, p)| (format!("{name}.{i}"), p.clone()))
        })
        .partition(|(name, _)| name.starts_with("norm"));
    let lr: f32 = need(&file, "lr");
    let groups = vec![
        Group { params: decayed, weight_decay: need(&file, "weight_decay"), lr_scale: 1.0 },
        Group { params: undecayed, weight_decay: 0.0, lr_scale: 1.0 },
    ];
    let config = AdamWConfig::default()
        .betas((need(&file, "beta1"), need(&file, "beta2")))
        .eps(need(&file, "eps"))
        .clip(Some(need(&file, "clip")));
    let mut optimizer = AdamW::new(gpu(), groups, config).unwrap();
    let shape = file.info("in.tokens").unwrap().shape.clone();
    let (all_tokens, all_targets) =
        (file.tensor_u32("in.tokens").unwrap(), file.tensor_u32("in.targets").unwrap());
    let one = shape[1] * shape[2];
    let (mut losses, mut norms, mut moments) = (Vec::new(), Vec::new(), 0);
    for step in 0..shape[0] {
        let part = step * one..(step + 1) * one;
        let tokens = Tensor::from_slice(gpu(), &all_tokens[part.clone()], &shape[1..]);
        let targets = Tensor::from_slice(gpu(), &all_targets[part], &shape[1..]);
        let loss = model.net.loss(&tokens, &targets);
        let grads = loss.backward().unwrap();
        losses.extend(download(&loss));
        norms.extend(download(&optimizer.step(&grads, lr).unwrap().norm));
        if step == 0 {
            compare(&file, &model, "param1");
        }
    }
    close("out.losses", &losses, &values(&file, "out.losses"), 2e-5, 1e-6);
    close("out.grad_norms", &norms, &values(&file, "out.grad_norms"), 2e-5, 1e-6);
    compare(&file, &model, &format!("param{}", shape[0]));
    for (name, _, data) in optimizer.state_dict().unwrap() {
        // Moments are named `m/LEAF.PART` and `v/LEAF.PART`; the file has those of some leaves.
        let (kind, leaf) = name.split_once('/').expect("kind and leaf");
        let want = format!("{kind}{}.{}", shape[0], leaf.trim_end_matches(".0"));
        if file.contains(&want) {
            let got: Vec<f64> = data.into_iter().map(f64::from).collect();
            close(&want, &got, &values(&file, &want), 2e-3, 2e-5);
            moments += 1;
        }
    }
    let given = file
        .names()
        .filter(|n| n.starts_with(&format!("m{}.", shape[0])) || n.starts_with(&format!("v{}.", shape[0])));
    assert_eq!(moments, given.count(), "moments compared");
}

fn compare(file: &File, model: &Model, prefix: &str) {
    for (name, parts) in &model.leaves {
        let name = format!("{prefix}.{name}");
        close(&name, &joined(parts, Tensor::clone), &values(file, &name), 2e-3, 2e-5);
    }
}
