//! Models as they are found: what is read although models differ, what is said about it, and what is refused.

use crate::merges::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tiebeam::merge::{Job, MergeConfig, Shards, Weights};
use tiebeam::store::{Entry, FileDType, save};

/// Writes a safetensors file of f32 tensors.
fn write(path: &Path, tensors: &[(&str, &[usize], &[f32])]) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    let entry = |&(name, shape, values): &(&str, &[usize], &[f32])| {
        Entry::bytes(name.to_string(), FileDType::F32, shape, bytemuck::cast_slice(values).to_vec())
    };
    save(path, tensors.iter().map(entry), &BTreeMap::new()).expect("written");
}

fn raw(path: &Path, tensors: Vec<(&str, FileDType, &[usize], Vec<u8>)>) {
    let entry = |(name, dtype, shape, bytes): (&str, FileDType, &[usize], Vec<u8>)| {
        Entry::bytes(name.to_string(), dtype, shape, bytes)
    };
    save(path, tensors.into_iter().map(entry), &BTreeMap::new()).expect("written");
}

fn job(folder: &Folder, config: &str) -> Job {
    Job::open(MergeConfig::from_yaml(config, &folder.0).expect("a configuration")).expect("models")
}

/// Checks that one of the notes has these words.
#[track_caller]
fn says(job: &Job, words: &str) {
    assert!(job.problems.is_empty(), "{:?}", job.problems);
    assert!(job.notes.iter().any(|note| note.contains(words)), "{words}: {:?}", job.notes);
}

const BOTH: &str = "merge_method: average\nmodels: [{model: a.safetensors}, {model: b.safetensors}]";

/// The head of a tied model is its table of token vectors, whichever model comes first.
#[test]
fn tied_and_untied_heads_are_merged() {
    let folder = Folder::new("heads");
    for first in ["tied", "untied"] {
        let tensors = [
            ("model.embed_tokens.weight", &[2usize, 1][..], &[1.0, 2.0][..]),
            ("lm_head.weight", &[2, 1], &[10.0, 20.0]),
        ];
        write(&folder.0.join("untied/model.safetensors"), &tensors);
        write(&folder.0.join("tied/model.safetensors"), &[(tensors[0].0, &[2, 1], &[3.0, 4.0])]);
        folder.write("tied/config.json", r#"{"tie_word_embeddings": true}"#);
        folder.write("untied/config.json", r#"{"tie_word_embeddings": false}"#);
        let second = if first == "tied" { "untied" } else { "tied" };
        let config = format!("merge_method: average\nmodels: [{{model: {first}}}, {{model: {second}}}]");
        says(
            &job(&folder, &config),
            "tied: the head is tied, so `model.embed_tokens.weight` stands for `lm_head.weight`",
        );
        let merged = folder.merge(&config).unwrap();
        assert_eq!(values(&merged, "lm_head.weight"), [6.5, 12.0]);
        assert_eq!(values(&merged, "model.embed_tokens.weight"), [2.0, 3.0]);
        let text = std::fs::read_to_string(folder.0.join("out/config.json")).unwrap();
        let settings: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(settings["tie_word_embeddings"], false, "{first}");
    }
    // Two tied models stay tied.
    let merged = folder.merge("merge_method: average\nmodels: [{model: tied}, {model: tied}]").unwrap();
    assert_eq!(merged.names(), ["model.embed_tokens.weight"]);
    let text = std::fs::read_to_string(folder.0.join("out/config.json")).unwrap();
    assert!(text.contains("true"), "{text}");
}

/// Tensors that a model computes from its settings may be in some files only. Others may not.
#[test]
fn buffers_of_some_models_are_no_obstacle() {
    let folder = Folder::new("buffers");
    let with: [(&str, &[usize], &[f32]); 3] = [
        ("layers.0.rotary_emb.inv_freq", &[2], &[1.0, 0.1]),
        ("layers.0.w", &[2], &[1.0, 2.0]),
        ("embeddings.position_ids", &[1, 2], &[0.0, 1.0]),
    ];
    write(&folder.0.join("a.safetensors"), &with);
    write(&folder.0.join("b.safetensors"), &with[1..2]);
    says(
        &job(&folder, BOTH),
        "the buffers `embeddings.position_ids`, `layers.0.rotary_emb.inv_freq` are not the same",
    );
    let merged = folder.merge(BOTH).unwrap();
    assert_eq!(values(&merged, "layers.0.rotary_emb.inv_freq"), [1.0, 0.1]);
    let turned = "merge_method: average\nmodels: [{model: b.safetensors}, {model: a.safetensors}]";
    says(
        &job(&folder, turned),
        "lacks the buffers `embeddings.position_ids`, `layers.0.rotary_emb.inv_freq`",
    );
    assert_eq!(folder.merge(turned).unwrap().names(), ["layers.0.w"]);
    write(
        &folder.0.join("a.safetensors"),
        &[("layers.0.w", &[2], &[1.0, 2.0]), ("layers.0.bias", &[1], &[1.0])],
    );
    assert!(folder.refusal(BOTH).contains("b.safetensors has no tensor `layers.0.bias`"));
}

/// A mask that all models have is kept. A mask that differs, and NaN, are damage.
#[test]
fn equal_masks_are_kept_and_others_refused() {
    let folder = Folder::new("masks");
    let mask = [0.0, f32::NEG_INFINITY, 0.0, 0.0];
    for name in ["a", "b"] {
        write(&folder.0.join(format!("{name}.safetensors")), &[("m", &[2, 2], &mask), ("w", &[1], &[1.0])]);
    }
    says(&job(&folder, BOTH), "`m` have infinite elements, or nearly, as a mask has");
    assert_eq!(values(&folder.merge(BOTH).unwrap(), "m"), mask);
    let halved = folder.merge(&format!("{BOTH}\ndtype: bfloat16")).unwrap();
    assert_eq!((values(&halved, "m"), halved.dtype("m").unwrap()), (mask.to_vec(), FileDType::F32));
    assert_eq!(halved.dtype("w").unwrap(), FileDType::BF16);
    // Methods that pass over all tensors first do not meet it either.
    let ties = "merge_method: ties_global\nbase_model: a.safetensors\nmodels: [{model: b.safetensors}]\nparameters: {density: 0.5}";
    assert_eq!(values(&folder.merge(ties).unwrap(), "m"), mask);
    let other = [0.0, f32::NEG_INFINITY, 1.0, 0.0];
    write(&folder.0.join("b.safetensors"), &[("m", &[2, 2], &other), ("w", &[1], &[1.0])]);
    assert!(folder.refusal(BOTH).contains("tensor `m` has NaN or infinity at element 1"));
    for name in ["a", "b"] {
        write(&folder.0.join(format!("{name}.safetensors")), &[("m", &[2], &[f32::NAN, f32::INFINITY])]);
    }
    assert!(folder.refusal(BOTH).contains("tensor `m` has NaN or infinity at element 0"));
}

/// What is passed through keeps its bits, whatever they are; another type rounds, and must not make infinities.
#[test]
fn passthrough_keeps_every_bit() {
    let folder = Folder::new("bits");
    let nan = f32::from_bits(0x7fc0_1234);
    let path = folder.0.join("a.safetensors");
    let floats = |x: &[f32]| bytemuck::cast_slice(x).to_vec();
    raw(
        &path,
        vec![
            ("f8", FileDType::F8E4M3, &[2], vec![0x7f, 0x01]),
            ("n", FileDType::F32, &[3], floats(&[nan, f32::INFINITY, -0.0])),
            ("wide", FileDType::F64, &[1], 0.1f64.to_le_bytes().to_vec()),
        ],
    );
    let config = "merge_method: passthrough\nmodels: [{model: a.safetensors}]";
    let merged = folder.merge(config).unwrap();
    for name in ["f8", "n", "wide"] {
        assert_eq!(merged.bytes(name).unwrap(), Shards::open(&path).unwrap().bytes(name).unwrap(), "{name}");
    }
    raw(&path, vec![("n", FileDType::F32, &[3], floats(&[nan, f32::INFINITY, 2.0]))]);
    let scaled = format!("{config}\nparameters: {{scale: 2}}");
    let out = values(&folder.merge(&scaled).unwrap(), "n");
    assert!(out[0].is_nan() && out[1] == f32::INFINITY && out[2] == 4.0, "{out:?}");
    raw(&path, vec![("n", FileDType::F32, &[2], floats(&[1e6, f32::INFINITY]))]);
    let message = folder.refusal(&format!("{config}\nparameters: {{scale: 2}}\ndtype: float16"));
    assert!(message.contains("`n`: element 0 is no number of F16"), "{message}");
}

/// What is not merged is said: integers that differ, wide floats, files that stay behind.
#[test]
fn what_is_not_merged_is_said() {
    let folder = Folder::new("said");
    let ids = |x: [i64; 2]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    for (name, numbers) in [("a", [0, 1]), ("b", [1, 0])] {
        let wide = 0.5f64.to_le_bytes().to_vec();
        let path = folder.0.join(format!("{name}.safetensors"));
        raw(&path, vec![("i", FileDType::I64, &[2], ids(numbers)), ("w", FileDType::F64, &[1], wide)]);
    }
    let found = job(&folder, BOTH);
    says(&found, "`i` are I64 and differ between");
    says(&found, "`w` are F64 and are merged and written as F32");
    let merged = folder.merge(BOTH).unwrap();
    assert_eq!(merged.bytes("i").unwrap(), ids([0, 1]));
    assert_eq!(merged.dtype("w").unwrap(), FileDType::F32);
    write(&folder.0.join("m/model.safetensors"), &[("w", &[1], &[1.0])]);
    let settings = ["spiece.model", "tekken.json", "preprocessor_config.json", "modeling_x.py", "LICENSE"];
    for name in settings.iter().chain(&["README.md", "notes.txt"]) {
        folder.write(&format!("m/{name}"), name);
    }
    let one = "merge_method: average\nmodels: [{model: m}]";
    says(&job(&folder, one), "README.md, notes.txt");
    folder.merge(one).unwrap();
    for name in settings {
        let text = std::fs::read_to_string(folder.0.join("out").join(name)).expect(name);
        assert_eq!(text, name);
    }
    // The output's card is its own.
    let card = std::fs::read_to_string(folder.0.join("out/README.md")).unwrap();
    assert!(card.starts_with("---\nbase_model:\n- m\n"), "{card}");
}

#[test]
fn packed_models_are_refused() {
    let folder = Folder::new("packed");
    // Names as in a GPTQ file, of floats, mean nothing.
    for name in ["a", "b"] {
        write(&folder.0.join(format!("{name}.safetensors")), &[("vq.codebooks", &[1, 1], &[1.0])]);
    }
    folder.merge(BOTH).unwrap();
    for name in ["a", "b"] {
        let words = vec![("l.qweight", FileDType::I32, &[1usize, 2][..], vec![0; 8])];
        raw(&folder.0.join(format!("{name}.safetensors")), words);
    }
    let message = folder.refusal(BOTH);
    assert!(message.contains("has packed weights, such as `l.qweight`, which cannot be merged"), "{message}");
}

/// Names that a wrapper prefixed are the model's own names, in the merge and in its output.
#[test]
fn names_of_wrappers_are_recognised() {
    let folder = Folder::new("wrappers");
    write(&folder.0.join("a.safetensors"), &[("l.0.w", &[1], &[1.0]), ("n", &[1], &[1.0])]);
    for (prefixed, words) in [
        (["_orig_mod.l.0.w", "_orig_mod.n"], "`_orig_mod.`"),
        (["module.l.0.w", "module.n"], "`module.`"),
        (["module._orig_mod.l.0.w", "module._orig_mod.n"], "`_orig_mod.`, `module.`"),
        (["l._orig_mod.0.w", "n"], "`_orig_mod.`"),
    ] {
        let tensors: Vec<_> = prefixed.iter().map(|name| (*name, &[1usize][..], &[3.0f32][..])).collect();
        write(&folder.0.join("b.safetensors"), &tensors);
        says(&job(&folder, BOTH), words);
        let merged = folder.merge(BOTH).unwrap();
        assert_eq!(merged.names(), ["l.0.w", "n"]);
        assert_eq!(values(&merged, "l.0.w"), [2.0]);
    }
    // A prefix that only some names have belongs to them, and so does one without which two names are one.
    for names in [["module.l.0.w", "n"], ["_orig_mod.n", "n"]] {
        let tensors: Vec<_> = names.iter().map(|name| (*name, &[1usize][..], &[3.0f32][..])).collect();
        write(&folder.0.join("b.safetensors"), &tensors);
        assert_eq!(Shards::open(folder.0.join("b.safetensors")).unwrap().names(), names);
    }
}

/// Two paths to the same files are one model.
#[test]
fn models_are_compared_by_their_files() {
    let folder = Folder::new("paths");
    for (name, x) in [("base", [0.0, 0.0]), ("x", [1.0, 0.5]), ("y", [0.5, 1.0])] {
        write(&folder.0.join(name).join("model.safetensors"), &[("w", &[2], &x)]);
    }
    let merged = |listed: &str| {
        let config = format!(
            "merge_method: model_stock\nbase_model: base\nmodels: [{{model: {listed}}}, {{model: x}}, {{model: y}}]"
        );
        values(&folder.merge(&config).unwrap(), "w")
    };
    let want = merged("base");
    let here = folder.0.file_name().unwrap().to_str().unwrap().to_string();
    for listed in ["./base", "base/", "base/model.safetensors", &format!("../{here}/base")] {
        assert_eq!(merged(listed), want, "{listed}");
    }
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(folder.0.join("base"), folder.0.join("linked")).unwrap();
        assert_eq!(merged("linked"), want);
    }
}

/// The settings of stacked layers follow, or it is said which could not.
#[test]
fn settings_follow_stacked_layers() {
    let folder = Folder::new("stacked");
    let names: Vec<String> = (0..4).map(|i| format!("model.layers.{i}.w")).collect();
    for (model, x) in [("a", 1.0), ("b", 2.0)] {
        let tensors: Vec<_> =
            names.iter().map(|name| (name.as_str(), &[1usize][..], std::slice::from_ref(&x))).collect();
        write(&folder.0.join(model).join("model.safetensors"), &tensors);
    }
    let config = "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\n\
                  - sources: [{model: b, layer_range: [1, 4]}]\n";
    let settings = |a: Value, b: Value| {
        folder.write("a/config.json", &a.to_string());
        folder.write("b/config.json", &b.to_string());
        let job = job(&folder, config);
        folder.merge(config).unwrap();
        let text = std::fs::read_to_string(folder.0.join("out/config.json")).unwrap();
        (serde_json::from_str::<Value>(&text).unwrap(), job)
    };
    // A list of which the other model says nothing is left and named.
    let (found, left) = settings(json!({"n_layer": 4, "layer_types": ["a0", "a1", "a2", "a3"]}), json!({}));
    assert_eq!(found["layer_types"].as_array().map(Vec::len), Some(4));
    says(&left, "`layer_types`, a list of 4, speak of layers by number");
    // Lists take each layer's element from the model that the layer is from.
    let (found, job) = settings(
        json!({"num_hidden_layers": 4, "layer_types": ["a0", "a1", "a2", "a3"], "mrope_section": [1, 2, 3, 4]}),
        json!({"num_hidden_layers": 4, "layer_types": ["b0", "b1", "b2", "b3"]}),
    );
    let types = ["a0", "a1", "a2", "b1", "b2", "b3"];
    assert_eq!(found, json!({"num_hidden_layers": 6, "layer_types": types, "mrope_section": [1, 2, 3, 4]}));
    says(&job, "config.json: `layer_types` follow the layers");
    for (before, after) in [
        (json!({"text_config": {"num_hidden_layers": 4}}), json!({"text_config": {"num_hidden_layers": 6}})),
        (json!({"num_layers": 4}), json!({"num_layers": 6})),
        (json!({"n_layers": 4, "max_window_layers": 4}), json!({"n_layers": 6, "max_window_layers": 6})),
        (
            json!({"n_layer": 4, "vision_config": {"num_hidden_layers": 4}}),
            json!({"n_layer": 6, "vision_config": {"num_hidden_layers": 4}}),
        ),
    ] {
        assert_eq!(settings(before, json!({})).0, after);
    }
    let (_, job) = settings(json!({"depth": 4}), json!({}));
    says(&job, "config.json gives the number of layers by none of");
    let (found, job) =
        settings(json!({"n_layer": 4, "first_k_dense_replace": 1, "max_window_layers": 2}), json!({}));
    says(&job, "`max_window_layers` = 2, `first_k_dense_replace` = 1 speak of layers by number");
    assert_eq!(found["max_window_layers"], 2);
}

/// As in mergekit 0.1.5, embeddings, last norm and head take the first value of a gradient.
#[test]
fn gradients_outside_of_the_layers_have_their_first_value() {
    let folder = Folder::new("gradient");
    let names = [
        "model.embed_tokens.weight",
        "model.layers.0.w",
        "model.layers.1.w",
        "model.norm.weight",
        "lm_head.weight",
    ];
    for (model, x) in [("a", 1.0f32), ("b", 2.0)] {
        let tensors: Vec<_> =
            names.iter().map(|name| (*name, &[1usize][..], std::slice::from_ref(&x))).collect();
        write(&folder.0.join(format!("{model}.safetensors")), &tensors);
    }
    let config = "merge_method: linear\nparameters: {normalize: false}\nmodels:\n- {model: a.safetensors, parameters: {weight: 1}}\n\
                  - {model: b.safetensors, parameters: {weight: [\"0.25\", 1]}}\n";
    let merged = folder.merge(config).unwrap();
    let found: Vec<f32> = names.iter().map(|name| values(&merged, name)[0]).collect();
    assert_eq!(found, [1.5, 1.5, 3.0, 1.5, 1.5]);
}

/// Anchors, aliases, merge keys and numbers as text.
#[test]
fn configurations_of_yaml_are_read() {
    let folder = Folder::new("yaml");
    write(&folder.0.join("a.safetensors"), &[("w", &[1], &[4.0])]);
    let config = "definitions: &d {weight: '0.25'}\nmerge_method: linear\nparameters: {normalize: 'false'}\n\
                  models: [&m {model: a.safetensors, parameters: {<<: *d}}, *m]";
    let config = MergeConfig::from_yaml(config, &folder.0).unwrap();
    assert_eq!(config.slices[0].sources.len(), 2);
    // An unknown key without an anchor is a mistake.
    let wrong =
        MergeConfig::from_yaml("definitions: {}\nmerge_method: linear\nmodels: [{model: a}]", &folder.0);
    assert!(wrong.unwrap_err().to_string().contains("unknown key `definitions`"));
    assert!(Job::open(config).unwrap().problems.is_empty());
}

/// A head that settings call the model's own is not replaced, one that is the table again is left out, and settings say what the
/// output has.
#[test]
fn heads_are_what_settings_say() {
    let folder = Folder::new("tied");
    let (table, head) = ("model.embed_tokens.weight", "lm_head.weight");
    let both = |x: f32, y: f32| vec![(table, vec![x; 2]), (head, vec![y; 2])];
    let model = |name: &str, config: Option<&str>, tensors: Vec<(&str, Vec<f32>)>| {
        let tensors: Vec<_> = tensors.iter().map(|(name, x)| (*name, &[2usize, 1][..], &x[..])).collect();
        write(&folder.0.join(name).join("model.safetensors"), &tensors);
        let _ = std::fs::remove_file(folder.0.join(name).join("config.json"));
        config.iter().for_each(|text| drop(folder.write(&format!("{name}/config.json"), text)));
    };
    let average = "merge_method: average\nmodels: [{model: a}, {model: b}]";
    let settings = || -> Value {
        serde_json::from_str(&std::fs::read_to_string(folder.0.join("out/config.json")).unwrap()).unwrap()
    };
    // Lost, not tied: Llama's settings, and any that say false.
    for config in [r#"{"model_type": "llama"}"#, r#"{"model_type": "x", "tie_word_embeddings": false}"#] {
        model("a", Some(config), both(1.0, 2.0));
        model("b", Some(config), vec![(table, vec![3.0; 2])]);
        let message = folder.refusal(average);
        assert!(message.contains("b has no tensor `lm_head.weight`"), "{config}: {message}");
    }
    // The table again: nothing is untied for it.
    let tied = Some(r#"{"tie_word_embeddings": true}"#);
    model("a", tied, both(1.0, 1.0));
    model("b", tied, vec![(table, vec![3.0; 2])]);
    says(
        &job(&folder, average),
        "`lm_head.weight` is left out, because the settings tie it to `model.embed_tokens.weight`",
    );
    let merged = folder.merge(average).unwrap();
    assert_eq!(
        (merged.names(), settings()["tie_word_embeddings"].clone()),
        (vec![table.to_string()], json!(true))
    );
    // Where all settings say tied, a head that is another matrix is left out, whoever has it.
    model("b", tied, both(3.0, 5.0));
    for order in ["a}, {model: b", "b}, {model: a"] {
        let config = format!("merge_method: average\nmodels: [{{model: {order}}}]");
        says(&job(&folder, &config), "is left out");
        assert_eq!(folder.merge(&config).unwrap().names(), [table]);
    }
    // Beside an untied model it is not used either, and the output is untied, whoever is first.
    model("a", Some(r#"{"tie_word_embeddings": false}"#), both(1.0, 2.0));
    for order in ["a}, {model: b", "b}, {model: a"] {
        let config = format!("merge_method: average\nmodels: [{{model: {order}}}]");
        assert_eq!(values(&folder.merge(&config).unwrap(), head), [2.5, 2.5], "{order}");
        assert_eq!(settings()["tie_word_embeddings"], false, "{order}");
    }
    // Aligned models are compared by their own tensors, so a head that one of them lacks is not passed over.
    let aligned = "merge_method: average\nalign: {spec: mlp}\nmodels: [{model: b}, {model: a}]";
    model("a", tied, vec![(table, vec![1.0; 2])]);
    assert!(folder.refusal(aligned).contains("a has no tensor `lm_head.weight`"));
    let turned = "merge_method: average\nalign: {spec: mlp}\nmodels: [{model: a}, {model: b}]";
    assert!(folder.refusal(turned).contains("b has a tensor `lm_head.weight`"));
    // Settings that say nothing of GPT-2 mean tied, so false is written.
    let gpt = Some(r#"{"model_type": "gpt2"}"#);
    model("a", gpt, vec![(table, vec![1.0; 2])]);
    model("b", gpt, both(3.0, 5.0));
    folder.merge(average).unwrap();
    assert_eq!(settings()["tie_word_embeddings"], false);
    // A stack takes its head from the last slice.
    let layered = |x: f32| (vec![x; 2], vec![x; 2]);
    let (one, two) = (layered(1.0), layered(2.0));
    model("a", tied, vec![(table, one.0), ("model.layers.0.w", one.1)]);
    model("b", Some("{}"), vec![(table, two.0.clone()), ("model.layers.0.w", two.1), (head, two.0)]);
    let stack = "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]\n\
                 - sources: [{model: b, layer_range: [0, 1]}]";
    assert_eq!(values(&folder.merge(stack).unwrap(), head), [2.0, 2.0]);
    assert_eq!(settings()["tie_word_embeddings"], false);
    // The last slice's head is its table, which the output has not.
    let turned = "merge_method: passthrough\nslices:\n- sources: [{model: b, layer_range: [0, 1]}]\n\
                  - sources: [{model: a, layer_range: [0, 1]}]";
    let merged = folder.merge(turned).unwrap();
    assert_eq!((values(&merged, head), values(&merged, table)), (vec![1.0, 1.0], vec![2.0, 2.0]));
}

/// A base gives only its settings to a method that does not compute with one.
#[test]
fn a_base_that_the_method_does_not_use_is_no_input() {
    let folder = Folder::new("unused-base");
    write(&folder.0.join("base.safetensors"), &[("w", &[1], &[7.0])]);
    write(&folder.0.join("a.safetensors"), &[("w", &[2], &[1.0, 2.0])]);
    for method in ["passthrough", "average"] {
        let config = format!(
            "merge_method: {method}\nbase_model: base.safetensors\nmodels: [{{model: a.safetensors}}]"
        );
        assert_eq!(values(&folder.merge(&config).unwrap(), "w"), [1.0, 2.0], "{method}");
    }
}

/// Files beside a model that is one file among others are not the model's.
#[test]
fn what_is_beside_single_files_stays_there() {
    let folder = Folder::new("beside");
    write(&folder.0.join("a.safetensors"), &[("w", &[1], &[1.0])]);
    for name in ["train.py", "tokenizer.json", "LICENSE"] {
        folder.write(name, "");
    }
    folder.merge("merge_method: average\nmodels: [{model: a.safetensors}]").unwrap();
    let names: Vec<String> =
        folder.contents("out").into_keys().filter(|name| !name.starts_with('.')).collect();
    assert_eq!(names, ["README.md", "model.safetensors", "tiebeam_merge.yaml"]);
}

/// Two revisions of a model in shards may have one and the same index.
#[cfg(unix)]
#[test]
fn models_of_one_index_are_two_models() {
    let folder = Folder::new("revisions");
    let shard = |i: usize| format!("model-{i:05}-of-00002.safetensors");
    folder.write("index", &json!({"weight_map": {"x": shard(1), "y": shard(2)}}).to_string());
    for (revision, x) in [("r1", 1.0f32), ("r2", 5.0)] {
        for (i, name) in [(1, "x"), (2, "y")] {
            write(&folder.0.join(revision).join(shard(i)), &[(name, &[1], &[x])]);
        }
        let link = folder.0.join(revision).join("model.safetensors.index.json");
        std::os::unix::fs::symlink(folder.0.join("index"), link).unwrap();
    }
    let config = "merge_method: average\nmodels: [{model: r1}, {model: r2}]";
    assert_eq!(values(&folder.merge(config).unwrap(), "x"), [3.0]);
}

/// Packed weights are told by their settings too, and may be passed through.
#[test]
fn packed_weights_of_any_method() {
    let folder = Folder::new("int8");
    for name in ["a", "b"] {
        let scales = bytemuck::cast_slice(&[1.0f32]).to_vec();
        let tensors = vec![
            ("l.weight", FileDType::I8, &[1usize, 2][..], vec![1, 2]),
            ("l.weight_scale", FileDType::F32, &[1], scales),
        ];
        std::fs::create_dir_all(folder.0.join(name)).unwrap();
        raw(&folder.0.join(name).join("model.safetensors"), tensors);
        folder.write(
            &format!("{name}/config.json"),
            r#"{"quantization_config": {"quant_method": "compressed-tensors"}}"#,
        );
    }
    let message = folder.refusal("merge_method: average\nmodels: [{model: a}, {model: b}]");
    assert!(message.contains("has packed weights (compressed-tensors), such as `l.weight`"), "{message}");
    let pass = "merge_method: passthrough\nmodels: [{model: a}]";
    assert!(job(&folder, pass).notes.iter().all(|note| !note.contains("quantization_config")));
    assert_eq!(folder.merge(pass).unwrap().bytes("l.weight").unwrap(), [1, 2]);
    raw(&folder.0.join("f8.safetensors"), vec![("w", FileDType::F8E4M3, &[1], vec![1])]);
    let cast = "merge_method: passthrough\ndtype: bfloat16\nmodels: [{model: f8.safetensors}]";
    says(&job(&folder, cast), "`w` stay F8_E4M3 and do not become BF16");
}

/// Buffers are copied by every method, and layers of a slice are all there.
#[test]
fn buffers_are_not_scaled_and_slices_lose_nothing() {
    let folder = Folder::new("slices");
    let tensors: [(&str, &[usize], &[f32]); 3] = [
        ("model.layers.0.rotary_emb.inv_freq", &[2], &[1.0, 0.1]),
        ("model.layers.0.w", &[1], &[1.0]),
        ("model.layers.1.w", &[1], &[1.0]),
    ];
    write(&folder.0.join("a.safetensors"), &tensors);
    let more: [(&str, &[usize], &[f32]); 2] =
        [("model.layers.0.bias", &[1], &[1.0]), ("model.layers.1.bias", &[1], &[1.0])];
    write(&folder.0.join("b.safetensors"), &[&tensors[..], &more].concat());
    let plain = "merge_method: linear\nparameters: {normalize: false}\nmodels: [{model: a.safetensors, parameters: {weight: 2}}]";
    let merged = folder.merge(plain).unwrap();
    assert_eq!(values(&merged, "model.layers.0.rotary_emb.inv_freq"), [1.0, 0.1]);
    assert_eq!(values(&merged, "model.layers.0.w"), [2.0]);
    let slice = |range: &str| {
        format!(
            "merge_method: average\nslices: [{{sources: [{{model: a.safetensors, layer_range: {range}}}, \
             {{model: b.safetensors, layer_range: {range}}}]}}]"
        )
    };
    let message = folder.refusal(&slice("[1, 2]"));
    assert!(message.contains("only") && message.contains("`model.layers.1.bias`"), "{message}");
    assert!(!message.contains("layers.0.bias"), "{message}");
}

/// A key is a definition only if something elsewhere uses it.
#[test]
fn misspelled_keys_with_anchors_are_refused() {
    let folder = Folder::new("anchors");
    write(&folder.0.join("a.safetensors"), &[("w", &[1], &[4.0])]);
    let text = "merge_method: linear\nmodels: [{model: a.safetensors, parameters: {weight: 1}}]\n";
    let wrong = MergeConfig::from_yaml(&format!("{text}parametres: &p {{normalize: false}}"), &folder.0);
    assert!(wrong.unwrap_err().to_string().contains("unknown key `parametres`"));
    says(
        &job(&folder, "shared: &p a.safetensors\nmerge_method: average\nmodels: [{model: *p}]"),
        "the key `shared` only defines",
    );
}
