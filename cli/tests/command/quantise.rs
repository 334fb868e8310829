//! `tiebeam quantise` on tiny models of three families: what is written is opened and says what the rounded weights say.

use crate::support::folder::{Folder, root};
use crate::support::{download, gpu, vectors};
use crate::{command, text};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Output;
use tiebeam::models::llama::{Form as Kept, Published};
use tiebeam::quant::{Form, Job, JobSettings, Rounding, Stored, round};
use tiebeam::store::gguf::{self, Gguf, GgufType};
use tiebeam::store::{Entry, File, Shards, Weights, save};
use tiebeam::{Error, Tensor, no_grad};

pub fn model(name: &str) -> PathBuf {
    vectors().join("llm").join(name)
}

/// Copies a model of the vectors to the folder `m`, so that it can be changed.
pub fn copied(folder: &Folder, name: &str) -> PathBuf {
    let copy = folder.join("m");
    std::fs::create_dir(&copy).expect("a folder");
    for file in std::fs::read_dir(model(name)).expect("the vectors") {
        let file = file.expect("a file").path();
        std::fs::copy(&file, copy.join(file.file_name().expect("a name"))).expect("copied");
    }
    copy
}

pub fn quantise(folder: &Path, model: &Path, args: &[&str]) -> Output {
    command().arg("quantise").arg(model).args(args).current_dir(folder).output().expect("the command runs")
}

pub fn written(folder: &Path, model: &Path, args: &[&str]) -> String {
    let done = quantise(folder, model, args);
    assert!(done.status.success(), "{args:?}: {}", text(&done.stderr));
    text(&done.stdout)
}

pub fn refusal(folder: &Path, model: &Path, args: &[&str]) -> String {
    let done = quantise(folder, model, args);
    let said = text(&done.stderr);
    assert!(!done.status.success() && !said.contains("panicked"), "{args:?}: {said}");
    said
}

/// The scores of a model on the tokens of its vectors.
pub fn scores(path: &Path, family: &str, form: Kept) -> Vec<f64> {
    let text = std::fs::read_to_string(model(family).join("expected.json")).expect("vectors");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    let tokens: Vec<u32> = serde_json::from_value(json["sequence"].clone()).expect("tokens");
    let model = Published::open(path).and_then(|model| model.load(gpu(), 64, form));
    let model = model.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    download(&no_grad(|| model.forward(&Tensor::from_slice(gpu(), &tokens, [1, tokens.len()]))))
}

pub fn same(what: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    let off = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(off < 1e-4, "{what}: off by {off:e}");
}

/// Writes a folder of F32 with the weights that rounding leaves.
pub fn plain(family: &str, out: &Path, rounding: impl Fn(&str) -> Option<Rounding>) {
    let source = Shards::open(model(family)).expect("vectors");
    let tensor = |name: String| {
        let shape = source.shape(&name).expect("a shape");
        let w = source.find(&name).and_then(|(file, name)| file.tensor_f32(name)).expect("floats");
        let w = match rounding(&name) {
            Some(rounding) => round(&name, &w, [shape[0], shape[1]], &rounding).expect("rounded").values(),
            None => w,
        };
        (name, shape, w)
    };
    let all: Vec<_> = source.names().into_iter().map(tensor).collect();
    std::fs::create_dir(out).expect("a folder");
    std::fs::copy(model(family).join("config.json"), out.join("config.json")).expect("copied");
    let entries = all.iter().map(|(name, shape, w)| Entry::f32(name.as_str(), shape, w));
    save(out.join("model.safetensors"), entries, &BTreeMap::new()).expect("written");
}

pub fn is_linear(name: &str) -> bool {
    name.contains("_proj.weight")
}

#[test]
fn folders_have_the_rounded_weights() {
    let folder = Folder::new("quantise");
    let of = |bits, form, group| Rounding::new(bits, form).stored(Stored::BF16).group(group);
    type Case<'a> = (&'a str, &'a [&'a str], Box<dyn Fn(&str) -> Option<Rounding>>);
    let all = |rounding: Rounding| Box::new(move |name: &str| is_linear(name).then_some(rounding));
    let planned = move |name: &str| match name {
        _ if name.contains("layers.0.self_attn.q") => None,
        "lm_head.weight" => Some(of(8, Form::Symmetric, 16).rows()),
        _ if name.contains("down") => Some(of(8, Form::Symmetric, 16)),
        _ => is_linear(name).then_some(of(4, Form::Symmetric, 32)),
    };
    let cases: [Case; 5] = [
        ("llama3", &["--group", "16"], all(of(4, Form::Symmetric, 16))),
        ("mistral", &["--bits", "8", "--group", "16"], all(of(8, Form::Symmetric, 16))),
        ("qwen2", &["--group", "16", "--asymmetric"], all(of(4, Form::Zero, 16))),
        ("llama3", &["--bits", "8", "--group", "16", "--asymmetric"], all(of(8, Form::Zero, 16))),
        (
            "qwen2",
            &["--group", "32", "--plan", "mlp=4:32,head=8:row,down=8:16,*.layers.0.*.q_proj.weight=keep"],
            Box::new(planned),
        ),
    ];
    for (i, (family, args, rounding)) in cases.iter().enumerate() {
        let [out, want] = ["out", "want"].map(|name| folder.join(format!("{name}{i}")));
        let args = [args, &["--out", out.to_str().expect("UTF-8")][..]].concat();
        written(&folder, &model(family), &args);
        plain(family, &want, rounding);
        let want = scores(&want, family, Kept::F32);
        for form in [Kept::Stored, Kept::F32] {
            same(&format!("{family} {args:?}"), &scores(&out, family, form), &want);
        }
        assert!(!out.join("vocabulary.gguf").exists(), "a model beside the model is no part of it");
        for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            let [a, b] = [&out, &model(family)].map(|path| std::fs::read(path.join(file)).expect("copied"));
            assert_eq!(a, b, "{file}");
        }
    }
}

#[test]
fn large_folders_have_several_files() {
    let folder = Folder::new("quantise-shards");
    let (source, args) = (model("qwen2"), ["--group", "16", "--asymmetric", "--out"]);
    let run = |out: &str, more: &[&str]| written(&folder, &source, &[&args[..], &[out], more].concat());
    run("one", &[]);
    run("many", &["--shard-size", "8kB"]);
    let of = |name: &str| Shards::open(folder.join(name)).expect("written");
    let (one, many) = (of("one"), of("many"));
    assert_eq!(one.names(), many.names());
    let mut files = BTreeSet::new();
    for name in one.names() {
        let [a, b] = [&one, &many].map(|shards| shards.find(&name).expect("a file").0);
        assert_eq!(a.info(&name).unwrap().shape, b.info(&name).unwrap().shape, "{name}");
        assert_eq!(a.bytes(&name).unwrap(), b.bytes(&name).unwrap(), "{name}");
        files.insert(b.path().to_path_buf());
    }
    assert!(files.len() > 2, "{files:?}");
    let index = std::fs::read_to_string(folder.join("many/model.safetensors.index.json")).expect("an index");
    let index: Value = serde_json::from_str(&index).expect("JSON");
    let bytes: usize = one.names().iter().map(|n| one.bytes(n).unwrap().len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
    assert_eq!(
        scores(&folder.join("one"), "qwen2", Kept::Stored),
        scores(&folder.join("many"), "qwen2", Kept::Stored)
    );
    // A run without pieces leaves none of the earlier one.
    drop((one, many));
    run("many", &[]);
    let files = |name: &str| -> BTreeSet<String> {
        let all = std::fs::read_dir(folder.join(name)).expect("a folder");
        all.map(|file| file.unwrap().file_name().into_string().expect("UTF-8")).collect()
    };
    assert_eq!(files("one"), files("many"));
}

/// Matrices whose names say nothing stay, and one line says so for all of them.
#[test]
fn unknown_names_are_told() {
    let folder = Folder::new("quantise-unknown");
    let odd = folder.join("odd");
    plain("llama3", &odd, |_| None);
    let file = File::open(odd.join("model.safetensors")).expect("written");
    let entry = |name: &str| {
        let new = name.replace("up_proj", "w1");
        let info = file.info(name).unwrap();
        Entry::bytes(new, info.dtype, &info.shape, file.bytes(name).unwrap())
    };
    save(odd.join("new.safetensors"), file.names().map(entry), &BTreeMap::new()).expect("written");
    std::fs::rename(odd.join("new.safetensors"), odd.join("model.safetensors")).expect("renamed");
    let done = quantise(&folder, &odd, &["--group", "16", "--out", "out"]);
    let said = text(&done.stderr);
    let want =
        "`model.layers.0.mlp.w1.weight` and 1 more stay as they are: this is no known name of a linear layer";
    assert!(done.status.success() && said.contains(want), "{said}");
    let plan = ["--group", "16", "--plan", "*.w1.weight=8", "--out", "planned"];
    let done = quantise(&folder, &odd, &plan);
    assert!(done.status.success() && !text(&done.stderr).contains("w1"), "{}", text(&done.stderr));
    let written = File::open(folder.join("planned/model.safetensors")).expect("written");
    assert!(written.names().any(|name| name == "model.layers.1.mlp.w1.weight_packed"));
}

/// Each rounding of a plan has a group of settings, whose targets are as compressed-tensors matches names.
#[test]
fn settings_name_the_layers_of_each_rounding() {
    let folder = Folder::new("quantise-config");
    let plan = "down=8:16,*.layers.0.*.q_proj.weight=keep,o=4:row";
    written(&folder, &model("qwen2"), &["--group", "32", "--plan", plan, "--out", "out"]);
    let config = std::fs::read_to_string(folder.join("out/config.json")).expect("written");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    let packing = &config["quantization_config"];
    let groups = packing["config_groups"].as_object().expect("groups");
    let find = |bits: u64, strategy: &str| {
        let fits = |g: &&Value| g["weights"]["num_bits"] == bits && g["weights"]["strategy"] == strategy;
        groups.values().find(fits).expect("a group")["targets"].to_string()
    };
    assert_eq!(groups.len(), 3);
    assert_eq!(find(8, "group"), r#"["re:^model\\.layers\\.\\d+\\.mlp\\.down_proj$"]"#);
    assert_eq!(find(4, "channel"), r#"["re:^model\\.layers\\.\\d+\\.self_attn\\.o_proj$"]"#);
    let most = find(4, "group");
    assert!(most.contains(r#""model.layers.1.self_attn.q_proj""#) && most.contains("up_proj$"), "{most}");
    assert_eq!(packing["ignore"].to_string(), r#"["lm_head","model.layers.0.self_attn.q_proj"]"#);
    assert_eq!(config["vocab_size"], 320);
}

#[test]
fn gguf_files_have_the_rounded_weights() {
    let (folder, source) = (Folder::new("quantise-gguf"), model("llama3/model.gguf"));
    let file = Gguf::open(&source).expect("vectors");
    for (args, rounding, kind, number) in [
        (&["--bits", "4"][..], Rounding::new(4, Form::Symmetric), GgufType::Q4_0, 2),
        (&["--asymmetric"], Rounding::new(4, Form::Affine), GgufType::Q4_1, 3),
        (&["--bits", "8", "--format", "gguf"], Rounding::new(8, Form::Symmetric), GgufType::Q8_0, 7),
    ] {
        let [out, want] = ["out.gguf", "want.gguf"].map(|name| folder.join(name));
        let args = [args, &["--out", "out.gguf", "--group", "32"]].concat();
        let said = written(&folder, &source, &args);
        assert!(said.contains("Q8_0") && said.contains(&kind.to_string()), "{said}");
        let tensor = |name: &str| {
            let (shape, w) =
                (file.shape(name).expect("a shape").to_vec(), file.tensor_f32(name).expect("F32"));
            let is_table = name == "token_embd.weight";
            // Rows of 48 are no whole blocks.
            let stays = shape.len() < 2 || shape[1] == 48;
            let rounding = if is_table { Rounding::new(8, Form::Symmetric) } else { rounding };
            let w =
                if stays { w } else { round(name, &w, [shape[0], shape[1]], &rounding).unwrap().values() };
            (name.to_string(), shape, w)
        };
        let all: Vec<_> = file.names().map(tensor).collect();
        let metadata: Vec<_> = file.metadata().clone().into_iter().collect();
        let entries = all.iter().map(|(name, shape, w)| gguf::Entry::f32(name.as_str(), shape, w));
        gguf::save(&want, &metadata, entries).expect("written");
        let got = Gguf::open(&out).expect("written");
        for (name, _, w) in &all {
            let found = got.tensor_f32(name).expect("read");
            assert!(found.iter().zip(w).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs().max(1.0)), "{name}");
        }
        assert_eq!(got.kind("blk.1.ffn_up.weight").expect("a type"), kind);
        assert_eq!(got.kind("token_embd.weight").expect("a type"), GgufType::Q8_0);
        assert_eq!(got.number("general.file_type").expect("a number"), number);
        // All other metadata are as they were.
        assert!(file.metadata().iter().all(|(key, value)| got.metadata().get(key) == Some(value)));
        same(
            &format!("{args:?}"),
            &scores(&out, "llama3", Kept::Stored),
            &scores(&want, "llama3", Kept::F32),
        );
    }
    // What has few bits already is rounded again only when that is asked for, and a table that has stays.
    let again = ["--bits", "4", "--out", "again.gguf"];
    let said = refusal(&folder, &folder.join("out.gguf"), &again);
    assert!(said.contains("tensor `blk.0.attn_k.weight`: it is Q8_0 already"), "{said}");
    let equal = refusal(&folder, &folder.join("out.gguf"), &["--bits", "8", "--out", "again.gguf"]);
    assert!(equal.contains("`blk.0.attn_k.weight`, for one, is Q8_0 already"), "{equal}");
    written(&folder, &folder.join("out.gguf"), &[&again[..], &["--requantise"]].concat());
    let again = Gguf::open(folder.join("again.gguf")).expect("written");
    assert_eq!(again.kind("blk.0.attn_k.weight").expect("a type"), GgufType::Q4_0);
    assert_eq!(again.kind("token_embd.weight").expect("a type"), GgufType::Q8_0);
}

#[test]
fn equal_runs_give_equal_bytes() {
    let folder = Folder::new("quantise-twice");
    let gguf = model("llama3/model.gguf");
    for out in ["a", "b"] {
        written(&folder, &model("llama3"), &["--group", "16", "--asymmetric", "--out", out]);
        written(&folder, &gguf, &["--out", &format!("{out}.gguf")]);
    }
    let read = |name: &str| std::fs::read(folder.join(name)).expect("written");
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        assert_eq!(read(&format!("a/{name}")), read(&format!("b/{name}")), "{name}");
    }
    assert_eq!(read("a.gguf"), read("b.gguf"));
    // A second run replaces what the first wrote, and keeps what is somebody's.
    std::fs::write(folder.join("a/README.md"), "mine").expect("written");
    written(&folder, &model("llama3"), &["--bits", "8", "--group", "16", "--out", "a"]);
    assert_eq!(read("a/README.md"), b"mine");
    assert_ne!(read("a/model.safetensors"), read("b/model.safetensors"));
}

#[test]
fn a_dry_run_writes_nothing() {
    let folder = Folder::new("quantise-dry");
    let args = ["--group", "16", "--dry-run", "--out", "out", "--json"];
    let done = quantise(&folder, &model("llama3"), &args);
    let table = text(&done.stderr);
    assert!(done.status.success(), "{table}");
    for words in ["model.layers.1.mlp.down_proj.weight", "4:16", "20 tensors", "as compressed-tensors"] {
        assert!(table.contains(words), "{words}: {table}");
    }
    assert!(folder.names().is_empty());
    let lines: Vec<Value> =
        text(&done.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines.len(), 21);
    let total = lines.last().expect("lines");
    assert_eq!((&total["line"], &total["rounded"]), (&"total".into(), &14.into()));
    // What is announced is what is written.
    written(&folder, &model("llama3"), &["--group", "16", "--out", "out"]);
    let file = File::open(folder.join("out/model.safetensors")).expect("written");
    let bytes: usize = file.names().map(|name| file.bytes(name).expect("bytes").len()).sum();
    assert_eq!(total["bytes_after"], bytes);
    let source = model("llama3/model.gguf");
    let dry = quantise(&folder, &source, &["--dry-run"]);
    assert!(text(&dry.stdout).contains("rows of 48 are no whole blocks of 32"), "{}", text(&dry.stdout));
}

#[test]
fn a_run_that_ends_early_leaves_nothing() {
    let folder = Folder::new("quantise-stopped");
    for (source, out) in [(model("llama3"), "out"), (model("llama3/model.gguf"), "out.gguf")] {
        let group = source.is_dir().then_some(16);
        let job = Job::open(&source, JobSettings::default().group(group)).expect("opened");
        let mut left = 4;
        let done = job.run(&folder.join(out), &mut |_| {
            left -= 1;
            if left > 0 { Ok(()) } else { Err(Error::stopped("stopped here")) }
        });
        assert!(done.is_err_and(|e| e.to_string().contains("stopped here")));
    }
    // A weight that is no number is found in the middle of a file.
    let broken = folder.join("broken");
    plain("llama3", &broken, |_| None);
    let file = File::open(broken.join("model.safetensors")).expect("written");
    let bad = "model.layers.1.mlp.up_proj.weight";
    let entry = |name: &str| {
        let (info, mut bytes) = (file.info(name).unwrap(), file.bytes(name).unwrap().to_vec());
        if name == bad {
            bytes[4 * (3 * 32 + 5)..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }
        Entry::bytes(name, info.dtype, &info.shape, bytes)
    };
    save(broken.join("model.safetensors"), file.names().map(entry), &BTreeMap::new()).expect("written");
    let said = refusal(&folder, &broken, &["--group", "16", "--out", "out"]);
    assert!(said.contains(&format!("tensor `{bad}`: the weight in row 3 at column 5 is NaN")), "{said}");
    let left: Vec<String> =
        folder.names().into_iter().filter(|name| !name.ends_with("tiebeam-lock")).collect();
    assert_eq!(left, ["broken"]);
}

#[test]
fn refusals_say_what_to_do() {
    let folder = Folder::new("quantise-refusals");
    let (llama, gguf) = (model("llama3"), model("llama3/model.gguf"));
    let [packed, bare, taken] = ["packed", "bare", "taken"].map(|name| folder.join(name));
    written(&folder, &llama, &["--group", "16", "--out", "packed"]);
    plain("llama3", &bare, |_| None);
    std::fs::create_dir(&taken).expect("a folder");
    std::fs::write(taken.join("notes"), "mine").expect("written");
    let mut cases: Vec<(&Path, Vec<&str>, &str)> = vec![
        (&llama, vec![], "tensor `model.layers.0.mlp.down_proj.weight`: groups of 64 do not divide its 48"),
        (&llama, vec!["--group", "12"], "group"),
        (&llama, vec!["--group", "0"], "groups of 0 columns"),
        (&llama, vec!["--bits", "5"], "5 bits; folders have levels of 4 or 8"),
        (&llama, vec!["--group", "16", "--plan", "up=3"], "mlp.up_proj.weight`: 3 bits; folders"),
        (&llama, vec!["--plan", "mpl=4"], "'mpl=4': its name is none of attn"),
        (
            &llama,
            vec!["--plan", "*.layers.7.*=8"],
            "names no tensor that could be rounded; there are q, k, v, o, gate",
        ),
        (&llama, vec!["--group", "16", "--plan", "head=8"], "'head=8' names no tensor"),
        (&llama, vec!["--group", "16", "--plan", "embed=8"], "the table of token vectors is none"),
        (
            &llama,
            vec!["--plan", "attn=keep,mlp=keep"],
            "no tensor would be rounded: the plan keeps `model.layers.0.mlp.down_proj.weight`, for one",
        ),
        (&llama, vec!["--plan", "*=8"], "end the plan with `embed=keep`"),
        (&llama, vec!["--plan", "mlp=4294967296"], "its bits are none of 4, 5, 8 and `keep`"),
        (&packed, vec!["--format", "gguf"], "packed already"),
        (&llama, vec!["--format", "gguf", "--group", "16"], "groups of 16 columns; GGUF has groups of 32"),
        (&packed, vec!["--group", "16"], "packed already"),
        (&gguf, vec!["--format", "compressed-tensors"], "a GGUF file has no settings"),
        (&gguf, vec!["--group", "64"], "groups of 64 columns; GGUF has groups of 32"),
        (&gguf, vec!["--bits", "6"], "6 bits; GGUF has types of 4, 5 and 8 bits"),
        (&gguf, vec!["--plan", "q=4:row"], "attn_q.weight`: GGUF has groups of 32"),
        (&gguf, vec!["--bits", "8", "--asymmetric"], "no type of 8 bits with offsets"),
    ];
    let weights = llama.join("model.safetensors");
    cases.push((&weights, vec![], "name the folder of this file"));
    for (model, args, reason) in &cases {
        let said = refusal(&folder, model, &[&args[..], &["--out", "out"]].concat());
        assert!(said.contains(reason), "{args:?}: {said}");
    }
    std::fs::remove_file(bare.join("config.json")).expect("removed");
    assert!(refusal(&folder, &bare, &["--out", "out"]).contains("config.json"));
    let own = Folder::new("quantise-own");
    plain("llama3", &own.join("m"), |_| None);
    for (out, reason) in [
        ("m", "the model itself, or inside"),
        ("m/inner", "the model itself, or inside"),
        (".", "the model itself, or inside or around it"),
        (taken.to_str().expect("UTF-8"), "it is not ours to replace"),
        ("nowhere/out", "nowhere is not there; make it first"),
        ("-", "and not to stdout"),
    ] {
        let said = refusal(&own, &own.join("m"), &["--group", "16", "--out", out]);
        assert!(said.contains(reason), "{out}: {said}");
    }
    assert!(refusal(&own, &gguf, &["--out", "m"]).contains("this is a folder; name a file"));
    assert_eq!(std::fs::read_to_string(taken.join("notes")).expect("kept"), "mine");
}

#[test]
fn a_text_is_measured_before_and_after() {
    let folder = Folder::new("quantise-text");
    let corpus = root().join("examples/data/corpus.txt").display().to_string();
    let args =
        ["--bits", "8", "--out", "out.gguf", "--text", &corpus, "--windows", "2", "--json=lines.jsonl"];
    let said = written(&folder, &model("llama3/model.gguf"), &args);
    assert!(said.contains("on 2 windows of 128 tokens") && said.contains("output error"), "{said}");
    let lines = std::fs::read_to_string(folder.join("lines.jsonl")).expect("written");
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let total = lines.last().expect("lines");
    let [before, after, off] =
        ["perplexity_before", "perplexity_after", "output_error"].map(|key| total[key].as_f64().expect(key));
    assert!((before / after - 1.0).abs() < 0.1 && off > 0.0 && off < 0.1, "{total}");
    let up = lines.iter().find(|line| line["name"] == "blk.0.ffn_up.weight").expect("a line");
    let error = up["error"].as_f64().expect("an error");
    assert!(error > 1e-3 && error < 1e-2 && up["bits_after"] == 8.5, "{up}");
    std::fs::write(folder.join("short.txt"), "In the beginning").expect("written");
    let args = ["--out", "short.gguf", "--text", "short.txt"];
    let said = refusal(&folder, &model("llama3/model.gguf"), &args);
    assert!(
        said.contains("short.txt: the text has") && said.contains("8 windows of 128 need 1025"),
        "{said}"
    );
    assert_eq!(folder.names(), ["lines.jsonl", "out.gguf", "short.txt"]);
}

/// What is read is never written over: neither what a folder's links stand for, nor the text, nor by the lines.
#[test]
fn nothing_that_is_read_is_replaced() {
    let folder = Folder::new("quantise-kept");
    let source = copied(&folder, "llama3");
    std::fs::rename(source.join("model.safetensors"), folder.join("blob")).expect("moved");
    #[cfg(unix)]
    std::os::unix::fs::symlink("../blob", source.join("model.safetensors")).expect("a link");
    #[cfg(not(unix))]
    std::fs::copy(folder.join("blob"), source.join("model.safetensors")).expect("copied");
    let blob = std::fs::read(folder.join("blob")).expect("read");
    if cfg!(unix) {
        let said = refusal(&folder, &source, &["--format", "gguf", "--out", "blob"]);
        assert!(said.contains("stands for, which is read"), "{said}");
    }
    std::fs::write(folder.join("text"), "In the beginning").expect("written");
    let said = refusal(&folder, &model("llama3/model.gguf"), &["--out", "text", "--text", "text"]);
    assert!(said.contains("would replace the text"), "{said}");
    let said = refusal(&folder, &model("llama3/model.gguf"), &["--out", "a.gguf", "--json=a.gguf"]);
    assert!(said.contains("read or written"), "{said}");
    let said = refusal(&folder, &source, &["--group", "16", "--out", "a.gguf"]);
    assert!(said.contains("--format gguf"), "{said}");
    assert_eq!(std::fs::read(folder.join("blob")).expect("kept"), blob);
    assert_eq!(folder.names(), ["blob", "m", "text"]);
}

/// A folder that lacks a tensor, or has one in another size than its settings say, becomes no file.
#[test]
fn an_incomplete_folder_becomes_no_file() {
    let folder = Folder::new("quantise-incomplete");
    let source = copied(&folder, "llama3");
    let config = std::fs::read_to_string(source.join("config.json")).expect("settings");
    let mut json: Value = serde_json::from_str(&config).expect("JSON");
    json["num_hidden_layers"] = 3.into();
    std::fs::write(source.join("config.json"), json.to_string()).expect("written");
    let said = refusal(&folder, &source, &["--format", "gguf", "--out", "a.gguf"]);
    assert!(said.contains("model.layers.2."), "{said}");
    assert_eq!(folder.names(), ["m"]);
}
