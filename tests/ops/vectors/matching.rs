//! The `matching` family's permutation searches. Formulas: `tests/vectors/matching/README.md`.

use super::tying::{close, open, values};
use crate::support::{download, gpu, within};
use std::collections::BTreeMap;
use std::path::Path;
use tiebeam::merge::{
    Builder, MatchOptions, Matching, Permutation, Spec, TransformerNames, VisitOrder, Weights, group_costs,
    match_weights,
};
use tiebeam::models::network::Network;
use tiebeam::nn::Mask;
use tiebeam::ops::product::conv::Conv2dConfig;
use tiebeam::store::{File, FileDType};
use tiebeam::{DType, Tensor};

pub const FILES: &[(&str, super::Check)] =
    &[("wm_mlp", wm_mlp), ("wm_mlp3", wm_mlp3), ("wm_conv", wm_conv), ("wm_transformer", wm_transformer)];

type Model = BTreeMap<String, Tensor>;

/// Returns the tensors under `prefix.`.
fn model(file: &File, prefix: &str) -> Model {
    let own = |name: &str| name.strip_prefix(prefix)?.strip_prefix('.').map(String::from);
    // Reference values are f64.
    let floats = file.names().filter(|name| file.info(name).unwrap().dtype == FileDType::F32);
    floats
        .filter_map(|full| Some((own(full)?, full)))
        .map(|(name, full)| {
            let shape = &file.info(full).unwrap().shape;
            (name, Tensor::from_slice(gpu(), &file.tensor_f32(full).unwrap(), &shape[..]))
        })
        .collect()
}

fn one(file: &File, name: &str) -> f64 {
    values(file, name)[0]
}

fn order(file: &File, name: &str) -> Vec<u32> {
    file.tensor_u32(name).unwrap_or_else(|e| panic!("{e}"))
}

fn given() -> MatchOptions {
    MatchOptions::default().order(VisitOrder::Given)
}

fn aligned(spec: &Spec, a: &Model, b: &Model) -> Matching {
    let matching = match_weights(gpu(), spec, a, b, &given()).unwrap_or_else(|e| panic!("{e}"));
    assert!(matching.exact, "a certificate leaves a gap of {}", matching.gap);
    matching
}

/// Compares the values of all visits, the number of sweeps and the objective of a search with the file.
fn compare(file: &File, matching: &Matching, groups: &[&str]) {
    let trace = values(file, "objective_trace");
    let got: Vec<f64> = matching.visits.iter().map(|visit| visit.value).collect();
    close("objective_trace", &got, &trace, 1e-5, 0.0);
    assert_eq!(matching.sweeps * groups.len(), trace.len(), "sweeps");
    close("objective_final", &[matching.objective], &values(file, "objective_final"), 1e-5, 0.0);
    for (visit, group) in matching.visits.iter().zip(groups.iter().cycle()) {
        assert_eq!(&visit.group, group);
    }
}

/// Compares the cost matrix of a group's first visit. The groups visited before it have their orders after the first sweep.
fn first_costs(file: &File, spec: &Spec, [a, b]: [&Model; 2], known: &[(&str, Vec<u32>)], group: &str) {
    let mut orders = Permutation::identity(spec, b).unwrap().orders().clone();
    for (name, order) in known {
        orders.insert(name.to_string(), order.clone());
    }
    let start = Permutation::new(spec.clone(), orders).unwrap();
    let costs = group_costs(gpu(), [a, b], &start, group).unwrap();
    let (what, got) = match costs.head_pairs {
        Some(pairs) => ("head.cost_first_sweep".to_string(), pairs),
        None => {
            let cost = costs.matrices[0].1.iter().map(|&c| f64::from(c)).collect();
            (format!("{group}.cost_first_sweep"), cost)
        }
    };
    close(&what, &got, &values(file, &what), 1e-5, 0.0);
}

fn layers(model: &Model) -> Network {
    Network::mlp(model).unwrap()
}

fn mlp_spec(model: &Model) -> Spec {
    Spec::mlp(model, &layers(model).layers()).unwrap()
}

/// Computes mean cross-entropy and accuracy.
fn evaluate(weights: &dyn Weights, x: &Tensor, y: &[u32]) -> [f64; 2] {
    let logits = Network::mlp(weights).unwrap().logits(gpu(), weights, x).unwrap();
    let targets = Tensor::from_slice(gpu(), y, [y.len()]);
    let loss = f64::from(logits.cross_entropy(&targets, None).item().unwrap());
    let best = logits.argmax(-1).cast(DType::U32).to_vec::<u32>().unwrap();
    [loss, best.iter().zip(y).filter(|(a, b)| a == b).count() as f64 / y.len() as f64]
}

fn data(file: &File) -> (Tensor, Vec<u32>) {
    let shape = &file.info("x").unwrap().shape;
    (Tensor::from_slice(gpu(), &file.tensor_f32("x").unwrap(), &shape[..]), order(file, "y"))
}

/// Returns `(1 - l) a + l b`.
fn between(a: &Model, b: &dyn Weights, l: f64) -> Model {
    let mix = |(name, x): (&String, &Tensor)| {
        let y = b.read(gpu(), name).unwrap();
        (name.clone(), x.scale((1.0 - l) as f32).add(&y.scale(l as f32)))
    };
    a.iter().map(mix).collect()
}

fn wm_mlp(path: &Path) {
    let file = open(path);
    let [a, b, planted] = ["a", "b", "planted"].map(|prefix| model(&file, prefix));
    let spec = mlp_spec(&a);
    let groups: Vec<&str> = spec.groups.iter().map(|group| group.name.as_str()).collect();
    let mut known = Vec::new();
    for group in &groups {
        first_costs(&file, &spec, [&a, &b], &known, group);
        known.push((group, order(&file, &format!("{group}.perm_first_sweep"))));
    }
    let matching = aligned(&spec, &a, &b);
    compare(&file, &matching, &groups);
    for (visit, group) in matching.visits.iter().zip(&groups) {
        let want = values(&file, &format!("{group}.value_first_sweep"));
        close("value_first_sweep", &[visit.value], &want, 1e-5, 0.0);
    }
    assert_eq!(matching.sweeps as u32, order(&file, "sweeps")[0]);
    for group in &groups {
        assert_eq!(matching.permutation.orders()[*group], order(&file, &format!("{group}.perm")), "{group}");
    }
    let numbers = [matching.objective_before, matching.distance_before, matching.distance];
    let want = ["objective_identity", "l2_naive", "l2_matched"].map(|name| one(&file, name));
    within("objective and distances", &numbers, &want, |i| 1e-5 * want[i].abs());
    losses(&file, &matching, &a, &b);
    let found = aligned(&spec, &a, &planted);
    for group in &groups {
        let want = order(&file, &format!("planted.{group}.perm"));
        assert_eq!(found.permutation.orders()[*group], want, "planted {group}");
    }
    close("planted.objective", &[found.objective], &values(&file, "planted.objective"), 1e-5, 0.0);
}

/// Compares loss and accuracy along both segments with the file.
fn losses(file: &File, matching: &Matching, a: &Model, b: &Model) {
    let (x, y) = data(file);
    let permuted = matching.permuted(b);
    for (end, kind) in [(b as &dyn Weights, "naive"), (&permuted, "matched")] {
        let points: Vec<[f64; 2]> =
            values(file, "lambdas").iter().map(|&l| evaluate(&between(a, end, l), &x, &y)).collect();
        let [loss, accuracy] = [0, 1].map(|i| points.iter().map(|p| p[i]).collect::<Vec<f64>>());
        close(&format!("loss_{kind}"), &loss, &values(file, &format!("loss_{kind}")), 0.0, 1e-4);
        // Rounding may change one prediction.
        let most = 1.01 / y.len() as f64;
        close(&format!("acc_{kind}"), &accuracy, &values(file, &format!("acc_{kind}")), 0.0, most);
    }
}

fn wm_mlp3(path: &Path) {
    let file = open(path);
    let first = open(&path.with_file_name("wm_mlp.safetensors"));
    let [a, b] = ["a", "b"].map(|prefix| model(&first, prefix));
    let c = model(&file, "c");
    let spec = mlp_spec(&a);
    let [to_b, to_c] = [&b, &c].map(|other| aligned(&spec, &a, other));
    for group in &spec.groups {
        let want = order(&file, &format!("{}.perm_c", group.name));
        assert_eq!(to_c.permutation.orders()[&group.name], want, "{}", group.name);
    }
    let mean = |others: [&dyn Weights; 2]| -> Model {
        let one = |(name, x): (&String, &Tensor)| {
            let [y, z] = others.map(|other| other.read(gpu(), name).unwrap());
            (name.clone(), x.add(&y).add(&z).scale(1.0 / 3.0))
        };
        a.iter().map(one).collect()
    };
    let merged = mean([&to_b.permuted(&b), &to_c.permuted(&c)]);
    for (name, x) in &merged {
        close(name, &download(x), &values(&file, &format!("merged3.{name}")), 1e-6, 2e-6);
    }
    let (x, y) = data(&first);
    for (model, name) in [(merged, "loss_merged3"), (mean([&b, &c]), "loss_naive3")] {
        let want = values(&file, name);
        let slack = [1e-4, 1.01 / y.len() as f64];
        within(name, &evaluate(&model, &x, &y), &want, |i| slack[i]);
    }
}

/// The residual network with batch norm in evaluation mode.
fn conv_net(w: &dyn Weights, x: &Tensor) -> Tensor {
    let read = |name: &str| w.read(gpu(), name).unwrap();
    let norm = |x: &Tensor, name: &str| {
        let part = |part: &str| read(&format!("{name}.{part}")).unsqueeze(1).unsqueeze(2);
        let scaled = x.sub(&part("running_mean")).mul(&part("running_var").affine(1.0, 1e-5).rsqrt());
        scaled.mul(&part("weight")).add(&part("bias"))
    };
    let same = Conv2dConfig::default().padding([1, 1]);
    let h = norm(&x.conv2d(&read("stem.weight"), Some(&read("stem.bias")), same), "norm0").relu();
    let z = norm(&h.conv2d(&read("block.conv1.weight"), None, same), "block.norm1").relu();
    let h = h.add(&z.conv2d(&read("block.conv2.weight"), None, same)).relu();
    h.global_avg_pool2d().matmul(&read("head.weight").t()).add(&read("head.bias"))
}

fn wm_conv(path: &Path) {
    let file = open(path);
    let [a, b] = ["a", "b"].map(|prefix| model(&file, prefix));
    let mut spec = Builder::new(&a).unwrap();
    spec.writes("Pres", "stem").norm("Pres", "norm0").writes("Pres", "block.conv2");
    spec.reads("Pres", "block.conv1", 1).reads("Pres", "head", 1).fixed("head.bias");
    spec.writes("Pin", "block.conv1").norm("Pin", "block.norm1").reads("Pin", "block.conv2", 1);
    let spec = spec.build();
    first_costs(&file, &spec, [&a, &b], &[], "Pres");
    let matching = aligned(&spec, &a, &b);
    compare(&file, &matching, &["Pres", "Pin"]);
    for group in ["Pres", "Pin"] {
        assert_eq!(matching.permutation.orders()[group], order(&file, &format!("{group}.perm")), "{group}");
    }
    let x = Tensor::from_slice(gpu(), &file.tensor_f32("x").unwrap(), &file.info("x").unwrap().shape[..]);
    let want = values(&file, "logits_b");
    close("logits of b", &download(&conv_net(&b, &x)), &want, 1e-5, 1e-5);
    close("logits of permuted b", &download(&conv_net(&matching.permuted(&b), &x)), &want, 1e-5, 1e-5);
}

/// One pre-norm block.
fn transformer(w: &dyn Weights, tokens: &Tensor, heads: usize) -> Tensor {
    let read = |name: &str| w.read(gpu(), name).unwrap();
    let bias = |name: &str| w.shape(&format!("{name}.bias")).ok().map(|_| read(&format!("{name}.bias")));
    let norm = |x: &Tensor, name: &str| {
        x.layer_norm(Some(&read(&format!("{name}.weight"))), bias(name).as_ref(), 1e-5)
    };
    let linear = |x: &Tensor, name: &str| {
        let y = x.matmul(&read(&format!("{name}.weight")).t());
        bias(name).map_or(y.clone(), |bias| y.add(&bias))
    };
    let [batch, length] = tokens.shape()[..] else { panic!("tokens {}", tokens.shape()) };
    let x = read("emb.weight").embedding(tokens).add(&read("pos.weight").slice(0, 0..length));
    let width = x.shape()[2];
    let normed = norm(&x, "ln1");
    let split = |x: Tensor| {
        let dim = x.shape()[2] / heads;
        x.reshape([batch, length, heads, dim]).transpose(1, 2)
    };
    let [q, k, v] = ["q", "k", "v"].map(|part| split(linear(&normed, part)));
    let mixed = q.attention(&k, &v, &Mask::Causal).transpose(1, 2);
    let inner = mixed.shape()[2] * mixed.shape()[3];
    let x = x.add(&linear(&mixed.reshape([batch, length, inner]), "o"));
    assert_eq!(x.shape()[2], width);
    let x = x.add(&linear(&linear(&norm(&x, "ln2"), "up").gelu(), "down"));
    norm(&x, "lnf").matmul(&read("unemb.weight").t())
}

fn wm_transformer(path: &Path) {
    let file = open(path);
    let [a, b] = ["a", "b"].map(|prefix| model(&file, prefix));
    let heads = order(&file, "config")[3] as usize;
    let names = TransformerNames {
        tables: &["emb", "pos", "unemb"],
        block: "",
        norms: &["ln1", "ln2"],
        attention: ["q", "k", "v", "o"],
        ups: &["up"],
        down: "down",
        norm: "lnf",
        head_norms: &[],
    };
    let spec = Spec::transformer(&a, &names, [heads, heads], false).unwrap();
    let matching = aligned(&spec, &a, &b);
    compare(&file, &matching, &["res", "ff", "heads"]);
    let found = matching.permutation.orders();
    for (part, stored) in [
        ("res", "res"),
        ("ff", "ff"),
        ("heads.q", "qk"),
        ("heads.k", "qk"),
        ("heads.v", "vo"),
        ("heads.o", "vo"),
    ] {
        assert_eq!(found[part], order(&file, &format!("{stored}.perm")), "{part}");
    }
    first_costs(&file, &spec, [&a, &b], &[], "res");
    // The file's second sweep changes nothing, so the final orders are those after the first sweep.
    if matching.sweeps == 2 {
        first_costs(
            &file,
            &spec,
            [&a, &b],
            &[("res", found["res"].clone()), ("ff", found["ff"].clone())],
            "heads",
        );
    }
    let shape = &file.info("tokens").unwrap().shape;
    let tokens = Tensor::from_slice(gpu(), &order(&file, "tokens"), &shape[..]);
    let want = values(&file, "logits_b");
    close("logits of b", &download(&transformer(&b, &tokens, heads)), &want, 1e-5, 1e-5);
    let permuted = matching.permuted(&b);
    close("logits of permuted b", &download(&transformer(&permuted, &tokens, heads)), &want, 1e-5, 1e-5);
}
