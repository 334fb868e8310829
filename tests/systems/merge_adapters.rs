//! Adapters as models of a merge: on a model, with each other, extracted, and kept so that each can be rebuilt.

use crate::merges::{Folder, values};
use crate::support::{download, gpu, within};
use std::collections::BTreeMap;
use tiebeam::Tensor;
use tiebeam::merge::extract::{extract, truncated};
use tiebeam::merge::{Job, MergeConfig, REVERSIBLE, ReversibleModels, Shards, Weights};
use tiebeam::models::adapter::{Lora, Pair, SETTINGS, WEIGHTS, write_lora};
use tiebeam::store::{File, save_tensors};
use tiebeam::{Error, Result, Rng};

type Named = BTreeMap<String, Tensor>;

fn normal(shape: &[usize], rng: &mut Rng) -> Tensor {
    Tensor::randn(gpu(), shape, rng).contiguous()
}

const LAYERS: [(&str, [usize; 2]); 3] = [
    ("model.layers.0.self_attn.q_proj", [10, 12]),
    ("model.layers.1.mlp.down_proj", [12, 30]),
    ("model.layers.1.self_attn.v_proj", [4, 12]),
];

/// A model `base`, and adapters `a` and `b` of it, in a folder. Returns the model and the adapters' factors.
fn made(folder: &Folder, rng: &mut Rng) -> (Named, [Vec<Pair>; 2]) {
    let mut base: Named =
        LAYERS.map(|(name, size)| (format!("{name}.weight"), normal(&size, rng))).into_iter().collect();
    base.insert("model.norm.weight".into(), normal(&[12], rng));
    std::fs::create_dir_all(folder.0.join("base")).unwrap();
    save_tensors(folder.0.join("base/model.safetensors"), &base, &BTreeMap::new()).unwrap();
    folder.write("base/config.json", r#"{"num_hidden_layers": 2}"#);
    let fingerprint = Shards::open(folder.0.join("base")).unwrap().fingerprint().unwrap();
    let adapters = ["a", "b"].map(|name| {
        let pairs: Vec<Pair> = LAYERS
            .iter()
            .map(|(layer, [out, inner])| {
                (format!("{layer}.weight"), normal(&[3, *inner], rng), normal(&[*out, 3], rng))
            })
            .collect();
        std::fs::create_dir_all(folder.0.join(name)).unwrap();
        write_lora(&folder.0.join(name), &pairs, 3, ("base", Some(fingerprint))).unwrap();
        pairs
    });
    (base, adapters)
}

/// `W + B A` in f64.
fn applied(base: &Named, pairs: &[Pair], scale: f64) -> BTreeMap<String, Vec<f64>> {
    let mut all: BTreeMap<String, Vec<f64>> = base.iter().map(|(n, x)| (n.clone(), download(x))).collect();
    for (name, a, b) in pairs {
        let [out, rank, inner] = [b.shape()[0], a.shape()[0], a.shape()[1]];
        let [a, b] = [a, b].map(download);
        let w = all.get_mut(name).unwrap();
        for i in 0..out {
            for j in 0..inner {
                w[i * inner + j] +=
                    scale * (0..rank).map(|k| b[i * rank + k] * a[k * inner + j]).sum::<f64>();
            }
        }
    }
    all
}

fn check(merged: &Shards, want: &BTreeMap<String, Vec<f64>>) {
    for (name, want) in want {
        let got: Vec<f64> = values(merged, name).into_iter().map(f64::from).collect();
        within(name, &got, want, |_| 3e-6);
    }
}

#[test]
fn a_model_with_an_adapter_is_a_model() {
    let mut rng = Rng::new(1);
    let folder = Folder::new("adapter-on");
    let (base, [a, b]) = made(&folder, &mut rng);
    let [of_a, of_b] = [&a, &b].map(|pairs| applied(&base, pairs, 1.0));
    let passed = "merge_method: passthrough\nmodels: [{model: base+a}]";
    check(&folder.merge(passed).unwrap(), &of_a);
    // In parts that begin and end within rows.
    check(&folder.merge_in_parts("parts", passed, 5 << 30, 50).unwrap(), &of_a);
    let mixed = "merge_method: linear\nmodels: [{model: base+a, parameters: {weight: 1}}, {model: base+b, parameters: {weight: 3}}]";
    let want: BTreeMap<String, Vec<f64>> = of_a
        .iter()
        .map(|(n, x)| (n.clone(), x.iter().zip(&of_b[n]).map(|(x, y)| (x + 3.0 * y) / 4.0).collect()))
        .collect();
    check(&folder.merge(mixed).unwrap(), &want);
    // Task vectors of adapters are their changes.
    let tasks = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: base+a, parameters: {weight: 0.5}}]";
    check(&folder.merge(tasks).unwrap(), &applied(&base, &a, 0.5));
    assert!(folder.contents("out").contains_key("config.json"), "the settings are the base's");
    // Alphas and ranks of single layers, the square root of rsLoRA, and names without `model.`.
    let text = std::fs::read_to_string(folder.0.join("a").join(SETTINGS)).unwrap();
    let settings = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        change(&mut json);
        folder.write(&format!("a/{SETTINGS}"), &json.to_string());
        folder.merge(passed)
    };
    check(&settings(&|json| json["lora_alpha"] = 6.into()).unwrap(), &applied(&base, &a, 2.0));
    let root = settings(&|json| json["use_rslora"] = true.into()).unwrap();
    check(&root, &applied(&base, &a, 3f64.sqrt()));
    let own = settings(&|json| json["alpha_pattern"] = serde_json::json!({"q_proj": 12})).unwrap();
    let mut want = applied(&base, &a, 1.0);
    want.insert(a[0].0.clone(), applied(&base, &a[..1], 4.0)[&a[0].0].clone());
    check(&own, &want);
    // What is not computed is refused, and so is the adapter of another model.
    let refused = |result: Result<Shards>, words: &str| {
        let message = result.map(drop).expect_err(words).to_string();
        assert!(message.contains(words), "{message}");
    };
    refused(settings(&|json| json["use_dora"] = true.into()), "`use_dora` is true, which is not computed");
    refused(settings(&|json| json["peft_type"] = "MISS".into()), "only LoRA is added to weights by name");
    settings(&|_| ()).unwrap();
    let mut other = base.clone();
    other.insert("model.norm.weight".into(), normal(&[12], &mut rng));
    std::fs::create_dir_all(folder.0.join("other")).unwrap();
    save_tensors(folder.0.join("other/model.safetensors"), &other, &BTreeMap::new()).unwrap();
    refused(
        folder.merge("merge_method: passthrough\nmodels: [{model: other+a}]"),
        "this adapter was trained on the weights of base",
    );
    other.insert(LAYERS[2].0.to_string() + ".weight", normal(&[5, 12], &mut rng));
    save_tensors(folder.0.join("other/model.safetensors"), &other, &BTreeMap::new()).unwrap();
    refused(
        folder.merge("merge_method: passthrough\nmodels: [{model: other+a}]"),
        "is [4, 12], and the model has [5, 12]; it is of another model",
    );
    other.remove(&(LAYERS[2].0.to_string() + ".weight"));
    save_tensors(folder.0.join("other/model.safetensors"), &other, &BTreeMap::new()).unwrap();
    refused(
        folder.merge("merge_method: passthrough\nmodels: [{model: other+a}]"),
        "which the model does not have",
    );
}

#[test]
fn adapters_are_merged_with_each_other() {
    let mut rng = Rng::new(2);
    let folder = Folder::new("adapters");
    let (_, [a, b]) = made(&folder, &mut rng);
    let text = "merge_method: metrics_weighted\nmodels: [{model: a, parameters: {loss: 1}}, {model: b, parameters: {loss: 3}}]";
    let job = |text: &str| Job::open(MergeConfig::from_yaml(text, &folder.0)?);
    let own = job(text).unwrap();
    assert!(own.notes.iter().any(|note| note.contains("factor by factor")), "{:?}", own.notes);
    own.run(gpu(), &own.sources(), &folder.0.join("out"), 5 << 30, text, &mut |_| Ok(())).unwrap();
    own.check_written(&folder.0.join("out")).unwrap();
    // The output is an adapter, of the same base.
    let names: Vec<String> = folder.contents("out").into_keys().collect();
    assert!(names.iter().any(|n| n == SETTINGS) && names.iter().any(|n| n == WEIGHTS), "{names:?}");
    let file = File::open(folder.0.join("out").join(WEIGHTS)).unwrap();
    assert_eq!(file.metadata()["tiebeam.base_name"], "base");
    for ((name, a, b), (_, c, d)) in a.iter().zip(&b) {
        let path = format!("base_model.model.{}", name.trim_end_matches(".weight"));
        for (part, x, y) in [("A", a, c), ("B", b, d)] {
            let got = file.tensor_f32(&format!("{path}.lora_{part}.weight")).unwrap();
            let want: Vec<f64> =
                download(x).iter().zip(download(y)).map(|(x, y)| 0.75 * x + 0.25 * y).collect();
            within(name, &got.into_iter().map(f64::from).collect::<Vec<f64>>(), &want, |_| 1e-6);
        }
    }
    assert!(Lora::open(folder.0.join("out")).is_ok());
    // Adapters of other bases, of other settings, and beside models do not go together.
    let refused = |text: &str, words: &str| {
        let message = job(text).and_then(|job| job.check()).expect_err(words).to_string();
        assert!(message.contains(words), "{message}");
        message
    };
    let both = "merge_method: average\nmodels: [{model: a}, {model: b}]";
    let mixed = refused("merge_method: average\nmodels: [{model: a}, {model: base}]", "is an adapter and");
    assert!(mixed.contains("/base+") && mixed.lines().count() == 2, "{mixed}");
    let settings = std::fs::read_to_string(folder.0.join("b").join(SETTINGS)).unwrap();
    folder.write(&format!("b/{SETTINGS}"), &settings.replace("\"lora_alpha\": 3", "\"lora_alpha\": 6"));
    refused(both, "`lora_alpha` is 6 in");
    folder.write(&format!("b/{SETTINGS}"), &settings);
    write_lora(&folder.0.join("b"), &b, 3, ("elsewhere", Some(7))).unwrap();
    refused(both, "is an adapter of elsewhere, and");
    write_lora(&folder.0.join("b"), &b, 3, ("elsewhere", None)).unwrap();
    refused(both, "is an adapter of elsewhere, and");
}

#[test]
fn changes_are_extracted_as_well_as_can_be() {
    let mut rng = Rng::new(3);
    for (out, inner, rank) in [(20, 31, 5), (31, 20, 5), (9, 40, 40), (40, 1, 2), (64, 64, 8)] {
        // A spectrum that falls slowly, so that the iteration has something to do.
        let x = normal(&[out, inner], &mut rng);
        let found = truncated(&x, rank, 1).unwrap();
        let values: Vec<f64> = download(&x);
        let svd = tiebeam::linalg::singular_values(&values, out, inner);
        let rank = rank.min(out).min(inner);
        within("values", &found.values, &svd.values[..rank], |i| 2e-3 * svd.values[i]);
        let whole: f64 = values.iter().map(|v| v * v).sum();
        let best = svd.values[..rank].iter().map(|s| s * s).sum::<f64>() / whole;
        assert!((found.kept - best).abs() < 2e-3 && found.kept <= 1.0, "{} {best}", found.kept);
        let error: f64 =
            download(&x.sub(&found.b.matmul(&found.a))).iter().map(|v| v * v).sum::<f64>() / whole;
        assert!(error <= (1.0 - best) + 2e-3, "{out} {inner} {rank}: {error} of {}", 1.0 - best);
        // The factors share the values, and the same seed gives the same bits.
        let again = truncated(&x, rank, 1).unwrap();
        assert_eq!(download(&again.a), download(&found.a));
        let [a, b] = [&found.a, &found.b].map(|x| download(x).iter().map(|v| v * v).sum::<f64>());
        assert!((a / b - 1.0).abs() < 1e-3, "{a} {b}");
    }
    let nothing = truncated(&Tensor::zeros(gpu(), [3, 4]), 2, 0).unwrap();
    assert_eq!((nothing.kept, nothing.a.shape()[..].to_vec()), (1.0, vec![2, 4]));
    assert!(truncated(&Tensor::full(gpu(), [2, 2], f32::NAN), 1, 0).is_err());
    // A model with an adapter on it gives the adapter back, and what did not change is left out.
    let folder = Folder::new("extract");
    let (base, [a, _]) = made(&folder, &mut rng);
    let shards = folder.merge("merge_method: passthrough\nmodels: [{model: base+a}]").unwrap();
    let found =
        extract(gpu(), &base, &shards, &|name| !name.contains("v_proj"), 3, &mut |_, _| Ok(())).unwrap();
    assert_eq!(found.len(), 2, "q and down changed and were taken");
    let pairs: Vec<Pair> = found.iter().map(|one| one.pair.clone()).collect();
    assert!(found.iter().all(|one| one.kept > 0.99999), "{found:?}");
    let [got, want] = [applied(&base, &pairs, 1.0), applied(&base, &a[..2], 1.0)];
    for (name, want) in &want {
        within(name, &got[name], want, |_| 1e-5);
    }
    std::fs::create_dir_all(folder.0.join("again")).unwrap();
    write_lora(&folder.0.join("again"), &pairs, 3, ("base", None)).unwrap();
    let again = folder.merge("merge_method: passthrough\nmodels: [{model: base+again}]").unwrap();
    check(&again, &applied(&base, &a[..2], 1.0));
    let stopped = extract(gpu(), &base, &shards, &|_| true, 3, &mut |_, _| Err(Error::stopped("stopped")));
    assert!(stopped.is_err());
}

/// What is passed through keeps its bits, and the sum of a matrix and an adapter is no copy.
#[test]
fn adapters_that_are_no_numbers_are_refused() {
    let mut rng = Rng::new(5);
    let folder = Folder::new("nan-adapter");
    let (_, [mut pairs, _]) = made(&folder, &mut rng);
    pairs[1].1 = pairs[1].1.affine(0.0, f32::NAN).contiguous();
    write_lora(&folder.0.join("a"), &pairs, 3, ("base", None)).unwrap();
    let message =
        folder.merge("merge_method: passthrough\nmodels: [{model: base+a}]").unwrap_err().to_string();
    assert!(
        message.contains(&format!("{}.weight", LAYERS[1].0)) && message.contains("NaN or infinity"),
        "{message}"
    );
}

/// With as many vectors as models every adapter comes back, where the factors' mean is neither of them.
#[test]
fn reversible_merges_are_kept_and_rebuilt() {
    let mut rng = Rng::new(4);
    let folder = Folder::new("reversible");
    made(&folder, &mut rng);
    let text = |p: usize| {
        format!("merge_method: rmm\nmodels: [{{model: a}}, {{model: b}}]\nparameters: {{basis: {p}}}")
    };
    let job = |text: &str| Job::open(MergeConfig::from_yaml(text, &folder.0)?);
    let rebuilt = |p: usize| {
        let own = job(&text(p)).unwrap();
        let models = own.reversible(gpu(), &own.sources(), &mut |_, _| Ok(())).unwrap();
        own.write_reversible(&models, &folder.0.join("kept"), &text(p)).unwrap();
        let read = ReversibleModels::load(gpu(), folder.0.join("kept").join(REVERSIBLE)).unwrap();
        assert_eq!((read.names.as_slice(), read.has_base), (&["a".to_string(), "b".to_string()][..], false));
        assert_eq!(read.numbers(), models.numbers());
        let which = read.find("b").unwrap();
        assert_eq!(which, read.find("1").unwrap());
        (read.model(gpu(), which, None).unwrap(), read.numbers())
    };
    let own = Shards::open(folder.0.join("b").join(WEIGHTS)).unwrap();
    let error = |model: &Named| -> f64 {
        let one = |(name, x): (&String, &Tensor)| {
            let want = download(&own.read(gpu(), name).unwrap());
            download(x).iter().zip(want).map(|(x, y)| (x - y).powi(2)).sum::<f64>()
        };
        model.iter().map(one).sum()
    };
    let ((one, less), (two, _)) = (rebuilt(1), rebuilt(2));
    assert!(error(&two) < 1e-8 && error(&one) > 1.0, "{} {}", error(&two), error(&one));
    assert!(less[0] < less[1], "{less:?}");
    // The mean of the factors, in the place of either, is further away.
    let mean = job("merge_method: average\nmodels: [{model: a}, {model: b}]").unwrap();
    let mean = mean.merged(gpu(), &mean.sources()).unwrap();
    assert!(error(&mean) > error(&one), "{} {}", error(&mean), error(&one));
    let read = ReversibleModels::load(gpu(), folder.0.join("kept").join(REVERSIBLE)).unwrap();
    let message = read.find("c").unwrap_err().to_string();
    assert!(message.contains("no model `c`; there are 0: a, 1: b"), "{message}");
    for (text, words) in [(text(3), "a basis of 3 for 2 models"), (text(0), "`basis` must be above 0")] {
        let own = job(&text).unwrap();
        let message = own.reversible(gpu(), &own.sources(), &mut |_, _| Ok(())).expect_err(words).to_string();
        assert!(message.contains(words), "{message}");
    }
    // Damaged files are errors.
    let path = folder.0.join("kept").join(REVERSIBLE);
    let whole = std::fs::read(&path).unwrap();
    for (from, to) in [
        ("tiebeam.reversible.names", "tiebeam.reversible.namez"),
        ("[\\\"a\\\",\\\"b\\\"]", "[\\\"a\\\",\\\"b\\\",\\\"c\\\"]"),
    ] {
        let text = String::from_utf8_lossy(&whole).into_owned();
        assert!(text.contains(from), "{from}");
        let at = whole.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
        let mut bytes = whole.clone();
        if from.len() == to.len() {
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        } else {
            bytes[at + 4] = b'"';
        }
        std::fs::write(&path, bytes).unwrap();
        assert!(ReversibleModels::load(gpu(), &path).is_err(), "{from}");
    }
    assert!(ReversibleModels::load(gpu(), folder.0.join("base/model.safetensors")).is_err());
}
