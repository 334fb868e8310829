//! `tiebeam merge`.

use crate::merges::*;
use crate::{command, text};
use std::collections::BTreeMap;
use std::process::Output;
use tiebeam::merge::{Permutation, Shards, Spec, Weights};
use tiebeam::store::{Entry, File, save};

fn tiebeam(folder: &Folder, args: &[&str]) -> Output {
    command().args(args).current_dir(&folder.0).output().expect("the binary runs")
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
    assert!(Shards::open(folder.0.join("out")).unwrap().names().len() == 15);
    let readme = folder.write("out/README.md", "mine");
    let again = || tiebeam(&folder, &["merge", "merges/m.yaml", "--out", "out"]);
    assert!(again().status.success());
    assert_eq!(std::fs::read_to_string(&readme).unwrap(), "mine");
    let changed = folder.write("out/tokenizer.json", "changed");
    let run = again();
    assert!(!run.status.success() && text(&run.stderr).contains("tokenizer.json is not as it was written"));
    assert_eq!(std::fs::read_to_string(&changed).unwrap(), "changed");
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

/// Networks `a` and `b` that were trained on the digits, and `data` with rows of them.
pub(crate) fn networks(test: &str) -> Folder {
    let file = File::open(crate::support::matching_vectors("wm_mlp.safetensors")).unwrap();
    let folder = Folder::new(test);
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
    folder
}

/// Two networks that were trained separately: their average fails unless they are aligned. The reference vectors have both
/// losses.
#[test]
fn aligned_and_evaluated() {
    let file = File::open(crate::support::matching_vectors("wm_mlp.safetensors")).unwrap();
    let folder = networks("align");
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
        // Restarts may find a better optimum than the single run of the vectors.
        match kind {
            "naive" => {
                assert!((numbers[0] - loss).abs() < 1e-3 && (numbers[1] - accuracy).abs() < 1e-4, "{report}");
            }
            _ => assert!(numbers[0] < loss + 0.05 && numbers[1] > accuracy - 0.03, "{report}"),
        }
        assert_eq!(report.contains("each assignment proved best"), name == "aligned", "{report}");
    }
    folder.write("bad.yaml", &format!("{config}align: {{spec: llama}}\n"));
    let message = text(&tiebeam(&folder, &["merge", "bad.yaml", "--out", "x"]).stderr);
    assert!(message.contains("config.json"), "{message}");
}

/// What is chosen where files leave a choice is said, and a name of the hub stands for what is in its cache.
#[test]
fn models_of_the_hub_and_what_is_said() {
    let folder = Folder::new("hub");
    three(&folder);
    let snapshot = folder.0.join("cache/models--owner--name/snapshots/1");
    std::fs::create_dir_all(snapshot.parent().unwrap()).unwrap();
    std::fs::rename(folder.0.join("a"), &snapshot).unwrap();
    folder.write("m.yaml", "merge_method: average\nmodels: [{model: owner/name}, {model: b}]\n");
    let run = |cache: &str| {
        let args = ["merge", "m.yaml", "--out", "out", "--json=lines.jsonl"];
        command()
            .args(args)
            .current_dir(&folder.0)
            .env("HF_HUB_CACHE", cache)
            .output()
            .expect("the binary runs")
    };
    let cache = folder.0.join("cache");
    let done = run(cache.to_str().unwrap());
    let said = text(&done.stderr);
    assert!(done.status.success(), "{said}");
    for words in ["is in the cache of Hugging Face's hub", "not copied from", "notes.txt"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let lines = std::fs::read_to_string(folder.0.join("lines.jsonl")).unwrap();
    let merged = lines.lines().find(|line| line.contains("\"merged\"")).expect("a line");
    assert!(merged.contains("notes.txt"), "{merged}");
    let said = text(&run("elsewhere").stderr);
    assert!(said.contains("`hf download owner/name` puts it into elsewhere"), "{said}");
}

/// Data in integers are read as `tiebeam merge` reads them, and numbers of heads are those of config.json.
#[test]
fn integers_as_data_and_heads_by_hand() {
    use tiebeam::store::FileDType;
    let folder = Folder::new("by-hand");
    let floats = |values: &[f32]| bytemuck::cast_slice(values).to_vec();
    for (name, sign) in [("a", 1.0), ("b", -1.0)] {
        let layers = [
            Entry::bytes("fc0.weight", FileDType::F32, &[3, 2], floats(&[sign, 0.5, 0.25, sign, 1.0, -1.0])),
            Entry::bytes("fc1.weight", FileDType::F32, &[2, 3], floats(&[1.0, sign, 0.0, 0.5, 0.0, sign])),
        ];
        save(folder.0.join(format!("{name}.safetensors")), layers, &BTreeMap::new()).unwrap();
    }
    let data = |labels: [u8; 2]| {
        let x = Entry::bytes("x", FileDType::U8, &[2, 1, 2], vec![0, 16, 8, 4]);
        let y = Entry::bytes("y", FileDType::U8, &[2], labels.to_vec());
        save(folder.0.join("data.safetensors"), [x, y], &BTreeMap::new()).unwrap();
    };
    let barrier =
        || tiebeam(&folder, &["barrier", "a.safetensors", "b.safetensors", "--data", "data.safetensors"]);
    data([0, 1]);
    let run = barrier();
    assert!(run.status.success(), "{}", text(&run.stderr));
    data([0, 2]);
    let said = text(&barrier().stderr);
    assert!(said.contains("label 2 of row 1 is none of the network's 2"), "{said}");
    three(&folder);
    folder.write("a/config.json", r#"{"num_attention_heads": 6, "num_key_value_heads": 2}"#);
    let said = text(&tiebeam(&folder, &["match", "a", "b", "--spec", "llama:3:3"]).stderr);
    assert!(said.contains("3 heads and 3 key and value heads were given"), "{said}");
}

/// A permuted model has the bits of the original, in every type, and its inverse is the original.
#[test]
fn permuted_models_keep_their_bits() {
    use tiebeam::store::FileDType;
    let folder = Folder::new("bits");
    // Values that f32 does not have, and any bits among the biases.
    let doubles = |n: u64| (0..n).flat_map(|i| (0.1 * i as f64).to_le_bytes()).collect::<Vec<u8>>();
    let layers = [
        Entry::bytes("fc0.weight", FileDType::F64, &[4, 3], doubles(12)),
        Entry::bytes("fc0.bias", FileDType::BF16, &[4], vec![0, 1, 2, 3, 0xff, 0x7f, 6, 7]),
        Entry::bytes("fc1.weight", FileDType::F32, &[2, 4], doubles(4)),
    ];
    save(folder.0.join("b.safetensors"), layers, &BTreeMap::new()).unwrap();
    let axes =
        r#"{"groups": [{"name": "P0", "axes": [["fc0.weight", 0], ["fc0.bias", 0], ["fc1.weight", 1]]}]}"#;
    let orders = BTreeMap::from([("P0".to_string(), vec![2, 0, 3, 1])]);
    let permutation = Permutation::new(Spec::from_json(axes).unwrap(), orders).unwrap();
    permutation.save(folder.0.join("p.safetensors"), &BTreeMap::new()).unwrap();
    let run = |args: &[&str]| {
        let done = tiebeam(&folder, args);
        assert!(done.status.success(), "{args:?}: {}", text(&done.stderr));
    };
    run(&["match", "apply", "p.safetensors", "b.safetensors", "--out", "moved.safetensors"]);
    run(&["match", "apply", "p.safetensors", "moved.safetensors", "--out", "back.safetensors", "--inverse"]);
    let [b, moved, back] = ["b", "moved", "back"]
        .map(|name| Shards::open(folder.0.join(format!("{name}.safetensors"))).unwrap());
    for name in b.names() {
        assert_eq!(b.info(&name).unwrap().dtype, moved.info(&name).unwrap().dtype, "{name}");
        assert_eq!(b.bytes(&name).unwrap(), back.bytes(&name).unwrap(), "{name}");
    }
    assert_eq!(moved.bytes("fc0.bias").unwrap(), [0xff, 0x7f, 0, 1, 6, 7, 2, 3]);
    assert_eq!(moved.bytes("fc0.weight").unwrap()[..24], doubles(12)[48..72]);
    assert_eq!(moved.bytes("fc1.weight").unwrap()[..4], b.bytes("fc1.weight").unwrap()[8..12]);
}
