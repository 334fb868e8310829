//! Commands that look at data: `evaluate`, `fisher`, `pareto`, merges that learn, and adapters in and out.

use crate::merge::networks;
use crate::merges::Folder;
use crate::{command, text};
use serde_json::Value;
use std::collections::BTreeMap;
use std::process::Output;
use tiebeam::store::{Entry, File, FileDType, save};

fn tiebeam(folder: &Folder, args: &[&str]) -> Output {
    command().args(args).current_dir(&folder.0).output().expect("the binary runs")
}

/// Runs a command that must succeed, and returns what it printed.
fn done(folder: &Folder, args: &[&str]) -> String {
    let run = tiebeam(folder, args);
    assert!(run.status.success(), "{args:?}: {}", text(&run.stderr));
    text(&run.stdout)
}

/// Runs a command that must fail, and returns its last line of error.
fn failed(folder: &Folder, args: &[&str]) -> String {
    let run = tiebeam(folder, args);
    let error = text(&run.stderr);
    assert!(!run.status.success() && error.contains("error: "), "{args:?}: {error}");
    assert!(!error.contains("panicked"), "{error}");
    error[error.find("error: ").unwrap()..].to_string()
}

fn lines(out: &str) -> Vec<Value> {
    out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"))).collect()
}

#[test]
fn models_are_scored_at_tasks() {
    let folder = networks("evaluate");
    let one = done(&folder, &["evaluate", "a.safetensors", "b.safetensors", "--data", "data.safetensors"]);
    let rows: Vec<Vec<&str>> = one.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["loss", "accuracy", "model"]);
    assert!(rows[1][2] == "a.safetensors" && rows[1][1].parse::<f64>().unwrap() > 0.9, "{one}");
    let two = done(
        &folder,
        &["evaluate", "a.safetensors", "--data", "day=data.safetensors", "--data", "data.safetensors"],
    );
    assert!(two.starts_with("day       data      mean      model\n"), "{two}");
    let json =
        lines(&done(&folder, &["evaluate", "a.safetensors", "--data", "day=data.safetensors", "--json"]));
    assert_eq!(json.len(), 1);
    assert_eq!((&json[0]["line"], &json[0]["task"]), (&"evaluated".into(), &"day".into()));
    assert_eq!(format!("{:.4}", json[0]["accuracy"].as_f64().unwrap()), rows[1][1]);
    // A description of the same network.
    let steps = r#"{"steps": [{"linear": "fc0"}, "relu", {"linear": "fc1"}, "relu", {"linear": "fc2"}]}"#;
    folder.write("net.json", steps);
    let described = ["evaluate", "a.safetensors", "--data", "data.safetensors", "--network", "net.json"];
    assert_eq!(done(&folder, &described), one.lines().take(2).map(|l| format!("{l}\n")).collect::<String>());
    let save_rows = |name: &str, x: &[f32], width: usize, y: &[u32]| {
        let entries = [Entry::f32("x", &[x.len() / width, width], x), Entry::u32("y", &[y.len()], y)];
        save(folder.0.join(name), entries, &BTreeMap::new()).unwrap();
    };
    save_rows("wide.safetensors", &[0.0; 6], 3, &[0, 1]);
    save_rows("far.safetensors", &[0.0; 128], 64, &[0, 10]);
    save_rows("nan.safetensors", &[f32::NAN; 64], 64, &[0]);
    save_rows("few.safetensors", &[0.0; 128], 64, &[0]);
    save_rows("none.safetensors", &[], 64, &[]);
    folder.write("text.txt", "In the beginning");
    for (args, words) in [
        (&["a.safetensors"][..], "no task is named; give --data FILE"),
        (
            &["a.safetensors", "--data", "wide.safetensors"],
            "task `wide`: `fc0` reads 64 inputs, and gets [2, 3]",
        ),
        (&["a.safetensors", "--data", "far.safetensors"], "label 10 of row 1 is none of the network's 10"),
        (&["a.safetensors", "--data", "nan.safetensors"], "`x` is NaN at element 0"),
        (&["a.safetensors", "--data", "few.safetensors"], "`y`"),
        (&["a.safetensors", "--data", "none.safetensors"], "`x` has no row"),
        (&["a.safetensors", "--data", "nowhere.safetensors"], "nowhere.safetensors"),
        (&["a.safetensors", "--data", "data.safetensors", "--inputs", "z"], "`z`"),
        (&["nowhere.safetensors", "--data", "data.safetensors"], "there is no such file"),
        (&["data.safetensors", "--data", "data.safetensors"], "not a plain multilayer perceptron"),
        (&["a.safetensors", "--text", "text.txt"], "a.safetensors"),
        (&["a.safetensors", "--data", "data.safetensors", "--outputs", "5..20"], "outputs 5..20 of 10"),
        (&["a.safetensors", "--data", "data.safetensors", "--outputs", "5"], "write FIRST..END"),
    ] {
        let error = failed(&folder, &[&["evaluate"], args].concat());
        assert!(error.contains(words), "{args:?}: {error}");
    }
}

#[test]
fn merges_learn_and_fronts_are_drawn() {
    let folder = networks("learned");
    done(
        &folder,
        &[
            "fisher",
            "a.safetensors",
            "--data",
            "data.safetensors",
            "--samples",
            "50",
            "--out",
            "fa.safetensors",
        ],
    );
    done(
        &folder,
        &[
            "fisher",
            "b.safetensors",
            "--data",
            "data.safetensors",
            "--samples",
            "50",
            "--of",
            "sampled",
            "--out",
            "fb.safetensors",
        ],
    );
    let fisher = File::open(folder.0.join("fa.safetensors")).unwrap();
    let model = File::open(folder.0.join("a.safetensors")).unwrap();
    assert_eq!(fisher.names().collect::<Vec<_>>(), model.names().collect::<Vec<_>>());
    folder.write("fisher.yaml", "merge_method: fisher\nmodels:\n- {model: a.safetensors, parameters: {weight: 1, fisher: fa.safetensors}}\n- {model: b.safetensors, parameters: {weight: 1, fisher: fb.safetensors}}\nevaluate: {data: data.safetensors}\n");
    assert!(done(&folder, &["merge", "fisher.yaml", "--out", "fisher"]).contains("accuracy"));
    let models =
        "base_model: a.safetensors\nmodels: [{model: b.safetensors}]\nlearn: {data: data.safetensors}\n";
    folder.write("atlas.yaml", &format!("merge_method: atlas\n{models}parameters: {{steps: 10}}\nevaluate: {{tasks: [{{name: one, data: data.safetensors}}, {{name: two, data: data.safetensors}}]}}\n"));
    let learned = done(&folder, &["merge", "atlas.yaml", "--out", "atlas"]);
    assert!(
        learned.contains("learned 6 coefficients of 1 task vectors")
            && learned.contains("one       two       mean"),
        "{learned}"
    );
    folder.write("pleas.yaml", "merge_method: pleas\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\nlearn: {data: data.safetensors}\nparameters: {ratio: 0.25}\n");
    let learned = done(&folder, &["merge", "pleas.yaml", "--out", "pleas"]);
    assert!(learned.contains("pairs of units are kept apart"), "{learned}");
    let wide = done(&folder, &["evaluate", "pleas", "a.safetensors", "--data", "data.safetensors"]);
    assert!(wide.lines().count() == 3, "the output and its description are a network: {wide}");
    folder.write("map.yaml", "merge_method: map\nbase_model: a.safetensors\nmodels: [{model: b.safetensors}, {model: fisher}]\nparameters: {samples: 8, population: 8, generations: 5}\nlearn: {tasks: [{name: one, data: data.safetensors}, {name: two, data: data.safetensors}]}\n");
    let front = done(&folder, &["pareto", "map.yaml", "--out", "front.svg"]);
    assert!(front.contains("one: the surrogate explains") && front.contains("coefficients"), "{front}");
    let svg = std::fs::read_to_string(folder.0.join("front.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("one: accuracy"));
    folder.write("avg.yaml", "merge_method: average\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\nalign: {spec: network, matcher: activations}\nrepair: true\nlearn: {data: data.safetensors}\nevaluate: {data: data.safetensors}\n");
    let aligned = done(&folder, &["merge", "avg.yaml", "--out", "avg"]);
    assert!(
        aligned.contains("aligned b.safetensors") && aligned.contains("repaired on the inputs"),
        "{aligned}"
    );
    for (args, words) in [
        (&["pareto", "atlas.yaml"][..], "merge_method: `atlas`; a front is found by `map`"),
        (&["fisher", "a.safetensors", "--out", "x.safetensors"], "no task is named"),
        (
            &[
                "fisher",
                "a.safetensors",
                "--data",
                "data.safetensors",
                "--data",
                "data.safetensors",
                "--out",
                "x",
            ],
            "is of one task",
        ),
    ] {
        let error = failed(&folder, args);
        assert!(error.contains(words), "{args:?}: {error}");
    }
    assert!(!folder.0.join("x.safetensors").exists());
}

#[test]
fn adapters_go_out_and_in() {
    let folder = Folder::new("adapters-cli");
    let base: Vec<f32> = (0..48).map(|i| (i as f32).sin()).collect();
    // The change has rank 1.
    let tuned: Vec<f32> =
        base.iter().enumerate().map(|(i, x)| x + 0.1 * (1 + i / 8) as f32 * (i % 8) as f32).collect();
    for (name, x) in [("base", &base), ("tuned", &tuned)] {
        std::fs::create_dir_all(folder.0.join(name)).unwrap();
        let entries = [
            Entry::f32("model.layers.0.self_attn.q_proj.weight", &[6, 8], x),
            Entry::f32("model.norm.weight", &[8], &x[..8]),
            Entry::bytes("steps", FileDType::I64, &[1], 7i64.to_le_bytes().to_vec()),
        ];
        save(folder.0.join(name).join("model.safetensors"), entries, &BTreeMap::new()).unwrap();
        folder.write(&format!("{name}/config.json"), r#"{"num_hidden_layers": 1}"#);
    }
    let run = tiebeam(&folder, &["extract", "base", "tuned", "--rank", "1", "--out", "lora"]);
    let (out, error) = (text(&run.stdout), text(&run.stderr));
    assert!(run.status.success() && out.contains("1 matrices at rank 1: 100.00%"), "{out}{error}");
    assert!(error.contains("`model.norm.weight` and 0 more differ too"), "{error}");
    folder.write("apply.yaml", "merge_method: passthrough\nmodels: [{model: base+lora}]\n");
    done(&folder, &["merge", "apply.yaml", "--out", "applied"]);
    let applied = File::open(folder.0.join("applied/model.safetensors")).unwrap();
    let got = applied.tensor_f32("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert!(got.iter().zip(&tuned).all(|(x, y)| (x - y).abs() < 1e-5), "{got:?}");
    std::fs::create_dir_all(folder.0.join("other")).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(folder.0.join("lora").join(file), folder.0.join("other").join(file)).unwrap();
    }
    folder.write(
        "rmm.yaml",
        "merge_method: rmm\nmodels: [{model: lora}, {model: other}]\nparameters: {basis: 1}\n",
    );
    done(&folder, &["merge", "rmm.yaml", "--out", "kept"]);
    done(&folder, &["rebuild", "kept", "other", "--out", "again"]);
    folder.write("again.yaml", "merge_method: passthrough\nmodels: [{model: base+again}]\n");
    done(&folder, &["merge", "again.yaml", "--out", "applied"]);
    let applied = File::open(folder.0.join("applied/model.safetensors")).unwrap();
    let got = applied.tensor_f32("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert!(
        got.iter().zip(&tuned).all(|(x, y)| (x - y).abs() < 1e-5),
        "one vector is enough for two equal adapters"
    );
    folder.write(
        "based.yaml",
        "merge_method: rmm\nbase_model: base\nmodels: [{model: tuned}, {model: applied}]\nparameters: {basis: 1}\n",
    );
    done(&folder, &["merge", "based.yaml", "--out", "based"]);
    done(&folder, &["rebuild", "based", "tuned", "--base", "base", "--out", "from-base"]);
    for (args, words) in [
        (&["extract", "base", "base", "--out", "none"][..], "no matrix that is taken differs"),
        (&["extract", "base", "lora", "--out", "none"], "adapter"),
        (&["rebuild", "kept", "third", "--out", "none"], "no model `third`; there are 0: lora, 1: other"),
        (
            &["rebuild", "kept", "0", "--base", "base", "--out", "none"],
            "merged without a base; leave out --base",
        ),
        (&["rebuild", "base", "0", "--out", "none"], "reversible.safetensors"),
        (&["rebuild", "kept", "0", "--out", "kept"], "whose other models would be lost"),
        (
            &["rebuild", "based", "0", "--base", "tuned", "--out", "none"],
            "relative to a base with other weights",
        ),
    ] {
        let error = failed(&folder, args);
        assert!(error.contains(words), "{args:?}: {error}");
    }
    assert!(!folder.0.join("none").exists());
}
