//! Models on disk as other programs leave them: which files are read, and what is said.

use crate::support::folder::Folder;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tiebeam::store::{Entry, File, FileDType, Shards, Weights, save};

const INDEX: &str = "model.safetensors.index.json";

fn write(path: impl AsRef<Path>, tensors: &[(&str, f32)]) {
    let entry = |&(name, x): &(&str, f32)| {
        Entry::bytes(name.to_string(), FileDType::F32, &[1], x.to_le_bytes().to_vec())
    };
    save(path.as_ref(), tensors.iter().map(entry), &BTreeMap::new()).expect("written");
}

fn shard(i: usize) -> String {
    format!("model-{i:05}-of-00002.safetensors")
}

/// A folder of two shards with `x` and `y`, and an index that `change` has changed.
fn sharded(change: impl Fn(&mut Value)) -> Folder {
    let folder = Folder::new("shards");
    write(folder.join(shard(1)), &[("x", 1.0)]);
    write(folder.join(shard(2)), &[("y", 2.0)]);
    let mut index = json!({"metadata": {"total_size": 8}, "weight_map": {"x": shard(1), "y": shard(2)}});
    change(&mut index);
    std::fs::write(folder.join(INDEX), index.to_string()).expect("written");
    folder
}

fn number(shards: &Shards, name: &str) -> f32 {
    let (file, name) = shards.find(name).expect("a tensor");
    file.tensor_f32(name).expect("a number")[0]
}

#[track_caller]
fn says(folder: &Folder, words: &str) -> Shards {
    let shards = Shards::open(folder.join("")).expect("opened");
    assert!(shards.notes().iter().any(|note| note.contains(words)), "{words}: {:?}", shards.notes());
    shards
}

fn refusal(path: impl AsRef<Path>) -> String {
    Shards::open(path).expect_err("refused").to_string()
}

#[test]
fn an_index_says_less_or_more_than_its_shards() {
    for change in [
        |index: &mut Value| drop(index.as_object_mut().unwrap().remove("metadata")),
        |index: &mut Value| index["metadata"] = Value::Null,
        |index: &mut Value| index["metadata"]["total_size"] = json!(1),
        |index: &mut Value| index["weight_map"]["y"] = json!(format!("./{}", shard(2))),
    ] {
        let shards = Shards::open(sharded(change).join("")).expect("opened");
        assert_eq!((shards.names(), shards.notes().len()), (vec!["x".to_string(), "y".into()], 0));
    }
    // A tensor that the index forgot is read, whether its shard is listed or not.
    let folder = sharded(|index| drop(index["weight_map"].as_object_mut().unwrap().remove("y")));
    assert_eq!(number(&says(&folder, "the shards have `y`, which the index does not list"), "y"), 2.0);
    let folder = sharded(|_| {});
    write(folder.join(shard(2)), &[("y", 2.0), ("z", 3.0)]);
    assert_eq!(number(&says(&folder, "`z`"), "z"), 3.0);
    // Of a tensor in two shards, the one counts that the index names.
    write(folder.join(shard(2)), &[("x", 9.0), ("y", 2.0)]);
    assert_eq!(number(&says(&folder, "several shards have `x`"), "x"), 1.0);
    // A tensor that is nowhere is missed when it is asked for.
    let folder = sharded(|index| index["weight_map"]["z"] = json!(shard(1)));
    let shards = says(&folder, "the index lists `z`, which no shard has");
    assert!(shards.find("z").unwrap_err().to_string().contains("no tensor `z`"));
    for (file, words) in [
        ("../q.safetensors", "not a file of this folder"),
        ("/q.safetensors", "not a file of this folder"),
        ("q.safetensors", "the index lists this file, which is not there"),
    ] {
        let folder = sharded(|index| index["weight_map"]["y"] = json!(file));
        assert!(refusal(folder.join("")).contains(words), "{}", refusal(folder.join("")));
    }
}

#[test]
fn a_whole_file_goes_before_an_index_beside_it() {
    let folder = sharded(|_| {});
    write(folder.join("model.safetensors"), &[("x", 7.0)]);
    let shards =
        says(&folder, "model.safetensors is read, and model.safetensors.index.json beside it is not");
    assert_eq!((number(&shards, "x"), shards.names().len()), (7.0, 1));
    // An index of just this file is nothing to speak of.
    let folder = sharded(|index| index["weight_map"] = json!({"x": "model.safetensors"}));
    write(folder.join("model.safetensors"), &[("x", 7.0)]);
    assert_eq!(Shards::open(folder.join("")).expect("opened").notes().len(), 0);
}

#[test]
fn shards_without_an_index_are_read_if_all_are_there() {
    let folder = sharded(|_| {});
    std::fs::remove_file(folder.join(INDEX)).unwrap();
    assert_eq!(number(&says(&folder, "all 2 shards are read"), "y"), 2.0);
    std::fs::remove_file(folder.join(shard(1))).unwrap();
    let said = refusal(folder.join(""));
    assert!(
        said.contains("1 of 2 shards") && said.contains("model-00001-of-00002.safetensors` is missing"),
        "{said}"
    );
}

#[test]
fn other_formats_are_named_with_what_to_do() {
    let folder = Folder::new("formats");
    for (name, bytes, words) in [
        ("a.safetensors", &b"version https://git-lfs.github.com/spec/v1\n"[..], "git lfs pull"),
        ("b.safetensors", b"PK\x03\x04\0\0\0\0\0\0", "weights_only=True"),
        ("c.safetensors", b"<!doctype html><title>Sign in</title>", "a web page"),
    ] {
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        let said = File::open(&path).expect_err(name).to_string();
        assert!(said.contains(words), "{said}");
    }
    for (name, words) in [
        ("pytorch_model.bin", "python -c"),
        ("model.gguf", "name that file"),
        ("adapter_model.safetensors", "an adapter: merge it into its model first"),
        ("consolidated.safetensors", "which can be named itself"),
    ] {
        let folder = Folder::new("formats");
        std::fs::write(folder.join(name), b"").unwrap();
        let said = refusal(folder.join(""));
        assert!(said.contains(words) && said.contains(name), "{said}");
    }
    assert!(refusal("/nowhere/owner/name").contains("`hf download owner/name`"));
    assert!(refusal("/nowhere/model+adapter").contains("one or the other is not there"));
}

/// What a header says beyond the format is passed over, and said.
#[test]
fn headers_may_say_more() {
    let folder = Folder::new("headers");
    let header =
        r#"{"__metadata__":null,"w":{"dtype":"F32","shape":[1],"strides":[1],"data_offsets":[0,4]}}"#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &2f32.to_le_bytes()].concat();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
    assert_eq!(number(&says(&folder, "`strides`"), "w"), 2.0);
}
