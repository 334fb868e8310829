//! Errors of a merge: they are reported completely, and existing files are left intact.

use crate::merges::*;
use crate::support::{folder, gpu};
use std::path::Path;
use tiebeam::Error;
use tiebeam::files::MANIFEST;
use tiebeam::merge::run::CONFIG;
use tiebeam::merge::{Job, MergeConfig, yaml};
use tiebeam::store::FileDType;

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
            format!("merge_method: linear\n{models}\nchat_template: auto"),
            "`chat_template` of mergekit is not supported",
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
            "merge_method: ties_global\nbase_model: c\nmodels: [{model: a, parameters: {density: 0.2}}]"
                .into(),
            "models[0]: `density` of `ties_global` is one for all models; move it to the top",
        ),
        (
            format!(
                "merge_method: ties_global\nbase_model: c\n{models}\nparameters: {{density: [0.2, 0.4]}}"
            ),
            "`density` of `ties_global` is one value for the whole model",
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
    // The plan shows the same problems, and the tensors that can be merged.
    let job = Job::open(MergeConfig::from_value(&yaml::parse(config).unwrap(), &folder.0).unwrap()).unwrap();
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
    // A value that is too large for the output's type.
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
    let job = Job::open(MergeConfig::from_value(&yaml::parse(config).unwrap(), &folder.0).unwrap()).unwrap();
    let run = |out: &str, stop_after: usize| {
        let mut calls = 0;
        job.run(gpu(), &job.sources(), &folder.0.join(out), 700, config, &mut |_| {
            calls += 1;
            if calls > stop_after { Err(Error::stopped("stopped")) } else { Ok(()) }
        })
    };
    assert_eq!(run("out", 9).unwrap_err().to_string(), "stopped");
    assert_eq!(folder.names(), ["a", "b", "c"]);
    run("out", usize::MAX).unwrap();
    let before = folder.contents("out");
    assert_eq!(run("out", 3).unwrap_err().to_string(), "stopped");
    assert_eq!(folder.contents("out"), before);
    // A folder that no merge made is left intact, also if it is an input. An empty one may be replaced.
    assert!(run("a", usize::MAX).unwrap_err().to_string().contains("it is not ours to replace"));
    assert!(run("a/model.safetensors", usize::MAX).is_err() && run("no/such", usize::MAX).is_err());
    std::fs::create_dir(folder.0.join("empty")).unwrap();
    run("empty", usize::MAX).unwrap();
    assert_eq!(folder.contents("empty"), before);
    assert_eq!(folder.names(), ["a", "b", "c", "empty", "out"]);
}

/// Files that a user adds or changes in the folder of a merge are kept by the next merge into it, or make it fail.
#[test]
fn a_second_merge_keeps_what_is_somebodys() {
    let folder = Folder::new("second");
    three(&folder);
    let config = "merge_method: average\nmodels: [{model: a}, {model: b}]";
    // First shards and their index, then one file. The old files of ours are removed.
    folder.merge_into("out", config, 700).unwrap();
    assert!(folder.contents("out").len() > 6);
    let theirs = ["README.md", "adapters/adapter_model.safetensors", "model-q4.gguf"];
    theirs.iter().for_each(|name| drop(folder.write(&format!("out/{name}"), "mine")));
    let adapters = folder.0.join("out/adapters");
    let names = || folder::names(&folder.0.join("out"));
    folder.merge(config).unwrap();
    let ours = [MANIFEST, "config.json", "model.safetensors", CONFIG, "tokenizer.json"];
    let mut want: Vec<&str> = ours.into_iter().chain(["README.md", "adapters", "model-q4.gguf"]).collect();
    want.sort();
    assert_eq!(names(), want);
    assert_eq!(folder::names(&adapters), ["adapter_model.safetensors"]);
    for (name, text) in [("tokenizer.json", "[]"), ("model.safetensors.index.json", "{}")] {
        let path = folder.0.join("out").join(name);
        let before = std::fs::read(&path).ok();
        folder.write(&format!("out/{name}"), text);
        // The merge is refused before the first tensor is read.
        let job =
            Job::open(MergeConfig::from_value(&yaml::parse(config).unwrap(), &folder.0).unwrap()).unwrap();
        let run = |out| {
            job.run(gpu(), &job.sources(), out, 5 << 30, config, &mut |_| panic!("nothing is worked on"))
        };
        let message = run(&folder.0.join("out")).unwrap_err().to_string();
        assert!(message.contains(&format!("{name} is not as it was written here")), "{message}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        match before {
            Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
    }
    folder.merge(config).unwrap();
    assert_eq!(names(), want);
    assert_eq!(folder.names(), ["a", "b", "c", "out"]);
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

proptest::proptest! {
    /// Reading a mutated configuration never panics.
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
            let _ = MergeConfig::from_value(&value, Path::new("."));
        }
    }
}
