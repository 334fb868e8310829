//! Permutation matching: what was planted is found, permuted models compute the same, the objective only rises, bad input is named.

mod support;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use support::{download, gpu};
use tiebeam::merge::{
    ActivationMatching, Barrier, Checkpoint, Evaluation, Layer, LossPath, MatchOptions, Matching, Mean, Mlp,
    Permutation, Similarity, Spec, StraightThroughOptions, VisitOrder, Weights, group_costs, match_many,
    match_weights, match_weights_with, repair, reset_statistics, singular_alignment, straight_through,
};
use tiebeam::models::llama::{Config, Llama};
use tiebeam::ops::conv::Conv2d;
use tiebeam::ops::rope::Pairing;
use tiebeam::store::{File, FileDType, save_tensors};
use tiebeam::{Rng, Tensor};

type Model = BTreeMap<String, Tensor>;

/// Normal weights with these names and shapes; vectors are gains and biases around 1.
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
    Spec::mlp(model, &Mlp::of(model).expect("an MLP").layers()).expect("a spec")
}

fn found(spec: &Spec, a: &Model, b: &dyn Weights, options: &MatchOptions) -> Matching {
    match_weights(gpu(), spec, a, b, options).unwrap_or_else(|e| panic!("{e}"))
}

/// A random permutation of a model, heads as such, drawn by a run of no sweeps from a random start.
fn planted(spec: &Spec, model: &Model, seed: u64) -> Permutation {
    let options = MatchOptions { seed, runs: 6, sweeps: 0, ..MatchOptions::default() };
    let mut other = model.clone();
    // Towards a negative copy the identity is the worst, so that a random start is kept.
    other.values_mut().for_each(|x| *x = x.scale(-1.0));
    let permutation = found(spec, &other, model, &options).permutation;
    assert!(permutation.moved() > 0);
    permutation
}

/// The tensors read one by one, with `noise` of each one's own deviation added.
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

/// Permutes a model, adds noise, and asks for the way back.
fn recovers(spec: &Spec, model: &Model, noise: f32) {
    for seed in 0..3 {
        let planted = planted(spec, model, seed);
        let away = noisy(&planted.permuted(model), noise, seed);
        let matching = found(spec, model, &away, &MatchOptions { seed, ..MatchOptions::default() });
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

const LLAMA: Config = Config {
    vocab: 40,
    width: 48,
    heads: 6,
    kv_heads: 2,
    hidden: 56,
    layers: 2,
    context: 12,
    rope_base: 10000.0,
    eps: 1e-5,
    pairing: Pairing::Halves,
};

fn llama(seed: u64) -> Model {
    let c = LLAMA;
    let kv = c.width / c.heads * c.kv_heads;
    let mut all = shapes(&[
        ("model.embed_tokens.weight", &[c.vocab, c.width]),
        ("model.norm.weight", &[c.width]),
        ("lm_head.weight", &[c.vocab, c.width]),
    ]);
    for l in 0..c.layers {
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

/// A file that goes away.
struct Temporary(PathBuf);

impl Temporary {
    fn new(name: &str) -> Temporary {
        Temporary(
            std::env::temp_dir().join(format!("tiebeam-matching-{name}-{}.safetensors", std::process::id())),
        )
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn llama_logits(weights: &dyn Weights, name: &str) -> Tensor {
    let path = Temporary::new(name);
    let all: Model =
        weights.names().into_iter().map(|n| (n.clone(), weights.read(gpu(), &n).unwrap())).collect();
    save_tensors(&path.0, &all, &BTreeMap::new()).unwrap();
    let model = Llama::from_safetensors(gpu(), &File::open(&path.0).unwrap(), LLAMA).unwrap();
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % LLAMA.vocab as u32).collect();
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
    let spec = Spec::llama(&model, LLAMA.heads, LLAMA.kv_heads).unwrap();
    for noise in [0.0, 0.5] {
        recovers(&spec, &model, noise);
    }
    let permutation = planted(&spec, &model, 9);
    let want = llama_logits(&model, "plain");
    let scale = download(&want).iter().fold(0.0f64, |most, x| most.max(x.abs()));
    let apart = most_apart(&want, &llama_logits(&permutation.permuted(&model), "permuted"));
    assert!(apart <= 1e-5 * scale.max(1.0), "logits apart by {apart}, of {scale}");
}

/// conv - conv (depthwise) - pool - flatten - dense - dense: channels move as blocks behind the flatten.
#[test]
fn flattened_channels_move_as_blocks() {
    let model = drawn(
        &shapes(&[
            ("c0.weight", &[12, 2, 3, 3]),
            ("c0.bias", &[12]),
            ("n0.weight", &[12]),
            ("n0.bias", &[12]),
            ("n0.running_mean", &[12]),
            ("n0.running_var", &[12]),
            ("n0.num_batches_tracked", &[1]),
            ("depth.weight", &[12, 1, 3, 3]),
            ("c1.weight", &[9, 12, 3, 3]),
            ("f0.weight", &[15, 36]),
            ("f0.bias", &[15]),
            ("f1.weight", &[5, 15]),
        ]),
        3,
    );
    let layers = [
        Layer::normed("c0", "n0"),
        Layer::plain("depth"),
        Layer::plain("c1"),
        Layer::plain("f0"),
        Layer::plain("f1"),
    ];
    // The engine has no depthwise convolution: an equal full one has zeros elsewhere.
    let forward = |w: &dyn Weights, x: &Tensor| {
        let read = |name: &str| w.read(gpu(), name).unwrap();
        let same = Conv2d { padding: [1, 1], ..Conv2d::default() };
        let column = |name: &str| read(name).reshape([12, 1, 1]);
        let h = x.conv2d(&read("c0.weight"), Some(&read("c0.bias")), same).sub(&column("n0.running_mean"));
        let h =
            h.div(&column("n0.running_var").sqrt()).mul(&column("n0.weight")).add(&column("n0.bias")).relu();
        let eye: Vec<f32> = (0..144).map(|i| if i % 13 == 0 { 1.0 } else { 0.0 }).collect();
        let full = read("depth.weight").mul(&Tensor::from_slice(gpu(), &eye, [12, 12, 1, 1]));
        let h = h.conv2d(&full, None, same).relu().conv2d(&read("c1.weight"), None, same).relu();
        let h = h.max_pool2d([2, 2], [2, 2], [0, 0]).reshape([x.shape()[0], 36]);
        let h = h.matmul(&read("f0.weight").t()).add(&read("f0.bias")).relu();
        h.matmul(&read("f1.weight").t())
    };
    let mut model = model;
    let positive = model["n0.running_var"].square().affine(1.0, 0.5);
    model.insert("n0.running_var".into(), positive);
    let spec = Spec::cnn(&model, &layers).unwrap();
    recovers(&spec, &model, 0.3);
    let x = Tensor::randn(gpu(), [3, 2, 4, 4], &mut Rng::new(4));
    let permuted = planted(&spec, &model, 1);
    let apart = most_apart(&forward(&model, &x), &forward(&permuted.permuted(&model), &x));
    assert!(apart <= 1e-5, "{apart}");
}

/// Two stages with a projection between them and a bottleneck block, in the names of torchvision.
#[test]
fn residual_networks_by_their_names() {
    let norm = |name: &str, n: usize| -> Vec<(String, Vec<usize>)> {
        ["weight", "bias", "running_mean", "running_var"]
            .iter()
            .map(|part| (format!("{name}.{part}"), vec![n]))
            .collect()
    };
    let mut all = shapes(&[
        ("conv1.weight", &[8, 3, 3, 3]),
        ("layer1.0.conv1.weight", &[6, 8, 3, 3]),
        ("layer1.0.conv2.weight", &[8, 6, 3, 3]),
        ("layer2.0.conv1.weight", &[5, 8, 1, 1]),
        ("layer2.0.conv2.weight", &[7, 5, 3, 3]),
        ("layer2.0.conv3.weight", &[11, 7, 1, 1]),
        ("layer2.0.downsample.0.weight", &[11, 8, 1, 1]),
        ("fc.weight", &[4, 11]),
        ("fc.bias", &[4]),
    ]);
    for (name, n) in [
        ("bn1", 8),
        ("layer1.0.bn1", 6),
        ("layer1.0.bn2", 8),
        ("layer2.0.bn1", 5),
        ("layer2.0.bn2", 7),
        ("layer2.0.bn3", 11),
        ("layer2.0.downsample.1", 11),
    ] {
        all.extend(norm(name, n));
    }
    let model = drawn(&all, 6);
    let spec = Spec::resnet(&model).unwrap();
    let names: Vec<&str> = spec.groups.iter().map(|group| group.name.as_str()).collect();
    assert_eq!(names, ["stem", "layer1.0.inner1", "layer2.0.inner1", "layer2.0.inner2", "layer2.0.stream"]);
    recovers(&spec, &model, 0.2);
    let forward = |w: &dyn Weights, x: &Tensor| {
        let read = |name: &str| w.read(gpu(), &format!("{name}.weight")).unwrap();
        let norm = |x: &Tensor, name: &str| {
            let part =
                |part: &str| w.read(gpu(), &format!("{name}.{part}")).unwrap().unsqueeze(1).unsqueeze(2);
            let x = x.sub(&part("running_mean")).div(&part("running_var").square().affine(1.0, 1.0));
            x.mul(&part("weight")).add(&part("bias"))
        };
        let conv = |x: &Tensor, name: &str| {
            let weight = read(name);
            let padding = [weight.shape()[2] / 2; 2];
            x.conv2d(&weight, None, Conv2d { padding, ..Conv2d::default() })
        };
        let x = norm(&conv(x, "conv1"), "bn1").relu();
        let h = norm(&conv(&x, "layer1.0.conv1"), "layer1.0.bn1").relu();
        let x = x.add(&norm(&conv(&h, "layer1.0.conv2"), "layer1.0.bn2")).relu();
        let h = norm(&conv(&x, "layer2.0.conv1"), "layer2.0.bn1").relu();
        let h = norm(&conv(&h, "layer2.0.conv2"), "layer2.0.bn2").relu();
        let h = norm(&conv(&h, "layer2.0.conv3"), "layer2.0.bn3");
        let x = norm(&conv(&x, "layer2.0.downsample.0"), "layer2.0.downsample.1").add(&h).relu();
        x.global_avg_pool2d().matmul(&read("fc").t())
    };
    let x = Tensor::randn(gpu(), [2, 3, 5, 5], &mut Rng::new(4));
    let want = forward(&model, &x);
    let scale = download(&want).iter().fold(1.0f64, |most, x| most.max(x.abs()));
    let apart = most_apart(&want, &forward(&planted(&spec, &model, 1).permuted(&model), &x));
    assert!(apart <= 1e-5 * scale, "{apart} of {scale}");
}

/// Two trained networks of the reference vectors, with data; see `tests/vectors/matching/README.md`.
fn trained(file: &str, prefix: &str) -> Model {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/matching").join(file);
    let file = File::open(path).unwrap();
    let own = |full: &str| Some((full.strip_prefix(prefix)?.to_string(), full.to_string()));
    let floats: Vec<_> =
        file.names().filter(|n| file.info(n).unwrap().dtype == FileDType::F32).filter_map(own).collect();
    let read = |(name, full): (String, String)| {
        let shape = &file.info(&full).unwrap().shape;
        (name, Tensor::from_slice(gpu(), &file.tensor_f32(&full).unwrap(), &shape[..]))
    };
    floats.into_iter().map(read).collect()
}

fn digits() -> (Tensor, Vec<u32>) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/matching/wm_mlp.safetensors");
    let file = File::open(path).unwrap();
    let shape = &file.info("x").unwrap().shape;
    (Tensor::from_slice(gpu(), &file.tensor_f32("x").unwrap(), &shape[..]), file.tensor_u32("y").unwrap())
}

#[test]
fn the_objective_only_rises_and_the_end_is_a_fixed_point() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let spec = mlp_spec(&a);
    let mut last = f64::NEG_INFINITY;
    let mut whole = None;
    for stop in 0.. {
        let mut seen = 0;
        let matching = match_weights_with(gpu(), &spec, &a, &b, &MatchOptions::default(), &mut |_| {
            seen += 1;
            if seen > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        assert!(matching.objective >= last * (1.0 - 1e-7), "{} after {last}", matching.objective);
        last = matching.objective;
        let done = seen <= stop;
        whole = Some(matching);
        if done {
            break;
        }
    }
    let whole = whole.expect("the loop ran");
    assert!(whole.visits.last().is_some_and(|visit| !visit.accepted));
    let again = MatchOptions { start: Some(whole.permutation.clone()), ..MatchOptions::default() };
    let next = found(&spec, &a, &b, &again);
    assert_eq!(next.permutation, whole.permutation);
    assert_eq!(next.sweeps, 1);
    // Matching what was matched moves nothing.
    let moved: Model = noisy(&whole.permuted(&b), 0.0, 0);
    assert_eq!(found(&spec, &a, &moved, &MatchOptions::default()).permutation.moved(), 0);
    // Twice the same settings, twice the same result, whatever stays on the device.
    let small = MatchOptions { cache_bytes: 0, ..MatchOptions::default() };
    let twice = found(&spec, &a, &b, &small);
    assert_eq!((twice.permutation, twice.objective), (whole.permutation, whole.objective));
}

#[test]
fn orders_seeds_and_runs() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let spec = mlp_spec(&a);
    let one = |options: MatchOptions| found(&spec, &a, &b, &options);
    let given = one(MatchOptions { order: VisitOrder::Given, ..MatchOptions::default() });
    let groups: Vec<&str> = given.visits.iter().map(|visit| visit.group.as_str()).collect();
    assert!(groups.chunks(2).all(|pair| pair == ["P0", "P1"]), "{groups:?}");
    let first = one(MatchOptions::default());
    let many = one(MatchOptions { runs: 8, ..MatchOptions::default() });
    assert!(many.objective >= first.objective);
    let orders: std::collections::BTreeSet<Vec<String>> = (0..8)
        .map(|seed| one(MatchOptions { seed, ..MatchOptions::default() }))
        .map(|m| m.visits.iter().take(2).map(|visit| visit.group.clone()).collect())
        .collect();
    assert_eq!(orders.len(), 2, "eight seeds begin with either group");
    assert!(
        match_weights(gpu(), &spec, &a, &b, &MatchOptions { runs: 0, ..MatchOptions::default() }).is_err()
    );
}

#[test]
fn permutation_files_apply_and_invert() {
    let model = llama(5);
    let spec = Spec::llama(&model, LLAMA.heads, LLAMA.kv_heads).unwrap();
    let permutation = planted(&spec, &model, 3);
    let path = Temporary::new("file");
    permutation.save(&path.0, &BTreeMap::from([("objective".to_string(), "1".to_string())])).unwrap();
    let read = Permutation::load(&path.0).unwrap();
    assert_eq!(read, permutation);
    assert_eq!(read.then(&read.inverse()).unwrap(), Permutation::identity(&spec, &model).unwrap());
    let (forth, back) = (noisy(&read.permuted(&model), 0.0, 0), read.inverse());
    let again = back.permuted(&forth);
    assert!(model.iter().any(|(name, x)| most_apart(x, &forth[name]) > 0.0));
    for (name, x) in &model {
        assert_eq!(most_apart(x, &again.read(gpu(), name).unwrap()), 0.0, "{name}");
    }
    // Files that are something else, and orders that are none.
    save_tensors(&path.0, &model, &BTreeMap::new()).unwrap();
    assert!(Permutation::load(&path.0).unwrap_err().to_string().contains("no file of permutations"));
    let broken = |change: &dyn Fn(&mut BTreeMap<String, Vec<u32>>)| {
        let mut orders = permutation.orders().clone();
        change(&mut orders);
        Permutation::new(spec.clone(), orders).unwrap_err().to_string()
    };
    let faults: [(&str, &dyn Fn(&mut BTreeMap<String, Vec<u32>>)); 5] = [
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
    for bad in [f32::NAN, f32::INFINITY] {
        let mut b = b.clone();
        let mut values = b["fc1.weight"].to_vec::<f32>().unwrap();
        values[8] = bad;
        b.insert("fc1.weight".into(), Tensor::from_slice(gpu(), &values, [5, 6]));
        fails(&spec, &b, &["tensor `fc1.weight` of the second model", "index [1, 2]"]);
    }
}

#[test]
fn activations_find_what_was_planted() {
    let model = mlp(&[16, 24, 20, 5], 8);
    let spec = mlp_spec(&model);
    let net = Mlp::of(&model).unwrap();
    let x = Tensor::randn(gpu(), [200, 16], &mut Rng::new(3));
    for similarity in [Similarity::InnerProduct, Similarity::Correlation] {
        let planted = planted(&spec, &model, 4);
        let away = noisy(&planted.permuted(&model), 0.1, 2);
        let mut matching = ActivationMatching::new(&spec, &model, &away, similarity).unwrap();
        for batch in [0..50, 50..200] {
            let x = x.slice(0, batch);
            let [a, b] = [&model, &away].map(|weights| net.outputs(gpu(), weights, &x).unwrap());
            for (i, group) in ["P0", "P1"].iter().enumerate() {
                matching.add(group, &a[i], &b[i]).unwrap();
            }
        }
        let found = matching.solve().unwrap();
        assert_eq!(found.permutation, planted.inverse(), "{similarity:?}");
        assert_eq!(found.values.keys().collect::<Vec<_>>(), ["P0", "P1"]);
        // Every unit that answers at all correlates with itself by nearly 1.
        if similarity == Similarity::Correlation {
            assert!(found.values["P0"] > 0.9 * 24.0 && found.values["P0"] <= 24.01, "{:?}", found.values);
        }
        assert!(matching.add("P7", &x, &x).unwrap_err().to_string().contains("no group `P7`"));
        assert!(matching.add("P0", &x, &x).unwrap_err().to_string().contains("[rows, 24]"));
    }
}

fn evaluate(weights: &dyn Weights) -> tiebeam::Result<Evaluation> {
    let (x, y) = digits();
    Evaluation::of(&Mlp::of(weights)?.logits(gpu(), weights, &x)?, &y)
}

#[test]
fn barriers_fall_by_matching_and_singular_vectors_turn() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let spec = mlp_spec(&a);
    let matching = found(&spec, &a, &b, &MatchOptions::default());
    let permuted = matching.permuted(&b);
    let [naive, matched] =
        [&b as &dyn Weights, &permuted].map(|end| LossPath::between(&a, end, 11, evaluate).unwrap());
    let [n, m] = [&naive, &matched].map(|path| Barrier::of(&path.losses()));
    assert!(m.above_mean < 0.3 * n.above_mean && m.above_line <= n.above_line, "{n:?} {m:?}");
    let tempered = Barrier::of(&naive.tempered_losses());
    assert!(tempered.above_mean < n.above_mean, "{tempered:?} {n:?}");
    assert!(naive.points.iter().all(|point| point.tempered_loss <= point.loss + 1e-9));
    assert!((naive.points[0].loss - matched.points[0].loss).abs() < 1e-6);
    assert!(
        (naive.points[10].loss - matched.points[10].loss).abs() < 1e-5,
        "a permuted model is the same model"
    );
    let tensors = ["fc0.weight", "fc1.weight", "fc2.weight"];
    let r = |end: &dyn Weights| singular_alignment(gpu(), [&a, end], &tensors, 0.3).unwrap();
    assert!((r(&a) - 1.0).abs() < 1e-5);
    let [before, after] = [r(&b), r(&permuted)];
    assert!(before.abs() < 0.2 && after > before + 0.1, "{before} {after}");
    assert!(singular_alignment(gpu(), [&a, &b], &tensors, 1.5).is_err());
}

#[test]
fn straight_through_is_no_worse_at_the_midpoint() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let spec = mlp_spec(&a);
    let (x, y) = digits();
    let targets = Tensor::from_slice(gpu(), &y, [y.len()]);
    let options = StraightThroughOptions { steps: 12, ..StraightThroughOptions::default() };
    let found = straight_through(gpu(), &spec, &a, &b, &options, &mut |weights, _| {
        let mut h = x.clone();
        for layer in ["fc0", "fc1", "fc2"] {
            h = h.matmul(&weights[&format!("{layer}.weight")].t()).add(&weights[&format!("{layer}.bias")]);
            h = if layer == "fc2" { h } else { h.relu() };
        }
        Ok(h.cross_entropy(&targets, None))
    })
    .unwrap();
    // The first step is weight matching itself.
    assert!(found.losses.len() == 12 && found.losses[found.best] <= found.losses[0]);
    let middle = found.permutation.permuted(&b);
    let loss = evaluate(&Mean(vec![&a, &middle])).unwrap().loss;
    assert!((loss - found.losses[found.best]).abs() < 1e-4, "{loss} {:?}", found.losses);
    // The copy that is trained is a copy.
    assert_eq!(most_apart(&a["fc0.weight"], &trained("wm_mlp.safetensors", "a.")["fc0.weight"]), 0.0);
}

#[test]
fn many_models_meet() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let c = trained("wm_mlp3.safetensors", "c.");
    let spec = mlp_spec(&a);
    let models: [&dyn Weights; 3] = [&a, &b, &c];
    let many = match_many(gpu(), &spec, &models, &MatchOptions::default()).unwrap();
    assert_eq!(many.permutations[0].moved(), 0);
    assert!(many.objective[1] > 2.0 * many.objective[0].abs(), "{:?}", many.objective);
    let placed: Vec<_> = many.permutations.iter().zip(models).map(|(p, model)| p.permuted(model)).collect();
    let [naive, merged] = [
        evaluate(&Mean(models.to_vec())).unwrap(),
        evaluate(&Mean(placed.iter().map(|p| p as &dyn Weights).collect())).unwrap(),
    ];
    assert!(merged.loss < 0.3 * naive.loss && merged.accuracy > naive.accuracy + 0.3, "{naive:?} {merged:?}");
    // Planted copies of one model come together exactly.
    let away = planted(&spec, &a, 2);
    let copies: [&dyn Weights; 3] = [&a, &away.permuted(&a), &a];
    let many = match_many(gpu(), &spec, &copies, &MatchOptions::default()).unwrap();
    assert_eq!(many.permutations[1], away.inverse());
    assert!(match_many(gpu(), &spec, &models[..1], &MatchOptions::default()).is_err());
}

/// Outputs of a layer before its ReLU.
fn before_relu(weights: &dyn Weights, layer: &str, x: &Tensor) -> Tensor {
    let mut h = x.clone();
    for name in ["fc0", "fc1", "fc2"] {
        let read = |part: &str| weights.read(gpu(), &format!("{name}.{part}")).unwrap();
        h = h.matmul(&read("weight").t()).add(&read("bias"));
        if name == layer {
            break;
        }
        h = h.relu();
    }
    h
}

#[test]
fn repair_restores_means_and_deviations() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let spec = mlp_spec(&a);
    let matching = found(&spec, &a, &b, &MatchOptions::default());
    let permuted = matching.permuted(&b);
    let merged = noisy(&Mean(vec![&a, &permuted]), 0.0, 0);
    let x = digits().0;
    let layers = ["fc0", "fc1"];
    let repaired =
        repair(gpu(), [&a, &permuted], 0.5, &merged, &layers, &mut |w, layer| Ok(before_relu(w, layer, &x)))
            .unwrap();
    for layer in layers {
        let moments = |w: &dyn Weights| {
            let h = before_relu(w, layer, &x);
            let deviation = h.sub(&h.mean(0)).square().mean(0).sqrt();
            [download(&h.mean(0)), download(&deviation)]
        };
        let [of_a, of_b, got] = [moments(&a), moments(&permuted), moments(&repaired)];
        for part in 0..2 {
            for (i, got) in got[part].iter().enumerate() {
                let want = (of_a[part][i] + of_b[part][i]) / 2.0;
                assert!((got - want).abs() < 1e-4 * (1.0 + want.abs()), "{layer} {part} {i}: {got} {want}");
            }
        }
    }
    let [plain, better] = [&merged, &repaired].map(|w| evaluate(w).unwrap().loss);
    assert!(better < plain, "{better} {plain}");
    let message =
        repair(gpu(), [&a, &b], 0.5, &merged, &["fc9"], &mut |_, _| Ok(x.clone())).unwrap_err().to_string();
    assert!(message.contains("`fc9.weight`"), "{message}");
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
    let paths = ["a", "b"].map(|name| Temporary::new(&format!("disk-{name}")));
    save_tensors(&paths[0].0, &model, &BTreeMap::new()).unwrap();
    save_tensors(&paths[1].0, &noisy(&planted.permuted(&model), 0.0, 0), &BTreeMap::new()).unwrap();
    let [a, b] = paths.each_ref().map(|path| Checkpoint::open(&path.0).unwrap());
    let matching = match_weights(gpu(), &spec, &a, &b, &MatchOptions::default()).unwrap();
    assert_eq!(matching.permutation, planted.inverse());
    assert!(matching.distance < 1e-3 * matching.distance_before && matching.distance_ratio() > 0.999);
}
