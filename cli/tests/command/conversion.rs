//! Folders that `tiebeam quantise` turns into GGUF files: names, order, tokenizer and metadata.

use crate::quantise::{copied, is_linear, model, plain, quantise, refusal, same, scores, written};
use crate::support::folder::Folder;
use crate::text;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;
use tiebeam::models::llama::Form as Kept;
use tiebeam::quant::{Form, Rounding};
use tiebeam::store::gguf::Gguf;
use tiebeam::text::{Message, Words};

/// Rows of q and k have another order in the file of a Llama, and the tokenizer is written anew.
#[test]
fn folders_become_gguf_files() {
    let folder = Folder::new("quantise-convert");
    for family in ["llama3", "qwen2", "mistral"] {
        let [out, want] = [".gguf", ""].map(|end| folder.join(format!("{family}{end}")));
        let name = out.to_str().expect("UTF-8");
        written(&folder, &model(family), &["--format", "gguf", "--bits", "8", "--out", name]);
        let eight = Rounding::new(8, Form::Symmetric);
        let is_rounded = |name: &str| {
            is_linear(name) && !name.contains("down") || ["lm_head", "embed"].iter().any(|n| name.contains(n))
        };
        plain(family, &want, |name| is_rounded(name).then_some(eight));
        same(family, &scores(&out, family, Kept::Stored), &scores(&want, family, Kept::F32));
        let [got, own] = [&out, &model(family)].map(|path| Words::open(path).expect("a tokenizer"));
        let text = std::fs::read_to_string(model(family).join("expected.json")).expect("vectors");
        let json: Value = serde_json::from_str(&text).expect("JSON");
        // A GGUF file has sentencepiece's own rule of blanks before texts.
        let legacy = json["legacy"].as_array();
        for (i, row) in json["texts"].as_array().expect("texts").iter().enumerate() {
            let text = row["text"].as_str().expect("a text");
            let want = match legacy {
                Some(all) => serde_json::from_value(all[i].clone()).expect("tokens"),
                None => own.encode(text).expect("tokens"),
            };
            assert_eq!(got.encode(text).expect("tokens"), want, "{family}: {text:?}");
        }
        assert_eq!((got.bos(), got.chat().is_some()), (own.bos(), own.chat().is_some()), "{family}");
        let sorted = |words: &Words| words.ends().iter().copied().collect::<BTreeSet<u32>>();
        assert_eq!(sorted(&got), sorted(&own), "{family}");
        let all = [Message::user("Who was Noah?")];
        let chat = |words: &Words| words.chat().map(|chat| chat.render(&all, true).expect("rendered"));
        assert_eq!(chat(&got), chat(&own), "{family}");
    }
    // The file of the vectors was made by another program.
    written(&folder, &model("llama3/model.gguf"), &["--bits", "8", "--out", "other.gguf"]);
    let [ours, other] =
        ["llama3.gguf", "other.gguf"].map(|name| Gguf::open(folder.join(name)).expect("written"));
    assert_eq!(ours.names().collect::<Vec<_>>(), other.names().collect::<Vec<_>>());
    for name in ours.names().filter(|name| *name != "rope_freqs.weight") {
        assert_eq!(ours.tensor_f32(name).expect("read"), other.tensor_f32(name).expect("read"), "{name}");
    }
    let key = |key: &String| !key.starts_with("tokenizer.");
    for (key, value) in other.metadata().iter().filter(|(name, _)| key(name)) {
        assert_eq!(ours.metadata().get(key), Some(value), "{key}");
    }
    let lone = Folder::new("quantise-lone");
    plain("llama3", &lone.join("m"), |_| None);
    let said = refusal(&lone, &lone.join("m"), &["--format", "gguf", "--out", "out.gguf"]);
    assert!(said.contains("neither tokenizer.json nor tokenizer.model"), "{said}");
    assert_eq!(lone.names(), ["m"]);
}

/// A folder of one of the vectors with other values of a JSON file.
fn edited(folder: &Folder, name: &str, file: &str, edit: impl Fn(&mut Value)) -> PathBuf {
    let source = copied(folder, name);
    let path = source.join(file);
    let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).expect("text")).expect("JSON");
    edit(&mut json);
    std::fs::write(&path, json.to_string()).expect("written");
    source
}

/// Base models name one end, and have the tokens that end a message too. A tokenizer that does not compose accents has a rule of its
/// own name.
#[test]
fn gguf_files_end_answers_where_their_folders_do() {
    let folder = Folder::new("quantise-ends");
    let source = edited(&folder, "qwen2", "generation_config.json", |json| json["eos_token_id"] = 312.into());
    written(&folder, &source, &["--format", "gguf", "--bits", "8", "--out", "one.gguf"]);
    let [own, got] = [&source, &folder.join("one.gguf")].map(|path| Words::open(path).expect("a tokenizer"));
    assert!(own.ends().contains(&312) && own.ends().iter().all(|end| got.ends().contains(end)));
    // Ends that are known by their texts need no key, so that there may be more than three.
    let many = Folder::new("quantise-many-ends");
    let ends = |all: &'static [u32]| move |json: &mut Value| json["eos_token_id"] = serde_json::json!(all);
    let source = edited(&many, "qwen2", "generation_config.json", ends(&[5, 6, 310, 312]));
    written(&many, &source, &["--format", "gguf", "--bits", "8", "--out", "four.gguf"]);
    let got = Words::open(&many.join("four.gguf")).expect("a tokenizer");
    assert!([5, 6, 310, 312].iter().all(|end| got.ends().contains(end)), "{:?}", got.ends());
    let more = Folder::new("quantise-more-ends");
    let source = edited(&more, "qwen2", "generation_config.json", ends(&[5, 6, 7, 8, 310]));
    let said = refusal(&more, &source, &["--format", "gguf", "--bits", "8", "--out", "five.gguf"]);
    assert!(said.contains("more than three ends of an answer"), "{said}");
    let nfc = serde_json::json!({"type": "Sequence", "normalizers": [{"type": "NFC"}]});
    for (normalizer, rule) in [(Value::Null, "deepseek-r1-qwen"), (nfc, "qwen2")] {
        let inner = Folder::new("quantise-accents");
        let source =
            edited(&inner, "qwen2", "tokenizer.json", |json| json["normalizer"] = normalizer.clone());
        written(&inner, &source, &["--format", "gguf", "--bits", "8", "--out", "a.gguf"]);
        let file = Gguf::open(inner.join("a.gguf")).expect("written");
        assert_eq!(file.text("tokenizer.ggml.pre").expect("a rule"), rule);
    }
}

/// Sentencepiece's rule in GGUF files puts a blank before each message of a conversation, which newer folders do not.
#[test]
fn other_tokens_of_conversations_are_told() {
    let folder = Folder::new("quantise-chat");
    for (name, told) in [("mistral", true), ("llama3", false)] {
        let done = quantise(&folder, &model(name), &["--format", "gguf", "--out", "a.gguf"]);
        let said = text(&done.stderr);
        assert!(done.status.success(), "{said}");
        assert_eq!(
            said.contains("a conversation gets other tokens than in the folder"),
            told,
            "{name}: {said}"
        );
    }
    // llama.cpp begins a conversation with BOS that its template does not write.
    let source = copied(&folder, "llama3");
    let template = "{% for message in messages %}{{ message.content }}{% endfor %}";
    std::fs::write(source.join("chat_template.jinja"), template).expect("written");
    let said = text(&quantise(&folder, &source, &["--format", "gguf", "--out", "b.gguf"]).stderr);
    assert!(said.contains("a conversation begins with BOS in a GGUF file, and not in the folder"), "{said}");
}

/// llama.cpp asks for some values by types that are not the usual ones of whole numbers.
#[test]
fn values_of_a_gguf_file_keep_their_types() {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let short = [text("split.count"), 2u32.to_le_bytes().into(), vec![0, 0]].concat();
    let list = [9u32.to_le_bytes(), 0u32.to_le_bytes()].concat();
    let list = [text("t.charsmap"), list, 5u64.to_le_bytes().into(), vec![1, 2, 3, 4, 5]].concat();
    // Together they are two units of the file's alignment, so that the tensors stay aligned.
    assert_eq!(short.len() + list.len(), 64);
    let mut file = std::fs::read(model("llama3/model.gguf")).expect("vectors");
    let pairs = u64::from_le_bytes(file[16..24].try_into().expect("8 bytes"));
    file[16..24].copy_from_slice(&(pairs + 2).to_le_bytes());
    file.splice(24..24, [&short[..], &list].concat());
    let folder = Folder::new("quantise-types");
    std::fs::write(folder.join("in.gguf"), &file).expect("written");
    written(&folder, &folder.join("in.gguf"), &["--bits", "8", "--out", "out.gguf"]);
    let out = std::fs::read(folder.join("out.gguf")).expect("written");
    for pair in [short, list] {
        assert_eq!(out.windows(pair.len()).filter(|place| *place == pair).count(), 1);
    }
}

/// What GGUF has no rule for is refused, and not passed over.
#[test]
fn tokenizers_that_gguf_cannot_say_are_refused() {
    type Edit = fn(&mut Value);
    let edits: [(&str, Edit); 3] = [
        ("llama3", |json| json["normalizer"] = serde_json::json!({"type": "Lowercase"})),
        ("qwen2", |json| json["normalizer"] = serde_json::json!({"type": "NFKC"})),
        ("mistral", |json| {
            let last = json["added_tokens"].as_array().expect("tokens").len();
            let mut token = json["added_tokens"][last - 1].clone();
            (token["id"], token["content"]) = (350.into(), "<|new|>".into());
            json["added_tokens"].as_array_mut().expect("tokens").push(token);
        }),
    ];
    for (name, edit) in edits {
        let folder = Folder::new("quantise-tokens");
        let source = edited(&folder, name, "tokenizer.json", edit);
        let said = refusal(&folder, &source, &["--format", "gguf", "--out", "a.gguf"]);
        let reasons = ["cannot be written to a GGUF file", "has only 350 tokens"];
        assert!(reasons.iter().any(|reason| said.contains(reason)), "{name}: {said}");
        assert_eq!(folder.names(), ["m"], "{name}");
    }
}
