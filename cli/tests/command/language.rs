//! `tiebeam run` and `tiebeam inspect`, on three tiny models whose tokens transformers has computed.

use crate::support::folder::{Folder, root};
use crate::{command, text};
use serde_json::Value;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use tiebeam::models::llama::{Form, Published};
use tiebeam::text::{Message, Words};
use tiebeam::{Gpu, no_grad};

fn model(name: &str) -> PathBuf {
    root().join("tests/vectors/llm").join(name)
}

fn run(args: &[&str], stdin: &str) -> Output {
    let mut child = command()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    // A command that reads no prompt from stdin may have ended.
    let _ = child.stdin.take().expect("a pipe").write_all(stdin.as_bytes());
    child.wait_with_output().expect("it ends")
}

fn lines(bytes: &[u8]) -> Vec<Value> {
    let line = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
    text(bytes).lines().map(line).collect()
}

/// The likeliest tokens behind a prompt, each from the whole sequence before it, until the model ends.
fn greedy(name: &str, prompt: &[u32], count: usize) -> Vec<u32> {
    let gpu = Gpu::open().expect("an adapter");
    let words = Words::open(&model(name)).expect("a tokenizer");
    let llama = Published::open(model(name)).and_then(|m| m.load(&gpu, 128, Form::F32)).expect("a model");
    let mut all = prompt.to_vec();
    while all.len() < prompt.len() + count {
        let x = tiebeam::Tensor::from_slice(&gpu, &all, [1, all.len()]);
        let scores = no_grad(|| llama.forward(&x)).to_vec::<f32>().expect("scores");
        let last = &scores[scores.len() - llama.config.vocab..];
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).expect("a token") as u32;
        if words.ends().contains(&best) {
            break;
        }
        all.push(best);
    }
    all.split_off(prompt.len())
}

#[test]
fn run_continues_a_text_as_the_model_does() {
    for name in ["llama3", "qwen2", "mistral", "llama3/model.gguf"] {
        let path = model(name).display().to_string();
        let words = Words::open(&model(name)).expect("a tokenizer");
        let prompt = words.encode("The ship").expect("tokens");
        let want = greedy(name, &prompt, 12);
        let whole = words.decode(&[&prompt[..], &want[..]].concat()).expect("a text");
        let args = ["run", &path, "--raw", "-n", "12", "--keys", "f32", "--chunk", "2", "--context", "100"];
        let done = run(&[&args[..], &["--prompt", "The ship"]].concat(), "");
        assert!(done.status.success(), "{name}: {}", text(&done.stderr));
        assert_eq!(text(&done.stdout).trim_end(), whole.trim_end(), "{name}");
        // The prompt may come from stdin or a file, and the answer is a JSON line too.
        let piped = run(&[&args[..], &["--json", "-q"]].concat(), "The ship");
        let found = lines(&piped.stdout);
        assert_eq!(found[0]["line"], "model", "{name}");
        let answer = &found[1];
        assert_eq!(
            (answer["line"].as_str(), answer["tokens"].as_u64()),
            (Some("answer"), Some(want.len() as u64))
        );
        assert!(whole.trim_end().ends_with(answer["text"].as_str().expect("a text").trim_end()), "{answer}");
        for key in
            ["tokens_per_second", "prompt_tokens_per_second", "seconds_to_first_token", "peak_device_bytes"]
        {
            assert!(answer[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {answer}");
        }
    }
}

#[test]
fn run_answers_through_the_template() {
    let path = model("qwen2");
    let words = Words::open(&path).expect("a tokenizer");
    let messages = [Message::system("be brief"), Message::user("hello")];
    let rendered = words.chat().expect("a template").render(&messages, true).expect("a text");
    let prompt = words.encode_chat(&rendered).expect("tokens");
    let want = words.decode(&greedy("qwen2", &prompt, 8)).expect("a text");
    let path = path.display().to_string();
    let args = ["run", &path, "-n", "8", "--keys", "f32", "--context", "128", "--system", "be brief"];
    let done = run(&[&args[..], &["--prompt", "hello"]].concat(), "");
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert_eq!(text(&done.stdout).trim_end(), want.trim_end());
    assert!(
        text(&done.stderr).contains(&format!("prompt {} tokens", prompt.len())),
        "{}",
        text(&done.stderr)
    );
}

#[test]
fn equal_seeds_give_equal_answers() {
    let path = model("llama3").display().to_string();
    let answer = |seed: &str| {
        let args =
            ["run", &path, "--raw", "-n", "24", "--temperature", "1.5", "--top-k", "40", "--top-p", "0.95"];
        let done = run(&[&args[..], &["--context", "64", "--prompt", "The", "--seed", seed]].concat(), "");
        assert!(done.status.success(), "{}", text(&done.stderr));
        text(&done.stdout)
    };
    assert_eq!(answer("3"), answer("3"));
    assert_ne!(answer("3"), answer("4"));
}

#[test]
fn run_says_what_is_wrong() {
    let path = model("llama3").display().to_string();
    let folder = Folder::new("run");
    let empty = folder.join("empty");
    std::fs::create_dir(&empty).expect("a folder");
    let empty = empty.display().to_string();
    let long = "word ".repeat(100);
    for (args, stdin, says) in [
        (vec!["run", &path, "--prompt", ""], "", "the prompt is empty"),
        (vec!["run", &path], "", "the prompt is empty"),
        (
            vec!["run", &path, "--raw", "--context", "32"],
            &long[..],
            "which leaves no place for an answer in a context of 32",
        ),
        (vec!["run", &path, "--prompt", "a", "--temperature=-1"], "", "temperature"),
        (vec!["run", &path, "--prompt", "a", "--top-p", "0"], "", "top-p"),
        (vec!["run", &path, "--file", "no-such-file"], "", "no-such-file"),
        (vec!["run", &empty, "--prompt", "a"], "", "config.json"),
        (vec!["run", "no-such-model", "--prompt", "a"], "", "no-such-model"),
        (vec!["run", &path, "--prompt", "a", "--gpu", "no such adapter"], "", "no such adapter"),
        (vec!["run", &path, "--prompt", "a", "--memory", "10KB", "--context", "64"], "", "are allowed"),
    ] {
        let done = run(&args, stdin);
        let said = text(&done.stderr);
        assert!(!done.status.success() && said.contains(says), "{args:?}: {said}");
    }
}

#[test]
fn inspect_needs_no_device() {
    for (name, says) in [
        (
            "llama3",
            vec!["llama", "scaled as in Llama 3 by 8", "byte-level BPE, llama-bpe", "runs         yes"],
        ),
        ("qwen2", vec!["qwen2", "BF16", "byte-level BPE, qwen2", "with a chat template"]),
        ("mistral", vec!["window of 4", "4 heads of 16 with 2 of keys", "sentencepiece BPE"]),
        ("llama3/model.gguf", vec!["F32: ", "llama", "32.00 bits an element"]),
    ] {
        let path = model(name).display().to_string();
        // No backend is there: a device could not be opened.
        let shown =
            command().args(["inspect", &path]).env("TIEBEAM_BACKEND", "none").output().expect("it runs");
        let said = text(&shown.stdout);
        assert!(shown.status.success(), "{name}: {}", text(&shown.stderr));
        assert!(says.iter().all(|word| said.contains(word)), "{name}: {said}");
        let json = run(&["inspect", &path, "--json", "--tensors", "-q"], "");
        let found = lines(&json.stdout);
        let of = |line: &str| found.iter().filter(|l| l["line"] == line).count();
        assert_eq!([of("model"), of("tokenizer"), of("runs")], [1, 1, 1], "{name}");
        assert!(of("tensor") > 10 && of("type") >= 1, "{name}");
        assert_eq!(found.last().expect("lines")["runs"], true);
    }
}

#[test]
fn inspect_says_what_cannot_be_run_and_why() {
    let folder = Folder::new("inspect");
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model("llama3").join(file), folder.join(file)).expect("copied");
    }
    let config = std::fs::read_to_string(folder.join("config.json")).expect("text");
    std::fs::write(folder.join("config.json"), config.replace("\"llama\"", "\"gpt_neox\"")).expect("written");
    let path = folder.join("").display().to_string();
    let shown = run(&["inspect", &path], "");
    let said = text(&shown.stdout);
    assert!(
        shown.status.success() && said.contains("runs         no:") && said.contains("'gpt_neox'"),
        "{said}"
    );
    let refused = run(&["run", &path, "--prompt", "a"], "");
    assert!(text(&refused.stderr).contains("'gpt_neox'"), "{}", text(&refused.stderr));
    let nothing = run(&["inspect", "no-such-model"], "");
    assert!(!nothing.status.success() && text(&nothing.stderr).contains("no-such-model"));
}
