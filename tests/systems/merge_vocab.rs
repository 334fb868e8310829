//! Merges of models whose tokenizers differ: tables are read by token, and the output's files follow.

use crate::merges::{Folder, Tensors, model, save_model, values};
use crate::support::within;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use tiebeam::merge::{Job, MergeConfig, Shards};
use tiebeam::store::FileDType;

const TABLES: [&str; 2] = ["model.embed_tokens.weight", "lm_head.weight"];

/// A model with the tokens `vocab` by their ids, of which `added` are added ones, and `rows` rows in its tables.
struct Small {
    name: &'static str,
    vocab: Vec<&'static str>,
    added: Vec<Value>,
    tensors: Tensors,
}

impl Small {
    fn new(name: &'static str, vocab: &[&'static str], rows: usize, seed: u64) -> Small {
        let mut tensors = model(2, seed);
        let other = model(4, seed + 100);
        for name in TABLES {
            let pool: Vec<f32> = other.values().flat_map(|(_, x)| x.clone()).collect();
            let shift = if name == TABLES[0] { 0 } else { 97 };
            let x = (0..rows * 6).map(|i| pool[(i + shift) % pool.len()]).collect();
            tensors.insert(name.into(), (vec![rows, 6], x));
        }
        Small { name, vocab: vocab.to_vec(), added: Vec::new(), tensors }
    }

    fn add(mut self, text: &'static str, special: bool) -> Small {
        let id = self.vocab.len();
        self.vocab.push(text);
        self.added.push(json!({
            "id": id, "content": text, "special": special, "lstrip": true, "rstrip": false, "single_word": false, "normalized": false,
        }));
        self
    }

    fn tied(mut self) -> Small {
        self.tensors.remove(TABLES[1]);
        self
    }

    fn tokenizer(&self) -> Value {
        let plain = self.vocab.len() - self.added.len();
        let vocab: Map<String, Value> = self.vocab[..plain]
            .iter()
            .enumerate()
            .map(|(id, token)| (token.to_string(), json!(id)))
            .collect();
        let decoder =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        json!({
            "version": "1.0", "added_tokens": self.added, "decoder": decoder,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        })
    }

    fn id(&self, token: &str) -> Option<usize> {
        self.vocab.iter().position(|own| *own == token)
    }

    fn save(&self, folder: &Folder, dtype: FileDType) {
        save_model(&folder.0.join(self.name), &self.tensors, dtype);
        let tied = !self.tensors.contains_key(TABLES[1]);
        let rows = self.tensors[TABLES[0]].0[0];
        let ids = |token| self.id(token).map_or(Value::Null, |id| json!(id));
        let config = json!({
            "num_hidden_layers": 2, "tie_word_embeddings": tied, "vocab_size": rows, "bos_token_id": ids("<s>"),
            "eos_token_id": ids("</s>"), "text_config": {"vocab_size": rows, "tie_word_embeddings": tied},
        });
        let generation = json!({"eos_token_id": [ids("</s>"), ids("<s>")], "temperature": 1});
        folder.write(&format!("{}/config.json", self.name), &config.to_string());
        folder.write(&format!("{}/generation_config.json", self.name), &generation.to_string());
        folder.write(&format!("{}/tokenizer.json", self.name), &self.tokenizer().to_string());
    }

    /// The row of a token in a table, or in the table that is the head too.
    fn row(&self, table: &str, token: &str) -> Option<Vec<f32>> {
        let (_, x) = self.tensors.get(table).or(self.tensors.get(TABLES[0]))?;
        self.id(token).map(|id| x[id * 6..][..6].to_vec())
    }
}

/// The tables of a model as they would be if it had these tokens.
fn table(of: &Small, all: &[&Small], has_base: bool, table: &str, tokens: &[&str]) -> Vec<f32> {
    let one = |token: &&str| {
        let own = of.row(table, token).or_else(|| all[0].row(table, token).filter(|_| has_base));
        own.unwrap_or_else(|| {
            let rows: Vec<Vec<f32>> = all.iter().filter_map(|other| other.row(table, token)).collect();
            (0..6).map(|i| rows.iter().map(|row| row[i]).sum::<f32>() / rows.len() as f32).collect()
        })
    };
    tokens.iter().flat_map(one).collect()
}

/// Three models: `b` has the tokens of `a` in another order, and `c` some; each has its own.
fn three() -> [Small; 3] {
    [
        Small::new("a", &["<s>", "</s>", "x", "y", "Ġz"], 8, 1),
        Small::new("b", &["</s>", "q", "y", "<s>", "Ġw", "Ãł", "é"], 9, 2)
            .add("<|im|>", true)
            .add("<t>", false),
        Small::new("c", &["y", "<s>", "Ġw", "</s>"], 4, 3),
    ]
}

/// The tokens of the union of these as the models write them: `Ãł` (à) would come back as another byte, and `é` is a part of a character.
const UNION: [&str; 9] = ["<s>", "</s>", "x", "y", "Ġz", "q", "Ġw", "<|im|>", "<t>"];

fn saved(folder: &Folder, all: &[Small], dtype: FileDType) {
    all.iter().for_each(|small| small.save(folder, dtype));
}

fn read(folder: &Folder, file: &str) -> Value {
    serde_json::from_slice(&folder.contents("out")[file]).unwrap()
}

fn open(folder: &Folder, config: &str) -> Job {
    Job::open(MergeConfig::from_yaml(config, &folder.0).unwrap()).unwrap()
}

/// A text without the folder's path.
fn short(folder: &Folder, text: &str) -> String {
    text.replace(&format!("{}{}", folder.0.display(), std::path::MAIN_SEPARATOR), "")
}

fn says(folder: &Folder, job: &Job, words: &str) {
    let found = job.notes.iter().chain(&job.problems).any(|said| short(folder, said).contains(words));
    assert!(found, "{words}: {:#?} {:#?}", job.notes, job.problems);
}

const LINEAR: &str = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 2}}\n\
     - {model: c, parameters: {weight: 3}}\n";

#[test]
fn unions_are_merged_by_token() {
    let folder = Folder::new("vocab-union");
    let all = three();
    let [a, b, c] = &all;
    saved(&folder, &all, FileDType::F32);
    folder.write("a/tokenizer.model", "pieces");
    folder.write("a/added_tokens.json", "{}");
    folder.write("a/tokenizer_config.json", r#"{"added_tokens_decoder": {}, "eos_token": "</s>"}"#);
    let text = format!("{LINEAR}tokenizer_source: union\n");
    let job = open(&folder, &text);
    for words in [
        "the output has the tokens of a, and behind them",
        "4 tokens are added from b: `q`, ` w`, `<|im|>` and 1 more",
        "2 tokens are left out of b, because no added token can have such a text: `Ãł`, `é`",
        "regular tokens among the added ones: 2",
        "tokens of the output that c lacks: `x`, `Ġz`, `q` and 2 more",
        "rows that are no token's are left out",
        "what a model lacks is the mean",
        "tokenizer.model is left out",
        "config.json: `vocab_size` becomes 9",
    ] {
        says(&folder, &job, words);
    }
    let merged = folder.merge(&text).unwrap();
    for name in TABLES {
        let tables = [a, b, c].map(|of| table(of, &[a, b, c], false, name, &UNION));
        let want: Vec<f64> = (0..UNION.len() * 6)
            .map(|i| {
                (f64::from(tables[0][i]) + 2.0 * f64::from(tables[1][i]) + 3.0 * f64::from(tables[2][i]))
                    / 6.0
            })
            .collect();
        let got: Vec<f64> = values(&merged, name).into_iter().map(f64::from).collect();
        within(name, &got, &want, |_| 2e-6);
        // A token that one model has is that model's vector.
        within(
            "own",
            &got[7 * 6..8 * 6],
            &tables[1][7 * 6..8 * 6].iter().map(|&x| f64::from(x)).collect::<Vec<_>>(),
            |_| 1e-6,
        );
    }
    let tokenizer = read(&folder, "tokenizer.json");
    assert_eq!(tokenizer["model"], a.tokenizer()["model"]);
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let short: Vec<_> =
        added.iter().map(|t| (t["content"].as_str().unwrap(), t["id"].as_u64().unwrap())).collect();
    assert_eq!(short, [("q", 5), (" w", 6), ("<|im|>", 7), ("<t>", 8)]);
    let flags = |i: usize| ["special", "lstrip", "normalized"].map(|flag| added[i][flag] == true);
    assert_eq!([0, 2, 3].map(flags), [[false, false, true], [true, true, false], [false, true, false]]);
    assert_eq!(read(&folder, "tokenizer_config.json")["added_tokens_decoder"]["7"]["special"], true);
    assert_eq!(read(&folder, "added_tokens.json")["<t>"], 8);
    assert!(!folder.contents("out").contains_key("tokenizer.model"));
    let config = read(&folder, "config.json");
    assert_eq!([&config["vocab_size"], &config["text_config"]["vocab_size"]], [9, 9]);
    assert_eq!(config["eos_token_id"], 1);
    // The tokens that come out are those of the ids.
    let words = tiebeam::text::Words::open(&folder.0.join("out")).unwrap();
    assert_eq!(words.decode(&[2, 6, 3, 5]).unwrap(), "x wyq");
}

/// A merge by token is the merge of models whose tables were written out by hand, bit for bit, also in parts that cut rows, of models
/// of which some are tied, in bf16.
#[test]
fn merges_by_token_are_those_of_written_tables() {
    for (what, dtype, tie) in [
        ("f32", FileDType::F32, [false; 3]),
        ("bf16", FileDType::BF16, [false; 3]),
        ("tied", FileDType::F32, [false, true, false]),
    ] {
        let folder = Folder::new(&format!("vocab-{what}"));
        let all = three();
        let mut tie = tie.into_iter();
        let mut all = all.map(|small| if tie.next() == Some(true) { small.tied() } else { small });
        if dtype == FileDType::BF16 {
            for (_, x) in all.iter_mut().flat_map(|small| small.tensors.values_mut()) {
                x.iter_mut().for_each(|x| *x = f32::from_bits(x.to_bits() & 0xffff_0000));
            }
        }
        saved(&folder, &all, dtype);
        let [a, b, c] = &all;
        for small in &all {
            let mut tensors = small.tensors.clone();
            for name in TABLES {
                let x = table(small, &[a, b, c], true, name, &UNION);
                tensors.insert(name.into(), (vec![UNION.len(), 6], x));
            }
            let folder = folder.0.join(format!("{}-written", small.name));
            // Means of bf16 are no bf16, and with a base there are none of those that it has.
            save_model(&folder, &tensors, FileDType::F32);
        }
        for (method, parameters) in [
            ("task_arithmetic", "{weight: 0.7}"),
            ("ties", "{weight: 1, density: 0.4}"),
            ("dare_ties", "{weight: 1, density: 0.6}"),
        ] {
            let config = |end: &str| {
                format!(
                    "merge_method: {method}\nbase_model: a{end}\ndtype: float32\nmodels:\n- {{model: b{end}, parameters: {parameters}}}\n\
                     - {{model: c{end}, parameters: {parameters}}}\n"
                )
            };
            let union = format!("{}tokenizer: {{source: union}}\n", config(""));
            for part in [7, 1 << 20] {
                let by_token = folder.merge_in_parts("out", &union, 5 << 30, part).unwrap();
                let written = folder.merge_in_parts("written", &config("-written"), 5 << 30, part).unwrap();
                for name in TABLES {
                    assert_eq!(
                        values(&by_token, name),
                        values(&written, name),
                        "{what} {method} {part} {name}"
                    );
                }
            }
        }
    }
}

#[test]
fn base_and_other_sources() {
    let folder = Folder::new("vocab-sources");
    let all = three();
    let [a, b, c] = &all;
    saved(&folder, &all, FileDType::F32);
    let average = "merge_method: average\nmodels: [{model: a}, {model: b}, {model: c}]\n";
    let expect = |merged: &Shards, tokens: &[&str]| {
        for name in TABLES {
            let tables = [a, b, c].map(|of| table(of, &[a, b, c], false, name, tokens));
            let want: Vec<f64> = (0..tokens.len() * 6)
                .map(|i| tables.iter().map(|x| f64::from(x[i])).sum::<f64>() / 3.0)
                .collect();
            let got: Vec<f64> = values(merged, name).into_iter().map(f64::from).collect();
            within(name, &got, &want, |_| 2e-6);
        }
    };
    expect(&folder.merge(&format!("{average}tokenizer_source: base")).unwrap(), &a.vocab);
    assert_eq!(folder.contents("out")["tokenizer.json"], folder.contents("a")["tokenizer.json"]);
    assert_eq!(read(&folder, "config.json")["vocab_size"], 5);
    folder.write("b/tokenizer_config.json", "{\"of\": \"b\"}");
    folder.write("a/merges.txt", "of a");
    let text = format!("{average}tokenizer_source: b");
    says(&folder, &open(&folder, &text), "merges.txt of the leading model is left out");
    expect(&folder.merge(&text).unwrap(), &b.vocab);
    assert_eq!(folder.contents("out")["tokenizer.json"], folder.contents("b")["tokenizer.json"]);
    assert_eq!(read(&folder, "tokenizer_config.json")["of"], "b");
    assert!(!folder.contents("out").contains_key("merges.txt"));
    let config = read(&folder, "config.json");
    assert_eq!([&config["bos_token_id"], &config["eos_token_id"], &config["vocab_size"]], [3, 0, 9]);
    assert_eq!(read(&folder, "generation_config.json")["eos_token_id"], json!([0, 3]));
    // The tokens of a model that is not merged. Nobody has one of them.
    let other = Small::new("other", &["y", "new", "</s>"], 3, 9);
    other.save(&folder, FileDType::F32);
    let text = format!("{average}tokenizer: {{source: other}}");
    let job = open(&folder, &text);
    says(&folder, &job, "tokens that no model has, whose rows are 0: `new`");
    says(&folder, &job, "`bos_token_id` 0 (`<s>`) is no token of the output, and becomes null");
    let merged = folder.merge(&text).unwrap();
    let head = values(&merged, TABLES[1]);
    assert_eq!((head.len(), &head[6..12]), (18, &[0.0; 6][..]));
    assert_eq!(read(&folder, "generation_config.json")["eos_token_id"], json!([2]));
}

/// Rows behind the tokens stay where all tables have them and the tokens are the base's.
#[test]
fn padding_and_equal_tokens() {
    let folder = Folder::new("vocab-padding");
    let a = Small::new("a", &["<s>", "</s>", "x"], 7, 1);
    let b = Small::new("b", &["</s>", "x", "<s>", "y"], 7, 2);
    let d = Small::new("d", &["<s>", "</s>", "x"], 7, 3);
    let all = [a, b, d];
    saved(&folder, &all, FileDType::F32);
    let text = "merge_method: average\nmodels: [{model: a}, {model: b}]\n";
    says(
        &folder,
        &open(&folder, &format!("{text}tokenizer_source: base")),
        "the rows behind it are kept as a has them",
    );
    let merged = folder.merge(&format!("{text}tokenizer_source: base")).unwrap();
    let (own, got) = (&all[0].tensors[TABLES[0]].1, values(&merged, TABLES[0]));
    assert_eq!((got.len(), &got[18..]), (42, &own[18..]));
    let merged = folder.merge(&format!("{text}tokenizer_source: union")).unwrap();
    assert_eq!(merged.info(TABLES[0]).unwrap().shape, [4, 6]);
    // Equal tokens are no reason to touch anything.
    let text = "merge_method: average\nmodels: [{model: a}, {model: d}]\n";
    says(
        &folder,
        &open(&folder, &format!("{text}tokenizer_source: base")),
        "all models have the same tokens",
    );
    folder.merge(text).unwrap();
    let mut plain = folder.contents("out");
    folder.merge(&format!("{text}tokenizer_source: base")).unwrap();
    let mut by_token = folder.contents("out");
    for file in ["tiebeam_merge.yaml", "README.md", ".tiebeam-files.json"] {
        plain.remove(file);
        by_token.remove(file);
    }
    assert_eq!(plain, by_token);
}

#[test]
fn vectors_of_single_tokens_are_chosen() {
    let folder = Folder::new("vocab-tokens");
    let all = three();
    saved(&folder, &all, FileDType::F32);
    let text = |tokens: &str| {
        format!(
            "merge_method: average\nmodels: [{{model: a}}, {{model: b}}, {{model: c}}]\ntokenizer: {{source: union, tokens: {tokens}}}\n"
        )
    };
    let merged =
        folder.merge(&text("{<s>: {source: b, force: true}, y: {source: c}, Ġz: {source: a}}")).unwrap();
    let got = values(&merged, TABLES[0]);
    within("forced", &wide(&got[..6]), &wide(&all[1].row(TABLES[0], "<s>").unwrap()), |_| 1e-6);
    let means: Vec<f64> = (0..6)
        .map(|i| all.iter().map(|small| f64::from(small.row(TABLES[0], "y").unwrap()[i])).sum::<f64>() / 3.0)
        .collect();
    within("not forced", &wide(&got[18..24]), &means, |_| 1e-6);
    for (tokens, words) in [
        ("{nothing: {source: a}}", "the output has no token `nothing`; near: "),
        ("{q: {source: a}}", "tokenizer.tokens: a has no token `q`"),
        ("{q: {source: other}}", "from which `q` is to be, is not merged"),
        ("{q: {source: {kind: zero}}}", "tokenizer.tokens.q: `source` must be the path of a model"),
        ("{q: {force: true}}", "tokenizer.tokens.q: `source` is missing"),
        ("{q: {source: a, force: 1}}", "`force` must be true or false, not 1"),
        ("{q: {source: a, scale: 1}}", "tokenizer.tokens.q: `scale` is not supported"),
        ("[q]", "tokenizer.tokens: must be a map of keys"),
    ] {
        let message = short(&folder, &folder.refusal(&text(tokens)));
        assert!(message.contains(words), "{tokens}: {message}");
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[test]
fn bad_vocabularies_are_refused() {
    let folder = Folder::new("vocab-errors");
    saved(&folder, &three(), FileDType::F32);
    let models = "merge_method: average\nmodels: [{model: a}, {model: b}]\n";
    let good = std::fs::read_to_string(folder.0.join("b/tokenizer.json")).unwrap();
    // Without a key, the message says which there are.
    let message = short(&folder, &folder.refusal(models));
    assert!(
        message.contains("`tokenizer_source: base` or `union` merges tables by their tokens"),
        "{message}"
    );
    for (key, words) in [
        ("tokenizer_source: 3", "tokenizer_source: must be `base`, `union` or the path of a model, not 3"),
        ("tokenizer_source: nowhere", "nowhere: "),
        ("tokenizer: union", "tokenizer: must be a map of keys"),
        (
            "tokenizer: {source: union, pad_to_multiple_of: 8}",
            "tokenizer: `pad_to_multiple_of` is not supported",
        ),
        ("tokenizer: {}", "tokenizer: `source` is missing"),
        ("tokenizer: {source: union}\ntokenizer_source: union", "take one out"),
        ("tokenizer_source: union\nalign: {spec: llama}", "tokenizer: with `align`"),
        ("tokenizer_source: union\nevaluate: {text: a/config.json}", "evaluate: models with other tokens"),
        ("chat_template: auto", "`chat_template` of mergekit is not supported"),
    ] {
        let message = short(&folder, &folder.refusal(&format!("{models}{key}\n")));
        assert!(message.contains(words), "{key}: {message}");
    }
    let union = format!("{models}tokenizer_source: union\n");
    let mut long = three()[1].tokenizer();
    long["added_tokens"].as_array_mut().unwrap().push(json!({"id": 15, "content": "<far>"}));
    for (file, words) in [
        ("{\"model\": ", "it describes no tokenizer"),
        ("{}", "missing field `model`"),
        (r#"{"model": {"vocab": {"a": 1, "b": 1}}}"#, "the tokens `a` and `b` have the id 1"),
        (r#"{"model": {"vocab": {"a": 4294967295}}}"#, "the token `a` has no id below"),
        (&long.to_string(), "its tokenizer.json gives `<far>` the id 15, and `lm_head.weight` has 9 rows"),
    ] {
        folder.write("b/tokenizer.json", file);
        let message = short(&folder, &folder.refusal(&union));
        assert!(message.contains(words) && message.contains('b'), "{file}: {message}");
    }
    std::fs::remove_file(folder.0.join("b/tokenizer.json")).unwrap();
    let message = short(&folder, &folder.refusal(&union));
    assert!(message.contains("it has no tokenizer.json"), "{message}");
    // Behind gaps, added tokens would have other ids than they should.
    folder.write("b/tokenizer.json", &good);
    folder.write(
        "a/tokenizer.json",
        r#"{"model": {"type": "BPE", "vocab": {"x": 0, "y": 4}}, "decoder": {"type": "ByteLevel"}}"#,
    );
    let message = short(&folder, &folder.refusal(&union));
    assert!(message.contains("a: its 2 tokens have gaps in their ids, the last of which is 4"), "{message}");
    folder.merge(&union.replace("union", "base")).unwrap();
    // A tokenizer of another kind is said, and tokens are found by their text.
    folder.write(
        "a/tokenizer.json",
        r#"{"model": {"type": "WordLevel", "vocab": {"</s>": 0, " w": 1, "y": 2}}}"#,
    );
    let job = open(&folder, &union.replace("union", "base"));
    says(&folder, &job, "b has a tokenizer of another kind (Bytes, BPE) than the output (Plain, WordLevel)");
    assert!(!job.notes.iter().any(|note| short(&folder, note).contains("that b lacks")), "{:?}", job.notes);
    // A model without a known table.
    let others: Tensors = BTreeMap::from([("w".to_string(), (vec![2], vec![1.0, 2.0]))]);
    save_model(&folder.0.join("w"), &others, FileDType::F32);
    folder.write("w/tokenizer.json", &good);
    let message = short(
        &folder,
        &folder.refusal("merge_method: average\nmodels: [{model: w}]\ntokenizer_source: base"),
    );
    assert!(message.contains("has no table of token vectors by a name that is known"), "{message}");
}
