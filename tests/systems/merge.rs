//! `tiebeam merge`: configurations against values computed by hand and against the reference vectors.

use crate::merges::*;
use crate::support::within;
use std::collections::BTreeMap;
use tiebeam::files::MANIFEST;
use tiebeam::merge::Weights;
use tiebeam::merge::job::PART;
use tiebeam::merge::run::CONFIG;
use tiebeam::store::{Entry, File, FileDType, save};

#[test]
fn gradients_filters_and_flags() {
    let folder = Folder::new("gradients");
    let [a, b, _] = three(&folder);
    let merged = folder
        .merge(
            "
merge_method: linear
models:
  - model: a
    parameters:
      weight: 1
  - model: b
    parameters:
      weight:
        - filter: self_attn
          value: [0, 0.5, 3]
        - filter: embed
          value: 2
        - value: [4, 1]
parameters: {normalize: false}
",
        )
        .unwrap();
    // Layers 0..4 are at depths 0, 1/3, 2/3 and 1, the embedding and the head have the first value.
    let layer = |name: &str| name.split('.').find_map(|p| p.parse::<f64>().ok());
    expect(&merged, &[&a, &b], |name, x| {
        let depth = layer(name).map_or(0.0, |l| l / 3.0);
        let attention = if depth < 0.5 { depth } else { 0.5 + (depth - 0.5) * 5.0 };
        let weight = match name {
            _ if name.contains("self_attn") => attention,
            _ if name.contains("embed") => 2.0,
            _ => 4.0 - 3.0 * depth,
        };
        x[0] + weight * x[1]
    });
    // Integers are copied from the first model. Settings are copied too, other files are not.
    assert_eq!(
        merged.find("model.position_ids").unwrap().0.tensor_u32("model.position_ids").unwrap(),
        [0, 1, 2, 3]
    );
    let files: Vec<String> = folder.contents("out").into_keys().collect();
    assert_eq!(files, [MANIFEST, "README.md", "config.json", "model.safetensors", CONFIG, "tokenizer.json"]);
    let normalized = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 3}}";
    expect(&folder.merge(normalized).unwrap(), &[&a, &b], |_, x| (x[0] + 3.0 * x[1]) / 4.0);
}

#[test]
fn parameters_of_a_source_go_before_those_of_all() {
    let folder = Folder::new("precedence");
    let [a, b, c] = three(&folder);
    let merged = folder
        .merge(
            "
merge_method: task_arithmetic
base_model: a
models:
  - model: a
  - model: b
    parameters: {weight: 0.25}
  - model: c
parameters: {weight: 2, lambda: 0.5}
",
        )
        .unwrap();
    expect(&merged, &[&a, &b, &c], |_, x| x[0] + 0.5 * (0.25 * (x[1] - x[0]) + 2.0 * (x[2] - x[0])));
}

#[test]
fn layers_are_stacked() {
    let folder = Folder::new("slices");
    let [a, b, _] = three(&folder);
    let merged = folder
        .merge(
            "
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources:
      - model: b
        layer_range: [1, 4]
        parameters: {scale: [{filter: mlp, value: 0.5}, {value: 1}]}
dtype: bfloat16
",
        )
        .unwrap();
    let from = [(&a, 0), (&a, 1), (&a, 2), (&b, 1), (&b, 2), (&b, 3)];
    let rounded = |x: f32| half::bf16::from_f32(x).to_f32();
    for (out, (model, layer)) in from.into_iter().enumerate() {
        for part in ["self_attn.q_proj", "mlp.up", "norm"] {
            let scale = if out >= 3 && part == "mlp.up" { 0.5 } else { 1.0 };
            let name = |layer: usize| format!("model.layers.{layer}.{part}.weight");
            let want: Vec<f32> = model[&name(layer)].1.iter().map(|x| rounded(x * scale)).collect();
            assert_eq!(values(&merged, &name(out)), want, "{out} {part}");
            assert_eq!(merged.dtype(&name(out)).unwrap(), FileDType::BF16);
        }
    }
    let head: Vec<f32> = b["lm_head.weight"].1.iter().map(|&x| rounded(x)).collect();
    assert_eq!(values(&merged, "lm_head.weight"), head);
    let embedding: Vec<f32> = a["model.embed_tokens.weight"].1.iter().map(|&x| rounded(x)).collect();
    assert_eq!(values(&merged, "model.embed_tokens.weight"), embedding);
    assert_eq!(merged.names().len(), 6 * 3 + 3);
    let config: serde_json::Value = serde_json::from_slice(&folder.contents("out")["config.json"]).unwrap();
    assert_eq!(config, serde_json::json!({"num_hidden_layers": 6, "torch_dtype": "bfloat16", "x": [1]}));
}

#[test]
fn shards_in_and_out_and_the_same_bytes_twice() {
    let folder = Folder::new("shards");
    three(&folder);
    let config = "
merge_method: dare_ties
base_model: a
models:
- {model: b, parameters: {weight: 0.6, density: 0.5}}
- {model: c, parameters: {weight: 0.4, density: 0.7}}
parameters: {seed: 7}
";
    let whole = folder.merge(config).unwrap();
    let sharded = folder.merge_into("sharded", config, 500).unwrap();
    let files = folder.contents("sharded");
    assert!(files.len() > 5 && files.contains_key("model.safetensors.index.json"), "{:?}", files.keys());
    assert_eq!(sharded.names(), whole.names());
    for name in whole.names().iter().filter(|n| !n.contains("position")) {
        assert_eq!(values(&whole, name), values(&sharded, name), "{name}");
    }
    drop(sharded);
    folder.merge_into("sharded", config, 500).unwrap();
    assert_eq!(folder.contents("sharded"), files, "a second run");
    // A model that was written in shards can be read.
    let again = folder.merge("merge_method: average\nmodels: [{model: sharded}]").unwrap();
    for name in whole.names().iter().filter(|n| !n.contains("position")) {
        assert_eq!(values(&whole, name), values(&again, name), "{name}");
    }
    let names = ["a", "b", "c", "out", "sharded"];
    assert_eq!(folder.names(), names, "nothing temporary is left");
}

/// DARE keeps the right fraction of elements. Which ones depends on the seed, but not on what other tensors there are.
#[test]
fn dare_drops_by_seed_and_name() {
    let folder = Folder::new("dare");
    let mut base = Tensors::new();
    base.insert("w".into(), (vec![100, 100], vec![0.0; 10_000]));
    let mut tuned = Tensors::new();
    tuned.insert("w".into(), (vec![100, 100], vec![1.0; 10_000]));
    let write = |name: &str, t: &Tensors| save_model(&folder.0.join(name), t, FileDType::F32);
    write("base", &base);
    write("tuned", &tuned);
    let config = |extra: &str| {
        format!(
            "merge_method: dare_linear\nbase_model: base\nmodels: [{{model: tuned}}]\nparameters: {{weight: 1, density: 0.3, {extra}}}"
        )
    };
    let merged = |extra: &str| values(&folder.merge(&config(extra)).unwrap(), "w");
    let first = merged("rescale: density, seed: 1");
    let kept = first.iter().filter(|x| **x != 0.0).count();
    // Five standard deviations of a binomial.
    assert!((kept as f64 - 3000.0).abs() < 5.0 * (10_000.0f64 * 0.3 * 0.7).sqrt(), "{kept}");
    assert!(first.iter().all(|x| *x == 0.0 || (x - 1.0 / 0.3).abs() < 1e-5));
    let plain = merged("rescale: false, seed: 1");
    assert!(first.iter().zip(&plain).all(|(a, b)| (*a == 0.0) == (*b == 0.0)));
    assert!(plain.iter().all(|x| *x == 0.0 || (x - 1.0).abs() < 1e-6));
    // By the L1 norm the sum stays what it was.
    let sum: f64 = merged("rescale: true, seed: 1").iter().map(|x| f64::from(*x)).sum();
    assert!((sum - 10_000.0).abs() < 0.1, "{sum}");
    assert_ne!(first, merged("rescale: density, seed: 2"));
    let mut more = base.clone();
    more.insert("v".into(), (vec![3], vec![0.0; 3]));
    write("base", &more);
    let mut more = tuned.clone();
    more.insert("v".into(), (vec![3], vec![0.0; 3]));
    write("tuned", &more);
    assert_eq!(first, merged("rescale: density, seed: 1"));
}

/// The reference vectors through configurations.
#[test]
fn methods_by_configuration() {
    let path = crate::support::vectors().join("matching/merge.safetensors");
    let Ok(file) = File::open(&path) else { panic!("{} is missing", path.display()) };
    let folder = Folder::new("vectors");
    for model in ["base", "m0", "m1", "m2", "fisher0", "fisher1", "fisher2"] {
        let names: Vec<&str> = file.names().filter_map(|n| n.strip_prefix(&format!("{model}."))).collect();
        let entry = |n: &&str| {
            let full = format!("{model}.{n}");
            Entry::bytes(*n, FileDType::F32, &file.info(&full).unwrap().shape, file.bytes(&full).unwrap())
        };
        let path = folder.0.join(format!("{model}.safetensors"));
        save(path, names.iter().map(entry), &BTreeMap::new()).unwrap();
    }
    let p: Vec<f64> =
        file.bytes("params").unwrap().as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
    let [w0, w1, w2, lambda, density, gamma, t, ratio, floor, l0, l1, l2, s0, s1, s2, power] = p[..] else {
        panic!("three models, not {} parameters", p.len())
    };
    let three = |of: &dyn Fn(usize) -> String| {
        let one = |i: usize| format!("- {{model: m{i}.safetensors, parameters: {{{}}}}}\n", of(i));
        format!("models:\n{}{}{}", one(0), one(1), one(2))
    };
    let none = three(&|_| String::new());
    let weighted = three(&|i| format!("weight: {}", [w0, w1, w2][i]));
    let fishers = three(&|i| format!("fisher: fisher{i}.safetensors, weight: {}", [0.5, 0.3, 0.2][i]));
    let based = |models: &str, parameters: &str| {
        format!("base_model: base.safetensors\n{models}parameters: {{lambda: {lambda}, {parameters}}}\n")
    };
    let pair = format!(
        "models: [{{model: m0.safetensors, parameters: {{weight: {}}}}}, {{model: m1.safetensors, parameters: {{weight: {t}}}}}]\n",
        1.0 - t
    );
    let crumbs = format!("density: {density}, gamma: {gamma}");
    for (method, out, config) in [
        ("average", "average", none.clone()),
        ("linear", "linear", weighted.clone()),
        ("linear", "linear_unnormalized", format!("{weighted}parameters: {{normalize: false}}")),
        (
            "slerp",
            "slerp_m0_m1",
            format!(
                "base_model: m0.safetensors\nmodels: [{{model: m0.safetensors}}, {{model: m1.safetensors}}]\nparameters: {{t: {t}}}"
            ),
        ),
        ("nuslerp", "slerp_m0_m1", pair.clone()),
        ("nuslerp", "slerp_taskvec_m0_m1", format!("base_model: base.safetensors\n{pair}")),
        ("task_arithmetic", "task_arithmetic", based(&weighted, "normalize: false")),
        ("ties", "ties", based(&weighted, &format!("density: {density}, int8_mask: true"))),
        ("ties_global", "ties_global", based(&none, &format!("density: {density}"))),
        ("breadcrumbs", "breadcrumbs", based(&weighted, &crumbs)),
        ("breadcrumbs_ties", "breadcrumbs_ties", based(&weighted, &crumbs)),
        ("pcb", "pcb", based(&none, &format!("ratio: {ratio}"))),
        ("model_stock", "model_stock", format!("base_model: base.safetensors\n{none}")),
        ("fisher", "fisher", format!("{fishers}parameters: {{floor: {floor}}}")),
        ("fisher", "fisher_normalized", format!("{fishers}parameters: {{floor: {floor}, normalize: true}}")),
        (
            "metrics_weighted",
            "mwa_loss",
            format!("{}parameters: {{power: {power}}}", three(&|i| format!("loss: {}", [l0, l1, l2][i]))),
        ),
        (
            "metrics_weighted",
            "mwa_step",
            format!("{}parameters: {{power: {power}}}", three(&|i| format!("step: {}", [s0, s1, s2][i]))),
        ),
    ] {
        // Merges whole tensors, then tensors in several parts.
        for part in [PART, 37] {
            let config = format!("merge_method: {method}\n{config}");
            let merged = folder.merge_in_parts("out", &config, 1 << 30, part);
            let merged = merged.unwrap_or_else(|e| panic!("{out}: {e}"));
            assert!(!merged.names().is_empty());
            for name in merged.names() {
                let wide = |v: Vec<f32>| v.into_iter().map(f64::from).collect::<Vec<f64>>();
                let want = wide(file.tensor_f32(&format!("out.{out}.{name}")).unwrap());
                let what = format!("{out} {name} in parts of {part}");
                within(&what, &wide(values(&merged, &name)), &want, |_| 2e-6);
            }
        }
    }
}

#[test]
fn output_types_round_to_nearest_even() {
    let folder = Folder::new("types");
    let [a, b, _] = three(&folder);
    save_model(&folder.0.join("h"), &a, FileDType::BF16);
    let config = |first: &str, dtype: &str| {
        format!("merge_method: average\nmodels: [{{model: {first}}}, {{model: b}}]\n{dtype}")
    };
    let full = folder.merge(&config("a", "")).unwrap();
    let full: BTreeMap<String, Vec<f32>> = a.keys().map(|n| (n.clone(), values(&full, n))).collect();
    let half = folder.merge(&config("a", "dtype: float16")).unwrap();
    for (name, full) in &full {
        let want: Vec<f32> = full.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
        assert_eq!(values(&half, name), want);
        assert_eq!(half.dtype(name).unwrap(), FileDType::F16);
    }
    // Without a `dtype`, the output has the first model's type. `out_dtype` has precedence over `dtype`.
    let own = folder.merge(&config("h", "")).unwrap();
    let wide =
        folder.merge_into("wide", &config("h", "dtype: float16\nout_dtype: float32"), 1 << 30).unwrap();
    for name in a.keys() {
        assert_eq!(own.dtype(name).unwrap(), FileDType::BF16);
        assert_eq!(wide.dtype(name).unwrap(), FileDType::F32);
        let want: Vec<f32> = values(&wide, name).iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
        assert_eq!(values(&own, name), want);
    }
    let _ = b;
}
