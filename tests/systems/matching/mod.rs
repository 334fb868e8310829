//! Permutation matching: planted permutations are found, permuted models compute the same, the objective never falls, and errors
//! name the bad input.

mod networks;
mod trained;

use crate::support::folder::Folder;
use crate::support::{download, gpu, matching_vectors};
use std::collections::BTreeMap;
use tiebeam::merge::{
    ActivationMatching, LayerNames, MatchOptions, Matching, Permutation, Shards, Similarity, Spec,
    VisitOrder, Weights, group_costs, match_weights, reset_statistics,
};
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::network::Network;
use tiebeam::ops::sequence::rope::Pairing;
use tiebeam::store::save_tensors;
use tiebeam::{Rng, Tensor};

type Model = BTreeMap<String, Tensor>;

/// Draws normal weights with these names and shapes. Vectors (gains and biases) are around 1.
fn drawn(shapes: &[(String, Vec<usize>)], seed: u64) -> Model {
    let mut rng = Rng::new(seed);
    let one = |(name, shape): &(String, Vec<usize>)| {
        let x = Tensor::randn(gpu(), &shape[..], &mut rng);
        let x = if shape.len() == 1 { x.affine(0.3, 1.0) } else { x.scale(0.3) };
        (name.clone(), x)
    };
    shapes.iter().map(one).collect()
}

fn shapes(list: &[(&str, &[usize])]) -> Vec<(String, Vec<usize>)> {
    list.iter().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect()
}

fn mlp(sizes: &[usize], seed: u64) -> Model {
    let layer = |(i, pair): (usize, &[usize])| {
        [(format!("fc{i}.weight"), vec![pair[1], pair[0]]), (format!("fc{i}.bias"), vec![pair[1]])]
    };
    drawn(&sizes.windows(2).enumerate().flat_map(layer).collect::<Vec<_>>(), seed)
}

fn mlp_spec(model: &Model) -> Spec {
    Spec::mlp(model, &Network::mlp(model).expect("an MLP").layers()).expect("a spec")
}

fn found(spec: &Spec, a: &Model, b: &dyn Weights, options: &MatchOptions) -> Matching {
    match_weights(gpu(), spec, a, b, options).unwrap_or_else(|e| panic!("{e}"))
}

/// Draws a random permutation of a model, which keeps heads together, by runs without sweeps from random starts.
fn planted(spec: &Spec, model: &Model, seed: u64) -> Permutation {
    let options = MatchOptions::default().seed(seed).runs(6).sweeps(0);
    let mut other = model.clone();
    // For a negated copy as the target, the identity is the worst permutation, so a random start is kept.
    other.values_mut().for_each(|x| *x = x.scale(-1.0));
    let permutation = found(spec, &other, model, &options).permutation;
    assert!(permutation.moved() > 0);
    permutation
}

/// Reads all tensors and adds noise with `noise` times each one's own deviation.
fn noisy(weights: &dyn Weights, noise: f32, seed: u64) -> Model {
    let mut rng = Rng::new(seed);
    let one = |name: String| {
        let x = weights.read(gpu(), &name).expect("a tensor");
        let deviation = x.sub(&x.mean_all()).square().mean_all().sqrt();
        let y = x.add(&Tensor::randn(gpu(), *x.shape(), &mut rng).mul(&deviation.scale(noise)));
        y.evaluate();
        (name, y)
    };
    weights.names().into_iter().map(one).collect()
}

/// Permutes a model, adds noise, and checks that matching finds the inverse.
fn recovers(spec: &Spec, model: &Model, noise: f32) {
    for seed in 0..3 {
        let planted = planted(spec, model, seed);
        let away = noisy(&planted.permuted(model), noise, seed);
        let matching = found(spec, model, &away, &MatchOptions::default().seed(seed));
        assert_eq!(matching.permutation, planted.inverse(), "noise {noise}, seed {seed}");
        assert!(
            matching.objective > matching.objective_before && matching.distance < matching.distance_before
        );
        assert!(matching.exact, "gap {}", matching.gap);
    }
}

fn most_apart(a: &Tensor, b: &Tensor) -> f64 {
    download(a).iter().zip(download(b)).fold(0.0, |most, (x, y)| most.max((x - y).abs()))
}

fn small_llama() -> LmConfig {
    LmConfig::default()
        .vocab(40)
        .width(48)
        .heads(6)
        .kv_heads(2)
        .hidden(56)
        .depth(2)
        .context(12)
        .rope_base(10000.0)
        .eps(1e-5)
        .pairing(Pairing::Halves)
}

fn llama(seed: u64) -> Model {
    let c = small_llama();
    let kv = c.width / c.heads * c.kv_heads;
    let mut all = shapes(&[
        ("model.embed_tokens.weight", &[c.vocab, c.width]),
        ("model.norm.weight", &[c.width]),
        ("lm_head.weight", &[c.vocab, c.width]),
    ]);
    for l in 0..c.depth {
        let parts: [(&str, &[usize]); 9] = [
            ("input_layernorm", &[c.width]),
            ("post_attention_layernorm", &[c.width]),
            ("self_attn.q_proj", &[c.width, c.width]),
            ("self_attn.k_proj", &[kv, c.width]),
            ("self_attn.v_proj", &[kv, c.width]),
            ("self_attn.o_proj", &[c.width, c.width]),
            ("mlp.gate_proj", &[c.hidden, c.width]),
            ("mlp.up_proj", &[c.hidden, c.width]),
            ("mlp.down_proj", &[c.width, c.hidden]),
        ];
        all.extend(
            parts.iter().map(|(part, shape)| (format!("model.layers.{l}.{part}.weight"), shape.to_vec())),
        );
    }
    drawn(&all, seed)
}

fn llama_logits(weights: &dyn Weights) -> Tensor {
    let model = Lm::from_weights(gpu(), weights, small_llama()).unwrap();
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % small_llama().vocab as u32).collect();
    model.forward(&Tensor::from_slice(gpu(), &tokens, [2, 10]))
}

#[test]
fn planted_permutations_of_an_mlp_are_found() {
    let model = mlp(&[20, 33, 48, 17, 10], 1);
    for noise in [0.0, 0.5] {
        recovers(&mlp_spec(&model), &model, noise);
    }
}

#[test]
fn planted_permutations_of_a_transformer_are_found_and_change_nothing() {
    let model = llama(2);
    let spec = Spec::llama(&model, small_llama().heads, small_llama().kv_heads).unwrap();
    for noise in [0.0, 0.5] {
        recovers(&spec, &model, noise);
    }
    let permutation = planted(&spec, &model, 9);
    let want = llama_logits(&model);
    let scale = download(&want).iter().fold(0.0f64, |most, x| most.max(x.abs()));
    let apart = most_apart(&want, &llama_logits(&permutation.permuted(&model)));
    assert!(apart <= 1e-5 * scale.max(1.0), "logits apart by {apart}, of {scale}");
}

type Change = dyn Fn(&mut BTreeMap<String, Vec<u32>>);

#[test]
fn permutation_files_apply_and_invert() {
    let model = llama(5);
    let spec = Spec::llama(&model, small_llama().heads, small_llama().kv_heads).unwrap();
    let permutation = planted(&spec, &model, 3);
    let folder = Folder::new("matching");
    let path = folder.join("file.safetensors");
    permutation.save(&path, &BTreeMap::from([("objective".to_string(), "1".to_string())])).unwrap();
    let read = Permutation::load(&path).unwrap();
    assert_eq!(read, permutation);
    assert_eq!(read.then(&read.inverse()).unwrap(), Permutation::identity(&spec, &model).unwrap());
    let (forth, back) = (noisy(&read.permuted(&model), 0.0, 0), read.inverse());
    let again = back.permuted(&forth);
    assert!(model.iter().any(|(name, x)| most_apart(x, &forth[name]) > 0.0));
    for (name, x) in &model {
        assert_eq!(most_apart(x, &again.read(gpu(), name).unwrap()), 0.0, "{name}");
    }
    // Other files, and invalid orders.
    save_tensors(&path, &model, &BTreeMap::new()).unwrap();
    assert!(Permutation::load(&path).unwrap_err().to_string().contains("no file of permutations"));
    let broken = |change: &Change| {
        let mut orders = permutation.orders().clone();
        change(&mut orders);
        Permutation::new(spec.clone(), orders).unwrap_err().to_string()
    };
    let faults: [(&str, &Change); 5] = [
        ("`ff0` is missing", &|orders| drop(orders.remove("ff0"))),
        ("`ff1` is no permutation", &|orders| orders.get_mut("ff1").unwrap()[0] = 99),
        ("`res` is no permutation", &|orders| orders.get_mut("res").unwrap()[0] = orders["res"].clone()[1]),
        ("`more` belongs to no group", &|orders| drop(orders.insert("more".into(), vec![0]))),
        ("`heads1` moves elements", &|orders| orders.get_mut("heads1.q").unwrap().swap(0, 1)),
    ];
    for (words, change) in faults {
        let message = broken(change);
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn what_was_not_proved_is_not_claimed() {
    let (a, b) = (mlp(&[6, 17, 13, 3], 1), mlp(&[6, 17, 13, 3], 2));
    let spec = mlp_spec(&a);
    let settled = found(&spec, &a, &b, &MatchOptions::default());
    assert!(settled.exact && settled.sweeps > 1);
    // A search that was ended early: the first group's proof is for the old permutation of its neighbour.
    let cut = found(&spec, &a, &b, &MatchOptions::default().sweeps(1).order(VisitOrder::Given));
    assert!(!cut.exact, "{cut:?}");
    // A permutation of another model is refused, even if only one tensor is missing.
    settled.permutation.check(&b).unwrap();
    let mut other = b.clone();
    let moved = other.remove("fc1.weight").expect("a tensor of the spec");
    let error = settled.permutation.check(&other).expect_err("a tensor is missing").to_string();
    assert!(error.contains("fc1.weight"), "{error}");
    other.insert("module.fc1.weight".into(), moved);
    assert!(settled.permutation.check(&other).is_err());
    // Parts of a permuted tensor equal those of the whole.
    let permuted = settled.permutation.permuted(&b);
    let whole = permuted.read(gpu(), "fc1.weight").unwrap().to_vec::<f32>().unwrap();
    for range in [0..5, 5..100, 100..whole.len(), 3..4] {
        let part = permuted.read_range(gpu(), "fc1.weight", range.clone()).unwrap();
        assert_eq!(part.to_vec::<f32>().unwrap(), whole[range]);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let a = mlp(&[4, 6, 5, 3], 1);
    let spec = mlp_spec(&a);
    let fails = |spec: &Spec, b: &Model, words: &[&str]| {
        let message =
            match_weights(gpu(), spec, &a, b, &MatchOptions::default()).expect_err(words[0]).to_string();
        words.iter().for_each(|word| assert!(message.contains(word), "{word}: {message}"));
    };
    let mut other = mlp(&[4, 7, 5, 3], 2);
    other.remove("fc2.bias");
    other.insert("extra".into(), Tensor::zeros(gpu(), [2]));
    let all = [
        "`fc0.weight` is [6, 4] in model 1 and [7, 4]",
        "`fc0.bias`",
        "`fc2.bias` is missing",
        "`extra` is in model 2",
    ];
    fails(&spec, &other, &all);
    let b = mlp(&[4, 6, 5, 3], 2);
    let text =
        |groups: &str, rest: &str| Spec::from_json(&format!("{{\"groups\": [{groups}]{rest}}}")).unwrap();
    let p0 = r#"{"name": "P0", "axes": [["fc0.weight", 0], ["fc0.bias", 0], ["fc1.weight", 1]]}"#;
    let fixed = r#", "fixed": ["fc1.bias", "fc2.*"]"#;
    let cases = [
        (text(p0, ""), "`fc1.bias` [5] is in no group"),
        (text(p0, r#", "fixed": ["fc*"]"#), "`fc0.bias` is in a group and in `fixed`"),
        (text(&p0.replace("fc0.bias", "fc9.bias"), fixed), "names a tensor `fc9.bias`"),
        (text(&p0.replace(r#"bias", 0"#, r#"bias", 2"#), fixed), "`fc0.bias` [6] has no axis 2"),
        (
            text(&p0.replace(r#"fc1.weight", 1"#, r#"fc1.weight", 0"#), fixed),
            "6 units by `fc0.weight` and 5 by axis 0",
        ),
        (text(&p0.replace(r#"fc1.weight", 1"#, r#"fc1.weight", 1, 4"#), fixed), "no multiple of repeat 4"),
        (text(&format!("{p0}, {p0}"), fixed), "two groups"),
        (text(&format!("{p0}, {}", p0.replace("P0", "P1")), fixed), "axis 0 of `fc0.weight` is named twice"),
        (text(&format!(r#"{p0}, {{"name": "P1", "axes": []}}"#), fixed), "group `P1` has no axis"),
    ];
    for (spec, words) in cases {
        fails(&spec, &b, &[words]);
    }
    let square: Model =
        shapes(&[("w", &[4, 4])]).iter().map(|(n, s)| (n.clone(), Tensor::ones(gpu(), &s[..]))).collect();
    let both = text(r#"{"name": "P", "axes": [["w", 0], ["w", 1]]}"#, "");
    let message =
        match_weights(gpu(), &both, &square, &square, &MatchOptions::default()).unwrap_err().to_string();
    assert!(message.contains("ties two axes of `w`"), "{message}");
    let heads = r#"{"name": "h", "heads": {"heads": 3, "kv_heads": 2, "q": [["w", 0]], "k": [["w", 0]], "v": [["w", 0]],
        "o": [["w", 1]]}}"#;
    let message =
        match_weights(gpu(), &text(heads, ""), &square, &square, &MatchOptions::default()).unwrap_err();
    assert!(message.to_string().contains("3 heads do not share 2"), "{message}");
    let start = Permutation::identity(&mlp_spec(&mlp(&[4, 6, 3], 1)), &mlp(&[4, 6, 3], 1)).unwrap();
    let options = MatchOptions::default().start(Some(start));
    let message = match_weights(gpu(), &spec, &a, &b, &options).unwrap_err().to_string();
    assert!(message.contains("belongs to another spec"), "{message}");
    for bad in [f32::NAN, f32::INFINITY] {
        let mut b = b.clone();
        let mut values = b["fc1.weight"].to_vec::<f32>().unwrap();
        values[8] = bad;
        b.insert("fc1.weight".into(), Tensor::from_slice(gpu(), &values, [5, 6]));
        fails(&spec, &b, &["tensor `fc1.weight` of the second model", "index [1, 2]"]);
    }
}

#[test]
fn norms_take_the_statistics_of_the_data() {
    let names = ["n.weight", "n.bias", "n.running_mean", "n.running_var"];
    let model: Model = names.iter().map(|name| (name.to_string(), Tensor::zeros(gpu(), [3]))).collect();
    let rows = [1.0f32, 2.0, 10.0, 3.0, 2.0, 14.0, 5.0, 2.0, 12.0];
    let x = Tensor::from_slice(gpu(), &rows, [3, 3]);
    let reset = reset_statistics(gpu(), &model, &["n"], &mut |_, _| Ok(x.clone())).unwrap();
    assert_eq!(reset["n.running_mean"].to_vec::<f32>().unwrap(), [3.0, 2.0, 12.0]);
    let variance = reset["n.running_var"].to_vec::<f32>().unwrap();
    assert!(
        variance.iter().zip([4.0, 0.0, 4.0]).all(|(got, want)| (got - want).abs() < 1e-5),
        "{variance:?}"
    );
    let one = x.slice(0, 0..1);
    assert!(reset_statistics(gpu(), &model, &["n"], &mut |_, _| Ok(one.clone())).is_err());
    assert!(reset_statistics(gpu(), &model, &["m"], &mut |_, _| Ok(x.clone())).is_err());
}

#[test]
fn costs_are_products_of_slices() {
    let [a, b] = [1, 2].map(|seed| mlp(&[3, 4, 2], seed));
    let spec = mlp_spec(&a);
    let costs = group_costs(gpu(), [&a, &b], &Permutation::identity(&spec, &b).unwrap(), "P0").unwrap();
    let (name, cost) = &costs.matrices[0];
    assert_eq!(name, "P0");
    let host = |model: &Model, name: &str| download(&model[name]);
    for i in 0..4 {
        for j in 0..4 {
            let rows: f64 =
                (0..3).map(|k| host(&a, "fc0.weight")[i * 3 + k] * host(&b, "fc0.weight")[j * 3 + k]).sum();
            let bias = host(&a, "fc0.bias")[i] * host(&b, "fc0.bias")[j];
            let columns: f64 =
                (0..2).map(|k| host(&a, "fc1.weight")[k * 4 + i] * host(&b, "fc1.weight")[k * 4 + j]).sum();
            let want = rows + bias + columns;
            assert!((f64::from(cost[i * 4 + j]) - want).abs() < 1e-5, "{i} {j}");
        }
    }
    assert!(group_costs(gpu(), [&a, &b], &Permutation::identity(&spec, &b).unwrap(), "P1").is_err());
}

#[test]
fn checkpoints_on_disk_are_matched_too() {
    let model = mlp(&[5, 8, 3], 4);
    let spec = mlp_spec(&model);
    let planted = planted(&spec, &model, 1);
    let folder = Folder::new("disk");
    let paths = ["a", "b"].map(|name| folder.join(name));
    save_tensors(&paths[0], &model, &BTreeMap::new()).unwrap();
    save_tensors(&paths[1], &noisy(&planted.permuted(&model), 0.0, 0), &BTreeMap::new()).unwrap();
    let [a, b] = paths.each_ref().map(|path| Shards::open(path).unwrap());
    let matching = match_weights(gpu(), &spec, &a, &b, &MatchOptions::default()).unwrap();
    assert_eq!(matching.permutation, planted.inverse());
    assert!(matching.distance < 1e-3 * matching.distance_before && matching.distance_ratio() > 0.999);
}

#[test]
fn activations_find_what_was_planted() {
    let model = mlp(&[16, 24, 20, 5], 8);
    let spec = mlp_spec(&model);
    let net = Network::mlp(&model).unwrap();
    let x = Tensor::randn(gpu(), [200, 16], &mut Rng::new(3));
    for similarity in [Similarity::InnerProduct, Similarity::Correlation] {
        let planted = planted(&spec, &model, 4);
        let away = noisy(&planted.permuted(&model), 0.1, 2);
        let mut matching = ActivationMatching::new(&spec, &model, &away, similarity).unwrap();
        for batch in [0..50, 50..200] {
            let x = x.slice(0, batch);
            let [a, b] = [&model, &away].map(|weights| net.activations(gpu(), weights, &x).unwrap());
            for (i, group) in ["P0", "P1"].iter().enumerate() {
                matching.add(group, &a[i], &b[i]).unwrap();
            }
        }
        let found = matching.solve().unwrap();
        assert_eq!(found.permutation, planted.inverse(), "{similarity:?}");
        assert_eq!(found.values.keys().collect::<Vec<_>>(), ["P0", "P1"]);
        // Every unit whose activation is not constant has a correlation of nearly 1 with itself.
        if similarity == Similarity::Correlation {
            assert!(found.values["P0"] > 0.9 * 24.0 && found.values["P0"] <= 24.01, "{:?}", found.values);
        }
        assert!(matching.add("P7", &x, &x).unwrap_err().to_string().contains("no group `P7`"));
        assert!(matching.add("P0", &x, &x).unwrap_err().to_string().contains("[rows, 24]"));
    }
}
