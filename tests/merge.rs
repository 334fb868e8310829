//! `tiebeam merge`: configurations against values computed by hand and against the reference vectors, and everything that can go
//! wrong.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use support::{gpu, within};
use tiebeam::merge::job::PART;
use tiebeam::merge::run::CONFIG;
use tiebeam::merge::{Checkpoint, Config, Job, Weights, yaml};
use tiebeam::store::{Entry, File, FileDType, save};
use tiebeam::{Error, Result, Rng};

/// A folder of a test's own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("tiebeam-merge-{test}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Runs a configuration in this process, into `out`.
    fn merge(&self, config: &str) -> Result<Checkpoint> {
        self.merge_into("out", config, 5 << 30)
    }

    fn merge_into(&self, out: &str, config: &str, shard_bytes: u64) -> Result<Checkpoint> {
        self.merge_in_parts(out, config, shard_bytes, PART)
    }

    fn merge_in_parts(&self, out: &str, config: &str, shard_bytes: u64, part: usize) -> Result<Checkpoint> {
        let mut job = Job::open(Config::from_value(&yaml::parse(config)?, &self.0)?)?;
        job.part = part;
        let mut done = 0;
        job.run(gpu(), &job.sources(), &self.0.join(out), shard_bytes, config, &mut |bytes| {
            done += bytes;
            Ok(())
        })?;
        assert_eq!(done, job.bytes() * job.passes(), "progress ends at the end");
        Checkpoint::open(self.0.join(out))
    }

    /// Why a configuration cannot be merged.
    fn refusal(&self, config: &str) -> String {
        self.merge(config).expect_err(config).to_string()
    }

    /// Every file below, with its bytes.
    fn contents(&self, folder: &str) -> BTreeMap<String, Vec<u8>> {
        let entries = std::fs::read_dir(self.0.join(folder)).unwrap().map(|e| e.unwrap().path());
        entries
            .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&p).unwrap()))
            .collect()
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(&self.0)
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A small model with names as language models have them.
fn model(layers: usize, seed: u64) -> Tensors {
    let mut rng = Rng::new(seed);
    let mut tensors = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let mut values = vec![0.0; shape.iter().product()];
        rng.fill_normal(&mut values);
        tensors.insert(name, (shape.to_vec(), values));
    };
    add("model.embed_tokens.weight".into(), &[12, 6]);
    for layer in 0..layers {
        add(format!("model.layers.{layer}.self_attn.q_proj.weight"), &[6, 6]);
        add(format!("model.layers.{layer}.mlp.up.weight"), &[7, 6]);
        add(format!("model.layers.{layer}.norm.weight"), &[6]);
    }
    add("lm_head.weight".into(), &[12, 6]);
    tensors
}

fn save_model(path: &Path, tensors: &Tensors, dtype: FileDType) {
    let positions: Vec<u8> = (0..4i64).flat_map(i64::to_le_bytes).collect();
    let positions = Entry::bytes("model.position_ids", FileDType::I64, &[4], positions);
    let entry = |(name, (shape, values)): (&String, &'_ (Vec<usize>, Vec<f32>))| match dtype {
        FileDType::BF16 => Entry::bf16(name, shape, values),
        _ => Entry::bytes(name, FileDType::F32, shape, bytemuck::cast_slice(values).to_vec()),
    };
    std::fs::create_dir_all(path).unwrap();
    let file = path.join("model.safetensors");
    save(file, tensors.iter().map(entry).chain([positions]), &BTreeMap::new()).unwrap();
    std::fs::write(
        path.join("config.json"),
        r#"{"num_hidden_layers": 4, "torch_dtype": "float32", "x": [1]}"#,
    )
    .unwrap();
    std::fs::write(path.join("tokenizer.json"), "{}").unwrap();
    std::fs::write(path.join("notes.txt"), "not copied").unwrap();
}

/// Models `a`, `b`, `c` of four layers.
fn three(folder: &Folder) -> [Tensors; 3] {
    let all = [1, 2, 3].map(|seed| model(4, seed));
    for (name, tensors) in ["a", "b", "c"].iter().zip(&all) {
        save_model(&folder.0.join(name), tensors, FileDType::F32);
    }
    all
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    checkpoint.file(name).and_then(|f| f.tensor_f32(name)).unwrap_or_else(|e| panic!("{e}"))
}

/// Every float tensor of a merge is `f` of the inputs' elements.
fn expect(merged: &Checkpoint, inputs: &[&Tensors], f: impl Fn(&str, &[f64]) -> f64) {
    for name in inputs[0].keys() {
        let wide = |v: Vec<f32>| v.into_iter().map(f64::from).collect::<Vec<f64>>();
        let got = wide(values(merged, name));
        let at = |i: usize| inputs.iter().map(|t| f64::from(t[name].1[i])).collect::<Vec<f64>>();
        let want: Vec<f64> = (0..got.len()).map(|i| f(name, &at(i))).collect();
        within(name, &got, &want, |_| 2e-6);
    }
}

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
    // Layers 0..4 lie at depths 0, 1/3, 2/3, 1; the embedding at 0, the head at 1.
    let layer = |name: &str| name.split('.').find_map(|p| p.parse::<f64>().ok());
    expect(&merged, &[&a, &b], |name, x| {
        let depth = layer(name).map_or(f64::from(!name.contains("embed")), |l| l / 3.0);
        let attention = if depth < 0.5 { depth } else { 0.5 + (depth - 0.5) * 5.0 };
        let weight = match name {
            _ if name.contains("self_attn") => attention,
            _ if name.contains("embed") => 2.0,
            _ => 4.0 - 3.0 * depth,
        };
        x[0] + weight * x[1]
    });
    // Integers are the first model's; settings come along, other files do not.
    assert_eq!(
        merged.file("model.position_ids").unwrap().tensor_u32("model.position_ids").unwrap(),
        [0, 1, 2, 3]
    );
    let files: Vec<String> = folder.contents("out").into_keys().collect();
    assert_eq!(files, ["config.json", "model.safetensors", CONFIG, "tokenizer.json"]);
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
    // What was written in shards is read from shards.
    let again = folder.merge("merge_method: average\nmodels: [{model: sharded}]").unwrap();
    for name in whole.names().iter().filter(|n| !n.contains("position")) {
        assert_eq!(values(&whole, name), values(&again, name), "{name}");
    }
    let names = ["a", "b", "c", "out", "sharded"];
    assert_eq!(folder.names(), names, "nothing temporary is left");
}

/// DARE keeps the share that it should, the same elements whichever tensors stand beside; another seed keeps others.
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
    let vectors = std::env::var_os("TIEBEAM_VECTORS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors"), PathBuf::from);
    let path = vectors.join("matching/merge.safetensors");
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
        // Whole tensors, and in parts of which several make a tensor.
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
    // Without a `dtype` the first model's; `out_dtype` goes before `dtype`.
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

#[test]
fn bad_configurations_name_what_is_wrong() {
    let folder = Folder::new("configs");
    three(&folder);
    let models = "models: [{model: a}, {model: b}]";
    let weighted = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]";
    for (config, words) in [
        (format!("merge_metod: linear\n{models}"), "unknown key `merge_metod`; near: `merge_method`"),
        (format!("merge_method: linaer\n{models}"), "merge_method: `linaer` is no method; near: `linear`"),
        (format!("merge_method: della\n{models}"), "`della` is not implemented here; near: "),
        (
            format!("merge_method: linear\n{models}\ntokenizer_source: union"),
            "`tokenizer_source` of mergekit is not supported",
        ),
        (
            format!("merge_method: linear\n{models}"),
            "parameter `weight` is missing (for tensor `lm_head.weight`)",
        ),
        (format!("merge_method: ties\n{weighted}"), "base_model: `ties` needs one"),
        ("merge_method: linear".into(), "needs either `models` or `slices`"),
        (models.into(), "`merge_method` is missing"),
        ("merge_method: linear\nmodels: []".into(), "models: must be a list that is not empty"),
        (
            "merge_method: linear\nmodels: [{modle: a}]".into(),
            "models[0]: unknown key `modle`; near: `model`",
        ),
        ("merge_method: linear\nmodels: [{model: 3}]".into(), "models[0].model: must be text, not 3"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]".into(),
            "models[0].parameters: unknown key `wieght`; near: `weight`",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: x, vlaue: 1}]}}]"
                .into(),
            "models[0].parameters.weight[0]: unknown key `vlaue`; near: `value`",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: heavy}}]".into(),
            "parameter `weight` must be a number",
        ),
        (
            format!("merge_method: ties\nbase_model: c\n{weighted}\nparameters: {{density: 1.5}}"),
            "parameter `density` is 1.5; it must be in [0, 1]",
        ),
        (
            format!("merge_method: linear\n{weighted}\nparameters: {{normalize: maybe}}"),
            "parameter `normalize` must be true or false",
        ),
        (format!("merge_method: average\n{models}\ndtype: int8"), "dtype: `int8` is no type of output"),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {t: 1}".into(),
            "`slerp` merges 1 models beside the base, not 2",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [3, 1]}]}]".into(),
            "layer_range: must be [first layer",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 9]}]}]".into(),
            "has 4 layers; layer_range asks for 2..9",
        ),
        ("merge_method: average\nmodels: [{model: nowhere}]".into(), "nowhere: "),
        (
            format!("merge_method: average\n{models}\nalign: {{spce: mlp}}"),
            "align: unknown key `spce`; near: `spec`",
        ),
        (format!("merge_method: average\n{models}\nalign: {{spec: mlp, matcher: ste}}"), "align.matcher: "),
        (format!("merge_method: fisher\n{weighted}"), "`fisher` must be the file of its Fisher diagonal"),
        (format!("merge_method: metrics_weighted\n{models}"), "each model needs `loss`, or each `step`"),
        ("a: [1".into(), "no valid YAML"),
        ("- 1".into(), "must be a map of keys"),
        (String::new(), "must be a map of keys"),
    ] {
        let message = folder.refusal(&config);
        assert!(message.contains(words), "{config}\n{message}");
    }
    assert_eq!(folder.names(), ["a", "b", "c"]);
}

#[test]
fn models_that_do_not_fit_are_listed_all_at_once() {
    let folder = Folder::new("misfits");
    let [_, mut b, mut c] = three(&folder);
    b.insert("model.layers.1.mlp.up.weight".into(), (vec![6, 7], vec![0.0; 42]));
    b.remove("model.layers.2.norm.weight");
    c.insert("lm_head.bias".into(), (vec![12], vec![0.0; 12]));
    c.remove("model.embed_tokens.weight");
    save_model(&folder.0.join("b"), &b, FileDType::F32);
    save_model(&folder.0.join("c"), &c, FileDType::F32);
    let config = "merge_method: average\nmodels: [{model: a}, {model: b}, {model: c}]";
    let message = folder.refusal(config);
    for words in [
        "the models do not fit (4)",
        "`model.layers.1.mlp.up.weight` is [6, 7] in",
        "b has no tensor `model.layers.2.norm.weight`",
        "c has no tensor `model.embed_tokens.weight`",
        "c has a tensor `lm_head.bias`",
    ] {
        assert!(message.contains(words), "{words}: {message}");
    }
    // The plan shows the same, and what there is.
    let job = Job::open(Config::from_value(&yaml::parse(config).unwrap(), &folder.0).unwrap()).unwrap();
    let plan = job.describe(1 << 30);
    assert!(
        plan.contains("problem ") && plan.contains("model.layers.3.norm.weight F32 [6] merged"),
        "{plan}"
    );
}

#[test]
fn what_is_no_number_is_named_and_nothing_is_lost() {
    let folder = Folder::new("nan");
    let [_, b, _] = three(&folder);
    let config = "merge_method: average\nmodels: [{model: a}, {model: b}]";
    folder.merge(config).unwrap();
    let before = folder.contents("out");
    for (bad, count) in [(f32::NAN, 1), (f32::INFINITY, 2), (f32::NEG_INFINITY, 1)] {
        let mut broken = b.clone();
        let values = &mut broken.get_mut("model.layers.2.mlp.up.weight").unwrap().1;
        values[17] = bad;
        values[40 - count] = if count > 1 { bad } else { 0.0 };
        save_model(&folder.0.join("b"), &broken, FileDType::F32);
        let message = folder.refusal(config);
        let words = format!(
            "tensor `model.layers.2.mlp.up.weight` has NaN or infinity at element 17, and {} more",
            count - 1
        );
        assert!(message.contains(&words) && message.contains("/b: "), "{message}");
        let global = "merge_method: pcb\nbase_model: a\nmodels: [{model: b}]";
        assert!(folder.refusal(global).contains("at element 17"));
    }
    // Too large for the type of the output.
    let mut large = b.clone();
    large.get_mut("lm_head.weight").unwrap().1[5] = 3e38;
    save_model(&folder.0.join("b"), &large, FileDType::F32);
    let message = folder.refusal(&format!("{config}\ndtype: float16"));
    assert!(
        message.contains("`lm_head.weight`: element 5") && message.contains("wider `dtype`"),
        "{message}"
    );
    assert_eq!(folder.contents("out"), before);
    assert_eq!(folder.names(), ["a", "b", "c", "out"]);
}

#[test]
fn stopped_runs_and_foreign_folders() {
    let folder = Folder::new("stopped");
    three(&folder);
    let config = "merge_method: average\nmodels: [{model: a}, {model: b}]";
    let job = Job::open(Config::from_value(&yaml::parse(config).unwrap(), &folder.0).unwrap()).unwrap();
    let run = |out: &str, stop_after: usize| {
        let mut calls = 0;
        job.run(gpu(), &job.sources(), &folder.0.join(out), 700, config, &mut |_| {
            calls += 1;
            if calls > stop_after { Err(Error::Config { message: "stopped".into() }) } else { Ok(()) }
        })
    };
    assert_eq!(run("out", 9).unwrap_err().to_string(), "stopped");
    assert_eq!(folder.names(), ["a", "b", "c"]);
    run("out", usize::MAX).unwrap();
    let before = folder.contents("out");
    assert_eq!(run("out", 3).unwrap_err().to_string(), "stopped");
    assert_eq!(folder.contents("out"), before);
    // A folder that no merge made stays what it is, an input among them; an empty one may go.
    assert!(run("a", usize::MAX).unwrap_err().to_string().contains("it is not ours to replace"));
    assert!(run("a/model.safetensors", usize::MAX).is_err() && run("no/such", usize::MAX).is_err());
    std::fs::create_dir(folder.0.join("empty")).unwrap();
    run("empty", usize::MAX).unwrap();
    assert_eq!(folder.contents("empty"), before);
    assert_eq!(folder.names(), ["a", "b", "c", "empty", "out"]);
}

#[test]
fn broken_shards_are_errors() {
    let folder = Folder::new("broken");
    three(&folder);
    let config = "merge_method: average\nmodels: [{model: a}, {model: s}]";
    folder.merge_into("s", "merge_method: average\nmodels: [{model: b}]", 900).unwrap();
    folder.merge(config).unwrap();
    let shards = folder.contents("s");
    let (name, bytes) = shards.iter().find(|(name, _)| name.contains("00002")).unwrap();
    let path = folder.0.join("s").join(name);
    for cut in [0, 7, 60, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        assert!(folder.refusal(config).contains("no valid safetensors file"), "{cut}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(folder.refusal(config).contains(name.as_str()));
}

fn tiebeam(folder: &Folder, args: &[&str]) -> Output {
    let run = Command::new(env!("CARGO_BIN_EXE_tiebeam")).args(args).current_dir(&folder.0).output();
    run.expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn command_line() {
    let folder = Folder::new("cli");
    three(&folder);
    folder.write("merges/m.yaml", "merge_method: average\nmodels: [{model: ../a}, {model: ../b}]\n");
    let dry = tiebeam(&folder, &["merge", "merges/m.yaml", "--dry-run", "--shard-size", "1KB"]);
    let plan = text(&dry.stdout);
    assert!(dry.status.success(), "{}", text(&dry.stderr));
    for words in
        ["method  average", "writes  15 tensors", "passes  1", "lm_head.weight F32 [12, 6] merged", "copied"]
    {
        assert!(plan.contains(words), "{words}: {plan}");
    }
    assert_eq!(folder.names(), ["a", "b", "c", "merges"]);
    let run = tiebeam(&folder, &["merge", "merges/m.yaml", "--out", "out", "--shard-size", "1KB"]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    assert!(Checkpoint::open(folder.0.join("out")).unwrap().names().len() == 15);
    for args in [
        &["merge", "merges/m.yaml"][..],
        &["merge", "merges/m.yaml", "--out", "x", "--shard-size", "0"],
        &["merge", "merges/m.yaml", "--out", "x", "--shard-size", "3 apples"],
        &["merge", "nowhere.yaml", "--out", "x"],
    ] {
        assert!(!tiebeam(&folder, args).status.success(), "{args:?}");
    }
    folder.write("bad.yaml", "merge_method: average\nmodels: [{model: a}]\nmodels: [{model: b}]\n");
    let bad = tiebeam(&folder, &["merge", "bad.yaml", "--out", "x"]);
    let message = text(&bad.stderr);
    assert!(
        !bad.status.success() && message.contains("bad.yaml: YAML, line 3: the key `models` comes twice"),
        "{message}"
    );
    assert_eq!(folder.names(), ["a", "b", "bad.yaml", "c", "merges", "out"]);
}

/// Two networks that were trained apart: averaged as they are they fail, aligned they do not; the reference vectors know both.
#[test]
fn aligned_and_evaluated() {
    let file =
        File::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/matching/wm_mlp.safetensors"))
            .unwrap();
    let folder = Folder::new("align");
    let entry = |from: &str, to: &str| {
        let info = file.info(from).unwrap();
        Entry::bytes(to, info.dtype, &info.shape, file.bytes(from).unwrap().to_vec())
    };
    for model in ["a", "b"] {
        let names = file.names().filter_map(|n| n.strip_prefix(&format!("{model}.")));
        let entries = names.map(|n| entry(&format!("{model}.{n}"), n));
        save(folder.0.join(format!("{model}.safetensors")), entries, &BTreeMap::new()).unwrap();
    }
    save(folder.0.join("data.safetensors"), ["x", "y"].map(|n| entry(n, n)), &BTreeMap::new()).unwrap();
    let f64s = |name: &str| -> Vec<f64> {
        file.bytes(name).unwrap().as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect()
    };
    let config = "merge_method: average\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\nevaluate: {data: data.safetensors}\n";
    folder.write("naive.yaml", config);
    folder.write("aligned.yaml", &format!("{config}align: {{spec: mlp, matcher: weights, restarts: 2}}\n"));
    for (name, kind) in [("naive", "naive"), ("aligned", "matched")] {
        let run = tiebeam(&folder, &["merge", &format!("{name}.yaml"), "--out", name]);
        let report = text(&run.stdout);
        assert!(run.status.success(), "{}", text(&run.stderr));
        let row = report.lines().last().unwrap();
        let numbers: Vec<f64> = row.split_whitespace().take(2).map(|n| n.parse().unwrap()).collect();
        let (loss, accuracy) = (f64s(&format!("loss_{kind}"))[5], f64s(&format!("acc_{kind}"))[5]);
        assert!(row.ends_with(name), "{report}");
        // Restarts may find a better optimum than the vectors' one run.
        match kind {
            "naive" => {
                assert!((numbers[0] - loss).abs() < 1e-3 && (numbers[1] - accuracy).abs() < 1e-4, "{report}")
            }
            _ => assert!(numbers[0] < loss + 0.05 && numbers[1] > accuracy - 0.03, "{report}"),
        }
        assert_eq!(report.contains("each assignment proved best"), name == "aligned", "{report}");
    }
    folder.write("bad.yaml", &format!("{config}align: {{spec: llama}}\n"));
    let message = text(&tiebeam(&folder, &["merge", "bad.yaml", "--out", "x"]).stderr);
    assert!(message.contains("config.json"), "{message}");
}

proptest::proptest! {
    /// Whatever is written into a configuration, reading it ends, and never in a panic.
    #[test]
    fn mutated_configurations_never_panic(
        edits in proptest::collection::vec((0usize..400, 0usize..24), 1..8),
    ) {
        const VALID: &str = "merge_method: ties\nbase_model: a\nslices:\n- sources:\n  - model: a\n    layer_range: [0, 4]\n  - \
            {model: b, layer_range: [0, 4], parameters: {weight: [0, 1], density: [{filter: mlp, value: 0.5}, {value: 1}]}}\n\
            parameters: {lambda: 1e-1, normalize: true}\ndtype: bfloat16\nalign: {spec: mlp, restarts: 3}\n";
        const PIECES: [&str; 24] = [
            "", " ", "\n", ":", "- ", "[", "]", "{", "}", ",", "\"", "'", "#", "&x ", "*x", "? ", "| ", "1", "-1", "1e999", "null",
            "true", "\t", "é",
        ];
        let mut text = VALID.to_string();
        for (at, piece) in edits {
            let at = (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
            text.insert_str(at, PIECES[piece]);
            if piece % 3 == 0 && at < text.len() {
                text.remove(at);
            }
        }
        if let Ok(value) = yaml::parse(&text) {
            let _ = Config::from_value(&value, Path::new("."));
        }
    }
}
