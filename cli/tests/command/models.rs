//! `tiebeam train`, `convert`, `finetune` and `zoo`: what one writes, the next opens.

use crate::support::folder::{Folder, root};
use crate::{command, text};
use serde_json::Value;
use std::path::Path;
use std::process::Output;
use tiebeam::models::llama::{Form, Published};
use tiebeam::models::lm::Lm;
use tiebeam::{Gpu, Tensor, no_grad};

/// Runs the command in a folder.
fn run(folder: &Path, args: &[&str]) -> Output {
    command().args(args).current_dir(folder).output().expect("the command starts")
}

/// What a command printed that must succeed.
fn done(folder: &Path, args: &[&str]) -> String {
    let output = run(folder, args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// What a command said that must fail.
fn failed(folder: &Path, args: &[&str]) -> String {
    let output = run(folder, args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
    text(&output.stderr)
}

const MODEL: &str =
    "width = 32\nheads = 4\nkv_heads = 2\ndepth = 4\ncontext = 32\nsharing = \"cycle 2 rank 2\"\n";

/// A folder with settings and a text.
fn folder(name: &str) -> Folder {
    let folder = Folder::new(name);
    let verse = "the quick brown fox jumps over the lazy dog. ";
    std::fs::write(folder.join("lm.toml"), MODEL).unwrap();
    std::fs::write(folder.join("text.txt"), verse.repeat(60)).unwrap();
    folder
}

const TRAIN: [&str; 9] =
    ["train", "--model", "lm.toml", "--text", "text.txt", "--batch", "4", "--every", "4"];

fn train<'a>(more: &[&'a str]) -> Vec<&'a str> {
    TRAIN.iter().chain(more).copied().collect()
}

fn scores(model: &Lm) -> Vec<f32> {
    let tokens = Tensor::from_slice(model.gpu(), &[116u32, 104, 101, 32], [1, 4]);
    no_grad(|| model.forward(&tokens)).to_vec().expect("scores")
}

#[test]
fn a_trained_model_is_run_converted_and_written_out() {
    let folder = folder("command-train");
    let told = done(&folder, &train(&["--out", "lm", "--steps", "8"]));
    assert!(told.contains("held out") && told.contains("counts of pairs 1."), "{told}");
    for name in ["model.safetensors", "tokenizer.json", "loss.svg", "curve.jsonl", "samples.txt"] {
        assert!(folder.join("lm").join(name).is_file(), "{name}");
    }
    let answer = done(&folder, &["run", "lm", "--prompt", "the quick", "-n", "5", "--raw", "-q"]);
    assert!(answer.starts_with("the quick") && answer.len() > "the quick\n".len(), "{answer}");
    let shown = done(&folder, &["inspect", "lm"]);
    assert!(shown.contains("cycle 2 rank 2") && shown.contains("runs         yes"), "{shown}");
    // What is converted and written out computes the same as far as it can.
    let gpu = Gpu::open().expect("an adapter");
    let model = Lm::open(&gpu, folder.join("lm")).unwrap();
    done(&folder, &["convert", "lm", "--untie", "--out", "plain"]);
    let plain = Published::open(folder.join("plain")).unwrap().load(&gpu, 32, Form::F32).unwrap();
    let most = scores(&model).iter().zip(scores(&plain)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(most < 1e-4, "{most}");
    let told = done(
        &folder,
        &[
            "convert",
            "plain",
            "recursive:2",
            "--lora",
            "32",
            "--out",
            "again",
            "--text",
            "text.txt",
            "--windows",
            "2",
        ],
    );
    assert!(told.contains("perplexity before") && told.contains("weights stored"), "{told}");
    let again = Lm::open(&gpu, folder.join("again")).unwrap();
    let most = scores(&model).iter().zip(scores(&again)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(most < 1e-3, "of full rank: {most}");
    // What was done is not done again, gates included.
    let fold = "convert plain fold:2 --remove 1 --gate-steps 5 --steps 2 --text text.txt --windows 2 --seed 3 --out folded";
    let mut fold: Vec<&str> = fold.split(' ').collect();
    let notes = |args: &[&str]| text(&run(&folder, args).stderr);
    let told = notes(&fold);
    assert!(told.contains("are removed") && told.contains("folded/model.safetensors"), "{told}");
    let told = failed(&folder, &fold);
    assert!(told.contains("name a new folder"), "{told}");
    let bytes = || std::fs::read(folder.join("folded/model.safetensors")).unwrap();
    let first = bytes();
    fold.push("--resume");
    let told = notes(&fold);
    assert!(told.contains("gates go on after step 5") && told.contains("goes on after step 2"), "{told}");
    assert!(bytes() == first, "another model");
}

/// A model may have more rows than its tokenizer has tokens. They are never drawn.
#[test]
fn tokens_that_the_tokenizer_lacks_are_not_drawn() {
    let folder = folder("command-vocab");
    std::fs::write(folder.join("lm.toml"), format!("{MODEL}vocab = 4000\n")).unwrap();
    done(&folder, &train(&["--out", "lm", "--steps", "1"]));
    let answer =
        done(&folder, &["run", "lm", "--prompt", "the", "-n", "25", "--temperature", "9", "--raw", "-q"]);
    assert!(answer.len() > 20, "{answer}");
    // A damaged file is told as what it is.
    let path = folder.join("lm/model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let told = failed(&folder, &["run", "lm", "--prompt", "the"]);
    assert!(told.contains("model.safetensors") && !told.contains("config.json"), "{told}");
}

#[test]
fn training_goes_on_with_the_same_bits() {
    let folder = folder("command-resume");
    done(&folder, &train(&["--out", "whole", "--steps", "8"]));
    // A run of the same options that was stopped after its first point is the checkpoint of that point.
    let mut child = command()
        .args(train(&["--out", "parts", "--steps", "8"]))
        .current_dir(&*folder)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("the command starts");
    let tokenizer = folder.join("parts/tokenizer.json");
    while !tokenizer.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().ok();
    child.wait().ok();
    let told = failed(&folder, &train(&["--out", "parts", "--steps", "8"]));
    assert!(told.contains("--resume goes on"), "{told}");
    let tokenizer = std::fs::read(folder.join("parts/tokenizer.json")).unwrap();
    let llama = root().join("tests/vectors/llm/llama3").display().to_string();
    failed(&folder, &train(&["--out", "parts", "--steps", "8", "--resume", "--tokenizer", &llama]));
    assert_eq!(
        std::fs::read(folder.join("parts/tokenizer.json")).unwrap(),
        tokenizer,
        "a refused run changes nothing"
    );
    let told = failed(&folder, &train(&["--out", "parts", "--steps", "12", "--resume"]));
    assert!(told.contains("`train.steps` is '8' there and '12' here"), "{told}");
    done(&folder, &train(&["--out", "parts", "--steps", "8", "--resume"]));
    let [a, b] =
        ["whole", "parts"].map(|name| std::fs::read(folder.join(name).join("model.safetensors")).unwrap());
    assert!(a == b, "the models differ");
}

/// A run that never reached a checkpoint is begun again by the same command.
#[test]
fn a_training_without_a_checkpoint_leaves_nothing_in_the_way() {
    let folder = folder("command-nan");
    let told = failed(&folder, &train(&["--out", "lm", "--steps", "8", "--lr", "1e30"]));
    assert!(told.contains("begin again with a smaller learning rate"), "{told}");
    done(&folder, &train(&["--out", "lm", "--steps", "1"]));
    assert!(folder.join("lm/tokenizer.json").is_file() && folder.join("lm/model.safetensors").is_file());
}

#[test]
fn what_cannot_be_trained_is_told_first() {
    let folder = folder("command-untrained");
    let with = |toml: &str, args: &[&str]| {
        std::fs::write(folder.join("lm.toml"), toml).unwrap();
        failed(&folder, &train(&[&["--out", "none"], args].concat()))
    };
    for (toml, want) in [
        ("width = 32", "`heads` is missing"),
        (
            "width = 32\nheads = 4\ndepth = 4\ncontext = 32\nshraing = \"tied\"",
            "no setting `shraing`; the nearest are `sharing`",
        ),
        ("width = 32\nheads = 5\ndepth = 4\ncontext = 32", "no multiple of 5 heads"),
        (
            "width = 32\nheads = 4\ndepth = 4\ncontext = 32\nsharing = \"cycle 3 rank 0\"",
            "3 blocks do not divide 4 depths",
        ),
        ("width = 32\nheads = 4\ndepth = 4\ncontext = 4000", "give a longer text or a smaller context"),
        ("width = [[1]]", "`width` is neither a word"),
        ("width =", "lm.toml"),
    ] {
        let told = with(toml, &[]);
        assert!(told.contains(want), "{told}");
    }
    std::fs::write(folder.join("lm.toml"), MODEL).unwrap();
    assert!(
        failed(&folder, &train(&["--out", "none", "--resume"]))
            .contains("there is no none/checkpoint.safetensors")
    );
    assert!(!folder.join("none").exists(), "what is refused leaves nothing behind");
    std::fs::create_dir(folder.join("foreign")).unwrap();
    std::fs::write(folder.join("foreign/config.json"), "{}").unwrap();
    let told = failed(&folder, &train(&["--out", "foreign"]));
    assert!(told.contains("has a config.json of another model"), "{told}");
    let llama = root().join("tests/vectors/llm/llama3").display().to_string();
    let both = run(&folder, &["convert", &llama, "--untie", "--out", "x", "--steps", "3"]);
    assert!(
        both.status.code() == Some(2) && text(&both.stderr).contains("--untie"),
        "{}",
        text(&both.stderr)
    );
    std::fs::create_dir(folder.join("full")).unwrap();
    std::fs::write(folder.join("full/checkpoint.safetensors"), "").unwrap();
    let fold = ["--remove", "1", "--text", "text.txt", "--out"];
    let packed = format!("{llama}/model.gguf");
    for (model, options, want) in [
        (
            &llama,
            vec!["fold:1", "--seed", "2", "--out", "x"],
            "--seed without --steps or --remove is without effect",
        ),
        (&llama, vec!["fold:1", "--groups", "3", "--out", "x"], "only a masa conversion has groups"),
        (
            &llama,
            [&["fold:1", "--resume"], &fold[..], &["full"]].concat(),
            "there is no full/gates.safetensors",
        ),
        (&llama, [&["fold:1"], &fold[..], &["full"]].concat(), "checkpoint.safetensors is there already"),
        (&llama, [&["fold:1"], &fold[..], &[&llama]].concat(), "is the folder of the model itself"),
        (&packed, vec!["fold:1", "--out", "x"], "divides the rotary angles by numbers of its own"),
    ] {
        let told = failed(&folder, &[&["convert", model], &options[..]].concat());
        assert!(told.contains(want), "{told}");
    }
    let told = failed(&folder, &["run", "full", "--prompt", "a"]);
    assert!(told.contains("a training that was stopped"), "{told}");
    std::fs::write(folder.join("empty.txt"), "").unwrap();
    let told = failed(&folder, &["train", "--model", "lm.toml", "--text", "empty.txt", "--out", "none"]);
    assert!(told.contains("the file is empty"), "{told}");
    for (args, want) in [
        (vec!["convert", "nowhere", "fold:2", "--out", "x"], "nowhere"),
        (vec!["convert", "lm.toml", "masa:2", "--out", "x"], "lm.toml"),
        (vec!["finetune", "nowhere", "--adapter", "lora", "--data", "d.jsonl", "--out", "x"], "nowhere"),
        (
            vec!["zoo", "lm", "--text", "text.txt", "--out", "x", "--variants", "all"],
            "'all' is none of none, gqa",
        ),
    ] {
        let told = failed(&folder, &args);
        assert!(told.contains(want), "{told}");
    }
}

#[test]
fn an_adapter_is_trained_and_used() {
    let folder = Folder::new("command-finetune");
    let model = root().join("tests/vectors/llm/llama3").display().to_string();
    let packed = format!("{model}/model.gguf");
    let line = |i: usize| format!("{{\"prompt\": \"Say {i}\", \"completion\": \"Ahoy there\"}}\n");
    std::fs::write(folder.join("data.jsonl"), (0..12).map(line).collect::<String>()).unwrap();
    for (kind, base) in [("lora", &model), ("mos", &packed), ("miss", &packed), ("bone", &model)] {
        let args = [
            "finetune",
            base,
            "--adapter",
            kind,
            "--data",
            "data.jsonl",
            "--out",
            kind,
            "--steps",
            "3",
            "--rank",
            "2",
        ];
        let told = done(&folder, &[&args[..], &["--lr", "0.02", "--json=lines.jsonl"]].concat());
        assert!(told.contains("before") && told.contains("after 3 steps"), "{told}");
        let lines = std::fs::read_to_string(folder.join("lines.jsonl")).unwrap();
        let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
        assert!(last["after"].as_f64().unwrap() < last["before"].as_f64().unwrap(), "{last}");
        let run = |more: &[&str]| {
            done(&folder, &[&["run", base, "--prompt", "Say 3", "-n", "4", "-q"], more].concat())
        };
        let with = run(&["--adapter", kind]);
        assert!(
            folder.join(kind).join("loss.svg").is_file() && folder.join(kind).join("curve.jsonl").is_file()
        );
        let shown = done(&folder, &["inspect", kind]);
        assert!(shown.contains("rank         2") && shown.contains("q, k, v, o, gate, up, down"), "{shown}");
        // An adapter that was added to its model's weights is no longer needed.
        if *base == model {
            let merged = format!("{kind}-merged");
            done(&folder, &["convert", base, "--untie", "--adapter", kind, "--out", &merged]);
            assert_eq!(
                done(&folder, &["run", &merged, "--prompt", "Say 3", "-n", "4", "-q"]),
                with,
                "{kind}"
            );
        }
    }
    let told = failed(&folder, &["run", &packed, "--adapter", "lora", "--prompt", "a"]);
    assert!(told.contains("is of llama3") && told.contains("--other-base takes it"), "{told}");
    let told = failed(&folder, &["run", &model, "--adapter", "mos", "--prompt", "a", "--other-base"]);
    assert!(told.contains("pair neighbours"), "{told}");
    std::fs::write(folder.join("bad.jsonl"), "{\"text\": \"a\"}\nno json\n").unwrap();
    let told =
        failed(&folder, &["finetune", &model, "--adapter", "lora", "--data", "bad.jsonl", "--out", "bad"]);
    assert!(told.contains("bad.jsonl") && told.contains("line 2"), "{told}");
    assert!(!folder.join("bad").exists());
}

#[test]
fn the_zoo_keeps_its_runs() {
    let folder = folder("command-zoo");
    let args = [
        "zoo", "lm", "--text", "text.txt", "--adapt", "lm.toml", "--out", "zoo", "--scale", "tiny",
        "--steps", "2", "--seeds", "1,2,1",
    ];
    std::fs::write(folder.join("lm.toml"), &MODEL[..34]).unwrap();
    let told = failed(&folder, &args);
    assert!(told.contains("--adapt: the text has"), "{told}");
    std::fs::write(folder.join("lm.toml"), MODEL.repeat(30)).unwrap();
    let chosen = ["--variants", "none,tied,masa-qkvo,expanded,short,mos-4,lora-1"];
    let table = done(&folder, &[&args[..], &chosen].concat());
    assert!(table.contains("| tied |") && table.contains("| mos-4 |"), "{table}");
    let results = std::fs::read(folder.join("zoo/results.jsonl")).unwrap();
    assert_eq!(text(&results).lines().count(), 14);
    let again = run(&folder, &[&args[..], &chosen].concat());
    assert!(text(&again.stderr).contains("0 runs to do, 14 kept"), "{}", text(&again.stderr));
    assert!(table.ends_with(&text(&again.stdout)) && again.stdout.starts_with(b"| model |"), "{table}");
    assert_eq!(std::fs::read(folder.join("zoo/results.jsonl")).unwrap(), results);
    assert!(folder.join("zoo/zoo.svg").is_file() && folder.join("zoo/adapters.svg").is_file());
}
