//! Tokenizers and chat templates: what transformers says about three tiny models, and files that are refused.

use crate::support::folder::Folder;
use crate::support::vectors;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tiebeam::store::gguf::Gguf;
use tiebeam::text::{Message, Words};

fn folder(model: &str) -> PathBuf {
    vectors().join("llm").join(model)
}

fn expected(model: &str) -> Value {
    let text = std::fs::read_to_string(folder(model).join("expected.json")).expect("the vectors");
    serde_json::from_str(&text).expect("JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("tokens").iter().map(|id| id.as_u64().expect("a token") as u32).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

/// Compares everything that does not depend on how a blank at the start is treated.
fn is_as_expected(words: &Words, expected: &Value) {
    for row in expected["texts"].as_array().expect("texts") {
        let tokens = ids(&row["tokens"]);
        assert_eq!(words.encode(text(&row["text"])).unwrap(), tokens, "{row}");
        assert_eq!(words.decode(&tokens).unwrap(), text(&row["decoded"]), "{row}");
        let begun = usize::from(words.bos().is_some());
        assert_eq!(words.encode_plain(text(&row["text"])).unwrap(), tokens[begun..], "{row}");
    }
    surroundings_are_as_expected(words, expected);
}

fn surroundings_are_as_expected(words: &Words, expected: &Value) {
    let messages: Vec<Message> = serde_json::from_value(expected["messages"].clone()).expect("messages");
    let rendered = words.chat().expect("a template").render(&messages, true).unwrap();
    assert_eq!(rendered, text(&expected["rendered"]));
    assert_eq!(words.encode_chat(&rendered).unwrap(), ids(&expected["chat"]));
    assert_eq!(words.ends(), ids(&expected["ends"]));
    assert_eq!(words.bos().map(u64::from), expected["bos"].as_u64());
    assert_eq!(words.size() as u64, expected["vocabulary"].as_u64().expect("a size"));
}

#[test]
fn folders_are_read_as_transformers_reads_them() {
    for (model, kind) in [
        ("llama3", "byte-level BPE, llama-bpe"),
        ("qwen2", "byte-level BPE, qwen2"),
        ("mistral", "sentencepiece BPE"),
    ] {
        let words = Words::open(&folder(model)).unwrap();
        assert_eq!(words.kind(), kind);
        is_as_expected(&words, &expected(model));
    }
}

#[test]
fn a_gguf_file_says_the_same_as_its_folder() {
    let words = Words::open(&folder("llama3").join("model.gguf")).unwrap();
    assert_eq!(words.kind(), "byte-level BPE, llama-bpe");
    is_as_expected(&words, &expected("llama3"));
}

/// A tokenizer is the same in the folder into which it is written, also one of a GGUF file.
#[test]
fn a_tokenizer_that_was_written_is_the_same() {
    for (model, file) in [
        ("llama3", ""),
        ("qwen2", ""),
        ("mistral", ""),
        ("llama3", "model.gguf"),
        ("mistral", "vocabulary.gguf"),
    ] {
        let to = Folder::new("words-saved");
        let path = folder(model).join(file);
        let words = Words::open(&path).unwrap();
        words.save(&to).unwrap();
        let again = Words::open(&to).unwrap();
        assert_eq!(
            (again.bos(), again.ends(), again.size()),
            (words.bos(), words.ends(), words.size()),
            "{path:?}"
        );
        for row in expected(model)["texts"].as_array().expect("texts") {
            let tokens = words.encode(text(&row["text"])).unwrap();
            assert_eq!(again.encode(text(&row["text"])).unwrap(), tokens, "{path:?}: {row}");
            assert_eq!(
                again.encode_plain(text(&row["text"])).unwrap(),
                words.encode_plain(text(&row["text"])).unwrap()
            );
            assert_eq!(again.decode(&tokens).unwrap(), words.decode(&tokens).unwrap(), "{path:?}: {row}");
        }
        let messages = [Message::user("Who?"), Message::assistant("I."), Message::user("Why?")];
        let rendered = |words: &Words| words.chat().map(|chat| chat.render(&messages, true).unwrap());
        assert_eq!(rendered(&again), rendered(&words), "{path:?}");
    }
}

/// Tokens by sentencepiece's own rule.
fn legacy_is_as_expected(words: &Words, expected: &Value) {
    let rows = expected["texts"].as_array().expect("texts");
    for (row, tokens) in rows.iter().zip(expected["legacy"].as_array().expect("tokens")) {
        assert_eq!(words.encode(text(&row["text"])).unwrap(), ids(tokens), "{row}");
        assert_eq!(words.decode(&ids(tokens)).unwrap(), text(&row["text"]).replace('\u{2581}', " "));
    }
    assert_eq!((words.kind(), words.ends(), words.bos()), ("sentencepiece BPE", &[2][..], Some(1)));
}

#[test]
fn sentencepiece_inside_gguf_is_read() {
    let words = Words::open(&folder("mistral").join("vocabulary.gguf")).unwrap();
    let expected = expected("mistral");
    legacy_is_as_expected(&words, &expected);
    let found = words.encode_chat("<s>[INST] x [/INST] y</s>[INST] z [/INST]").unwrap();
    let controls: Vec<u32> = found.into_iter().filter(|id| *id < 5).collect();
    assert_eq!(controls, [1, 3, 4, 2, 3, 4]);
}

/// Copies some files of a model.
fn some_files(model: &str, names: &[&str]) -> Folder {
    let to = Folder::new("words");
    for name in names {
        std::fs::copy(folder(model).join(name), to.join(name)).expect("a copy");
    }
    to
}

#[test]
fn tokenizer_model_gives_the_tokens_of_tokenizer_json() {
    let files = some_files("mistral", &["tokenizer.model", "tokenizer_config.json", "config.json"]);
    let expected = expected("mistral");
    is_as_expected(&Words::in_folder(&files).unwrap(), &expected);
    std::fs::write(files.join("tokenizer_config.json"), r#"{"legacy": true}"#).unwrap();
    legacy_is_as_expected(&Words::in_folder(&files).unwrap(), &expected);
    // Sentencepiece's rule also holds where nothing is said.
    for name in ["tokenizer_config.json", "config.json"] {
        std::fs::remove_file(files.join(name)).unwrap();
    }
    legacy_is_as_expected(&Words::in_folder(&files).unwrap(), &expected);
}

#[test]
fn streams_say_what_is_decoded_at_once() {
    for path in ["llama3", "llama3/model.gguf", "qwen2", "mistral", "mistral/vocabulary.gguf"] {
        let words = Words::open(&folder(path)).unwrap();
        let texts = [" a🙂👩‍👩‍👧\n é🇨🇭 日本 x ", "🙂", "  two", "<s>[INST]<|eot_id|>é"];
        for text in texts {
            let mut tokens = words.encode(text).unwrap();
            tokens.extend(words.encode_chat("<s><|eot_id|><|im_end|>!").unwrap());
            for end in 0..=tokens.len() {
                follows(&words, &tokens[..end]);
            }
            // Nothing is a character here in most places.
            for step in [3, 7, 11] {
                let damaged: Vec<u32> = tokens.iter().step_by(step).chain(&tokens[1..4]).copied().collect();
                follows(&words, &damaged);
            }
        }
    }
}

fn follows(words: &Words, tokens: &[u32]) {
    let (mut stream, mut said) = (words.stream(), String::new());
    for (count, token) in (1..).zip(tokens) {
        let part = stream.push(*token).unwrap();
        said.push_str(&part);
        let now = words.decode(&tokens[..count]).unwrap();
        // Only a character that is not complete is held back.
        assert_eq!(now.strip_prefix(&said).unwrap_or("?").replace('\u{fffd}', ""), "", "{said:?} of {now:?}");
        assert!(!part.contains('\u{fffd}') || now.contains('\u{fffd}'));
    }
    said.push_str(&stream.finish());
    assert_eq!(said, words.decode(tokens).unwrap());
}

#[test]
fn streams_hold_back_less_than_a_character() {
    let words = Words::open(&folder("mistral")).unwrap();
    let tokens = words.encode("a🙂🙂b").unwrap();
    let mut stream = words.stream();
    let parts: Vec<String> = tokens.iter().map(|token| stream.push(*token).unwrap()).collect();
    assert_eq!(parts.join("|"), "|a||||🙂||||🙂|b");
    assert!(words.decode(&[350]).is_err() && words.stream().push(u32::MAX).is_err());
}

#[test]
fn ends_are_those_that_the_files_name() {
    let ends = |model: Value, generation: Value, tokenizer: Value| {
        let files = some_files("llama3", &["tokenizer.json"]);
        for (name, value) in [
            ("config.json", model),
            ("generation_config.json", generation),
            ("tokenizer_config.json", tokenizer),
        ] {
            std::fs::write(files.join(name), value.to_string()).unwrap();
        }
        Words::in_folder(&files).map(|words| words.ends().to_vec()).map_err(|error| error.to_string())
    };
    let all = |eos: Value| json!({"eos_token_id": eos, "vocab_size": 335});
    assert_eq!(ends(all(json!(5)), json!({}), json!({})).unwrap(), [5]);
    assert_eq!(ends(all(json!([7, 5, 7])), all(Value::Null), json!({})).unwrap(), [7, 5]);
    assert_eq!(ends(all(json!(5)), all(json!([8, 9])), json!({})).unwrap(), [8, 9]);
    assert_eq!(
        ends(all(Value::Null), json!({}), json!({"eos_token": {"content": "<|eot_id|>"}})).unwrap(),
        [334]
    );
    assert_eq!(ends(json!({}), json!({}), json!({})).unwrap(), [0u32; 0]);
    assert!(ends(all(json!(335)), json!({}), json!({})).unwrap_err().contains("token 335"));
    assert!(
        ends(all(json!("</s>")), json!({}), json!({})).unwrap_err().contains("eos_token_id of config.json")
    );
}

#[test]
fn lengths_of_a_training_do_not_cut_texts() {
    let files = some_files("llama3", &["tokenizer.json"]);
    let path = files.join("tokenizer.json");
    let mut whole: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    whole["truncation"] =
        json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    whole["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    std::fs::write(&path, whole.to_string()).unwrap();
    let words = Words::in_folder(&files).unwrap();
    assert_eq!(words.encode("x").unwrap().len(), 2);
    assert_eq!(words.decode(&words.encode("as long as it is").unwrap()).unwrap(), "as long as it is");
}

/// A value of GGUF metadata.
enum Meta<'a> {
    Number(u32),
    Flag(bool),
    Text(&'a str),
    Texts(Vec<String>),
    Numbers(Vec<i32>),
    Floats(Vec<f32>),
}
use Meta::{Flag, Floats, Number, Numbers, Text, Texts};

fn bytes(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn list(kind: u32, count: usize, items: Vec<u8>) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &(count as u64).to_le_bytes(), &items].concat()
}

/// Writes a GGUF file without tensors.
fn gguf(path: &Path, metadata: &[(&str, Meta)]) {
    let mut all = b"GGUF\x03\0\0\0".to_vec();
    all.extend([0, metadata.len() as u64].into_iter().flat_map(u64::to_le_bytes));
    for (key, value) in metadata {
        let (kind, value) = match value {
            Number(number) => (4u32, number.to_le_bytes().to_vec()),
            Flag(flag) => (7, vec![u8::from(*flag)]),
            Text(text) => (8, bytes(text)),
            Texts(all) => (9, list(8, all.len(), all.iter().flat_map(|text| bytes(text)).collect())),
            Numbers(all) => (9, list(5, all.len(), all.iter().flat_map(|n| n.to_le_bytes()).collect())),
            Floats(all) => (9, list(6, all.len(), all.iter().flat_map(|n| n.to_le_bytes()).collect())),
        };
        let name = format!("tokenizer.{key}");
        all.extend([bytes(&name), kind.to_le_bytes().to_vec(), value].concat());
    }
    std::fs::write(path, all).unwrap();
}

/// A small vocabulary of byte-level BPE: all bytes, the results of some merges, two control tokens.
fn small() -> (Vec<String>, Vec<String>) {
    let alphabet = ('!'..='~').chain('¡'..='¬').chain('®'..='ÿ').chain('\u{100}'..='\u{143}');
    let merges = ["1 2", "3 4", "12 34", "5 6", "1234 56", "Ċ Ċ", "h i", "12 3", "4 56", "' S"]
        .map(String::from)
        .to_vec();
    let joined = merges.iter().map(|merge| merge.replace(' ', ""));
    let tokens: Vec<String> = alphabet.map(String::from).chain(joined).collect();
    ([tokens, vec!["<|eot|>".into(), "<|end|>".into()]].concat(), merges)
}

/// Reads a file of the small vocabulary with other metadata in addition.
fn with<'a>(pre: &'a str, mut more: Vec<(&'a str, Meta<'a>)>) -> Result<Words, String> {
    let folder = Folder::new("words");
    let path = folder.join("model.gguf");
    let (tokens, merges) = small();
    let kinds = tokens.iter().map(|token| if token.starts_with("<|") { 3 } else { 1 }).collect();
    let mut all = vec![("ggml.pre", Text(pre)), ("ggml.model", Text("gpt2"))];
    all.extend([
        ("ggml.tokens", Texts(tokens)),
        ("ggml.merges", Texts(merges)),
        ("ggml.token_type", Numbers(kinds)),
    ]);
    all.retain(|(key, _)| more.iter().all(|(other, _)| other != key));
    all.append(&mut more);
    gguf(&path, &all);
    Words::of_gguf(&Gguf::open(&path).unwrap()).map_err(|error| error.to_string())
}

const ONE: &str = "12345612 it'S 1234 hi\n\n\n123456!!\n";
const TWO: &str = "hi'S 56'S  \n\n 12e\u{301}HI+'s";

/// Rules with their tokens of both texts by Python's `tokenizers` 0.23, from the expressions of the models' own files.
const CUT: [(&str, &[u32], &[u32]); 7] = [
    (
        "gpt-2",
        &[260, 256, 220, 72, 83, 6, 50, 220, 258, 220, 262, 261, 198, 260, 0, 0, 198],
        &[262, 6, 50, 220, 259, 6, 50, 220, 220, 261, 220, 256, 68, 136, 223, 39, 40, 10, 6, 82],
    ),
    (
        "smollm",
        &[
            16, 17, 18, 19, 20, 21, 16, 17, 220, 72, 83, 6, 50, 220, 16, 17, 18, 19, 220, 262, 261, 198, 16,
            17, 18, 19, 20, 21, 0, 0, 198,
        ],
        &[262, 6, 50, 220, 20, 21, 6, 50, 220, 220, 261, 220, 16, 17, 68, 136, 223, 39, 40, 10, 6, 82],
    ),
    (
        "llama-bpe",
        &[263, 264, 256, 220, 72, 83, 265, 220, 263, 19, 220, 262, 261, 198, 263, 264, 0, 0, 198],
        &[262, 265, 220, 259, 265, 220, 220, 261, 220, 256, 68, 136, 223, 39, 40, 10, 6, 82],
    ),
    (
        "qwen2",
        &[
            16, 17, 18, 19, 20, 21, 16, 17, 220, 72, 83, 265, 220, 16, 17, 18, 19, 220, 262, 261, 198, 16,
            17, 18, 19, 20, 21, 0, 0, 198,
        ],
        // Its e and accent become one character first.
        &[262, 265, 220, 20, 21, 265, 220, 220, 261, 220, 16, 17, 127, 102, 39, 40, 10, 6, 82],
    ),
    (
        // Qwen2's rule without that.
        "deepseek-r1-qwen",
        &[
            16, 17, 18, 19, 20, 21, 16, 17, 220, 72, 83, 265, 220, 16, 17, 18, 19, 220, 262, 261, 198, 16,
            17, 18, 19, 20, 21, 0, 0, 198,
        ],
        &[262, 265, 220, 20, 21, 265, 220, 220, 261, 220, 16, 17, 68, 136, 223, 39, 40, 10, 6, 82],
    ),
    (
        "tekken",
        &[
            16, 17, 18, 19, 20, 21, 16, 17, 220, 72, 83, 265, 220, 16, 17, 18, 19, 220, 262, 261, 198, 16,
            17, 18, 19, 20, 21, 0, 0, 198,
        ],
        &[262, 265, 220, 20, 21, 265, 220, 220, 261, 220, 16, 17, 68, 136, 223, 39, 40, 10, 6, 82],
    ),
    (
        "default",
        &[263, 264, 256, 220, 72, 83, 6, 50, 220, 263, 19, 220, 262, 261, 198, 263, 264, 0, 0, 198],
        &[262, 6, 50, 220, 259, 6, 50, 220, 220, 261, 220, 256, 68, 136, 223, 39, 40, 10, 6, 82],
    ),
];

#[test]
fn each_rule_cuts_text_in_its_own_way() {
    for (pre, one, two) in CUT {
        // Without the key bos_token_id there is no BOS that could be added.
        let words = with(pre, vec![]).unwrap();
        assert_eq!(words.encode(ONE).unwrap(), one, "{pre}");
        assert_eq!(words.encode(TWO).unwrap(), two, "{pre}");
        assert_eq!(words.kind(), format!("byte-level BPE, {pre}"));
    }
    for (other, name) in [("falcon3", "llama-bpe"), ("mellum", "gpt-2"), ("megrez", "deepseek-r1-qwen")] {
        assert_eq!(with(other, vec![]).unwrap().kind(), format!("byte-level BPE, {name}"));
    }
}

#[test]
fn bos_and_ends_are_those_of_the_gguf_file() {
    let (bos, eos) = (("ggml.bos_token_id", Number(267)), ("ggml.eos_token_id", Number(5)));
    let words = with("gpt-2", vec![bos, eos, ("ggml.add_bos_token", Flag(true))]).unwrap();
    assert_eq!(words.encode("hi 12").unwrap(), [267, 262, 220, 256]);
    assert_eq!(words.encode("<|end|>").unwrap().len(), 8);
    assert_eq!(words.encode_chat("hi<|end|>").unwrap(), [267, 262, 267]);
    assert_eq!((words.bos(), words.ends()), (Some(267), &[5, 267][..]));
    // What texts end with is not written, whatever its type is.
    assert_eq!(words.decode(&[5, 262, 267]).unwrap(), "hi");
    // Where nothing is said, Llama 3 begins texts with BOS, GPT-2 does not, and Llama 2 does.
    let of = |pre: &str| with(pre, vec![("ggml.bos_token_id", Number(266))]).unwrap().bos();
    assert_eq!((of("llama3"), of("gpt-2")), (Some(266), None));
    let more = vec![("ggml.eos_token_id", Number(262)), ("ggml.eot_token_id", Number(266))];
    assert_eq!(with("qwen2", more).unwrap().ends(), [262, 266, 267]);
    // The token that is BOS in Qwen2's files, where no text gets it, also ends texts.
    let more = || vec![("ggml.eos_token_id", Number(266)), bos_of(267), ("ggml.add_bos_token", Flag(false))];
    let words = with("qwen2", more()).unwrap();
    assert_eq!((words.ends(), words.encode_chat("hi").unwrap()), (&[266, 267][..], vec![262]));
    // Converters have called added tokens user-defined.
    let mut kinds = vec![1; 268];
    kinds[267] = 4;
    let words =
        with("gpt-2", vec![("ggml.eos_token_id", Number(5)), ("ggml.token_type", Numbers(kinds))]).unwrap();
    assert_eq!((words.ends(), words.decode(&[262, 267]).unwrap()), (&[5, 267][..], "hi".to_string()));
}

fn bos_of(id: u32) -> (&'static str, Meta<'static>) {
    ("ggml.bos_token_id", Number(id))
}

/// As in llama.cpp. Folders are read as transformers reads them, which takes what the template wrote.
#[test]
fn conversations_of_a_gguf_file_begin_with_bos_once() {
    let words = with("llama3", vec![bos_of(266)]).unwrap();
    assert_eq!(words.encode_chat("hi").unwrap(), [266, 262]);
    assert_eq!(words.encode_chat("<|eot|>hi").unwrap(), [266, 262]);
    assert_eq!(with("gpt-2", vec![bos_of(266)]).unwrap().encode_chat("hi").unwrap(), [262]);
    let folder = Words::open(&folder("llama3")).unwrap();
    assert_eq!(folder.encode_chat("hi").unwrap(), folder.encode_plain("hi").unwrap());
}

/// Files as they are published have such faults, which change no token of any text.
#[test]
fn harmless_faults_of_a_gguf_file_are_passed_over() {
    let (mut tokens, _) = small();
    tokens.extend(["", ""].map(String::from));
    let kinds = vec![1; tokens.len()];
    let more = vec![
        ("ggml.tokens", Texts(tokens)),
        ("ggml.token_type", Numbers(kinds)),
        ("ggml.padding_token_id", Number(u32::MAX)),
        ("ggml.unknown_token_id", Number(270)),
        ("chat_template", Text("{{ messages[0].content }}{{ pad_token }}")),
    ];
    let words = with("gpt-2", more).unwrap();
    assert_eq!(words.encode(ONE).unwrap(), CUT[0].1);
    assert_eq!(words.chat().unwrap().render(&[Message::user("hi")], true).unwrap(), "hi");
}

#[test]
fn what_is_not_known_or_contradicts_itself_is_refused() {
    let says = |pre: &str, more: Vec<(&str, Meta)>, what: &str| {
        let error = with(pre, more).err().expect(what);
        assert!(error.contains(what), "{error}");
    };
    says("deepseek-coder", vec![], "'deepseek-coder'");
    says("gpt-2", vec![("ggml.model", Text("t5"))], "'t5'");
    says("gpt-2", vec![("ggml.eos_token_id", Number(268))], "eos_token_id is 268");
    says("gpt-2", vec![("ggml.add_bos_token", Flag(true))], "no tokenizer.ggml.bos_token_id");
    says("gpt-2", vec![("ggml.merges", Texts(vec!["h x".into()]))], "hx");
    says("gpt-2", vec![("ggml.merges", Texts(vec!["hi".into()]))], "'hi' is not two tokens");
    says("gpt-2", vec![("ggml.merges", Text("h i"))], "no list tokenizer.ggml.merges");
    says(
        "gpt-2",
        vec![("ggml.tokens", Texts(vec!["a".into(), "a".into()])), ("ggml.token_type", Numbers(vec![1, 1]))],
        "both 'a'",
    );
    says("gpt-2", vec![("ggml.token_type", Numbers(vec![1]))], "1 values for 268 tokens");
    says("gpt-2", vec![("ggml.token_type", Numbers(vec![9; 268]))], "unknown type 9");
    says("gpt-2", vec![("chat_template", Text("{% if %}"))], "does not parse");
    says("gpt-2", vec![("chat_template", Number(1))], "chat_template is no text");
    says("default", vec![("ggml.model", Text("llama"))], "no list tokenizer.ggml.scores");
    let scores = ("ggml.scores", Floats(vec![0.0; 268]));
    says("default", vec![("ggml.model", Text("llama")), scores], "no tokens for single bytes");
    // Pieces are cut everywhere, and control tokens are searched in every text, which would take hours.
    for (model, kind) in [("llama", 1), ("llama", 4), ("gpt2", 3)] {
        let long = "a".repeat(1 << 20);
        let more = vec![
            ("ggml.model", Text(model)),
            ("ggml.tokens", Texts(vec!["<unk>".into(), "b".into(), "c".into(), long])),
            ("ggml.token_type", Numbers(vec![2, 1, 1, kind])),
            ("ggml.scores", Floats(vec![0.0; 4])),
            ("ggml.merges", Texts(vec![])),
        ];
        says("default", more, "the token 'aaaaaaaaaaaaaaaaaaaa...' has 1048576 bytes, over 1024");
    }
}

#[test]
fn damaged_folders_are_refused() {
    let says = |name: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>, what: &str| {
        let files = some_files("mistral", &["tokenizer.model", "tokenizer_config.json", "config.json"]);
        let path = files.join(name);
        std::fs::write(&path, change(std::fs::read(&path).unwrap_or_default())).unwrap();
        let error = Words::in_folder(&files).err().expect(what).to_string();
        assert!(error.contains(what), "{error}");
    };
    says("config.json", &|data| data[..40].to_vec(), "it is no JSON");
    says("tokenizer.json", &|_| b"{}".to_vec(), "tokenizer.json");
    says("tokenizer.model", &|_| Vec::new(), "it has no pieces");
    says("tokenizer.model", &|_| b"IQ== 0\nIg== 1\n".to_vec(), "no file of sentencepiece");
    says("tokenizer_config.json", &|_| br#"{"bos_token": "<bos>"}"#.to_vec(), "'<bos>'");
    says("added_tokens.json", &|_| br#"{"<new>": 900}"#.to_vec(), "cannot have the id 900");
    says("chat_template.jinja", &|_| b"{{ messages".to_vec(), "does not parse");
    // Cut anywhere, the file is an error or has fewer pieces, but it never panics.
    let whole = std::fs::read(folder("mistral").join("tokenizer.model")).unwrap();
    let files = some_files("mistral", &["tokenizer.model"]);
    for end in (0..whole.len()).step_by(97) {
        std::fs::write(files.join("tokenizer.model"), &whole[..end]).unwrap();
        assert!(Words::in_folder(&files).is_err(), "{end} of {} bytes", whole.len());
    }
    let empty = Folder::new("words");
    assert!(
        Words::in_folder(&empty).err().expect("no tokenizer").to_string().contains("neither tokenizer.json")
    );
    // A unigram model has the same form with another number in its settings.
    let at = whole.windows(2).rposition(|pair| pair == [0x18, 2]).expect("the kind of model");
    says(
        "tokenizer.model",
        &|mut data| {
            data[at + 1] = 1;
            data
        },
        "unigram",
    );
}

#[test]
fn a_tokenizer_json_that_contradicts_itself_is_refused() {
    let says = |change: &dyn Fn(&mut Value), what: &str| {
        let files = some_files("mistral", &["tokenizer.json"]);
        let path = files.join("tokenizer.json");
        let mut whole: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut whole);
        std::fs::write(&path, whole.to_string()).unwrap();
        let error = Words::in_folder(&files).err().expect(what).to_string();
        assert!(error.contains(what), "{error}");
    };
    says(&|all| all["post_processor"]["special_tokens"] = json!({}), "'<s>' around texts");
    says(&|all| all["post_processor"]["single"][1]["Sequence"]["id"] = json!("B"), "a second text");
    says(&|all| all["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([900]), "token 900");
    says(&|all| all["model"]["continuing_subword_prefix"] = json!("##"), "a prefix");
    says(&|all| all["model"]["merges"][0] = json!(["x", "no such token"]), "no such token");
    says(&|all| all["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), "WordPiece");
    says(&|all| all["model"]["type"] = json!("Unheard"), "tokenizer.json");
}

#[test]
fn templates_may_refuse_messages() {
    let words = Words::open(&folder("mistral")).unwrap();
    let chat = words.chat().unwrap();
    let error = chat.render(&[Message::user("a"), Message::user("b")], true).unwrap_err().to_string();
    assert!(error.contains("Roles must alternate between user and assistant."), "{error}");
    let words = Words::open(&folder("llama3")).unwrap();
    let messages = [Message::system(" be kind "), Message::user("a"), Message::new("tool", "b")];
    let error = words.chat().unwrap().render(&messages, true).unwrap_err().to_string();
    assert!(error.contains("Unknown role tool"), "{error}");
    let rendered = words.chat().unwrap().render(&messages[..2], false).unwrap();
    assert!(rendered.ends_with(
        "system<|end_header_id|>\n\nbe kind<|eot_id|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
    ));
}

#[test]
fn words_are_shared_by_threads() {
    let words = Words::open(&folder("llama3")).unwrap();
    let chat = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4).map(|_| scope.spawn(|| words.encode_chat("<|eot_id|>a").unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(chat.iter().all(|tokens| tokens.len() == 2 && tokens[0] == 334), "{chat:?}");
}
