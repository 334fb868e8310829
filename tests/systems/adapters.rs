//! Adapters on language models: what PEFT wrote is read and computes the same, what is trained is kept, and another model's is refused.

use crate::support::folder::{Folder, root};
use crate::support::{download, gpu};
use std::path::Path;
use tiebeam::language::{Data, Examples, Training, TrainingOptions};
use tiebeam::models::adapter::{Adapter, AdapterConfig, AdapterKind, Base};
use tiebeam::models::llama::{Form, Published};
use tiebeam::models::lm::{Lm, LmConfig, MlpKind, Positions};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::Module;
use tiebeam::ops::sequence::rope::Pairing;
use tiebeam::ranks::Alone;
use tiebeam::share::ShardConfig;
use tiebeam::store::File;
use tiebeam::text::{Words, byte_tokenizer};
use tiebeam::{DType, Rng, Tensor, no_grad};

fn config() -> LmConfig {
    LmConfig::default().vocab(256).width(16).heads(4).kv_heads(2).hidden(24).depth(3).context(64)
}

fn model(config: LmConfig) -> Lm {
    Lm::new(gpu(), config, &mut Rng::new(3))
}

fn scores(model: &Lm, tokens: &Tensor) -> Vec<f64> {
    download(&no_grad(|| model.forward(tokens)))
}

fn tokens() -> Tensor {
    Tensor::from_slice(gpu(), &[3u32, 1, 4, 1, 5, 9, 2, 6, 5], [1, 9])
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn base() -> Base {
    Base { name: "base".into(), fingerprint: 7 }
}

fn kinds() -> [(AdapterKind, &'static [&'static str]); 5] {
    [
        (AdapterKind::Lora { rank: 2, alpha: 3.0, rslora: false }, &["q", "k", "down"]),
        (AdapterKind::Lora { rank: 4, alpha: 3.0, rslora: true }, &["v"]),
        (AdapterKind::Mos(ShardConfig::new(4, 2).shards(2).private(1)), &["q", "up", "down"]),
        (AdapterKind::Miss { rank: 3 }, &["q", "o", "gate"]),
        (AdapterKind::Bone { rank: 4 }, &["v", "down"]),
    ]
}

/// An adapter whose numbers all differ from their first values.
fn trained(model: &Lm, (kind, targets): (AdapterKind, &[&str])) -> Adapter {
    let config = AdapterConfig::new(kind, targets).unwrap();
    let mut adapter = Adapter::new(model, config, &mut Rng::new(5)).unwrap();
    let mut rng = Rng::new(6);
    adapter
        .map(|_, x| Ok(x.detach().add(&Tensor::randn(gpu(), *x.shape(), &mut rng).scale(0.2)).contiguous()))
        .unwrap();
    adapter
}

#[test]
fn what_peft_wrote_computes_what_it_did() {
    let folder = root().join("tests/vectors/peft");
    let published = Published::open(folder.join("base")).unwrap();
    let file = File::open(folder.join("scores.safetensors")).unwrap();
    let ids: Vec<u32> = file.tensor_i32("tokens").unwrap().into_iter().map(|id| id as u32).collect();
    let tokens = Tensor::from_slice(gpu(), &ids, [1, ids.len()]);
    let want = |name: &str| file.tensor_f32(name).unwrap().into_iter().map(f64::from).collect::<Vec<f64>>();
    for form in [Form::F32, Form::Stored] {
        let model = published.load(gpu(), 16, form).unwrap();
        assert!(apart(&scores(&model, &tokens), &want("base")) < 2e-4);
        for name in ["lora", "rslora", "miss", "bat", "mini", "bone", "bone-bat", "alpha"] {
            let adapter = Adapter::open(folder.join(name), &model, Some(&base())).unwrap();
            let off = apart(&scores(&adapter.apply(&model).unwrap(), &tokens), &want(name));
            assert!(off < 2e-4 && apart(&want(name), &want("base")) > 0.1, "{name}: off by {off:e}");
            // Alphas and ranks of single layers are kept.
            let again = Folder::new("adapters-again");
            adapter.save(again.join(""), &model, &base()).unwrap();
            let opened = Adapter::open(again.join(""), &model, Some(&base())).unwrap();
            let off = apart(&scores(&opened.apply(&model).unwrap(), &tokens), &want(name));
            assert!(off < 2e-4, "{name}, written again: off by {off:e}");
            let text = std::fs::read_to_string(again.join("adapter_config.json")).unwrap();
            let own = text.contains("\"layers.1.mlp.down_proj\": 3");
            assert!(own == (name == "alpha"), "{name}: {text}");
        }
    }
}

#[test]
fn adapters_are_kept_and_opened() {
    let folder = Folder::new("adapters");
    let gpt = config().positions(Positions::Learned).mlp(MlpKind::Gelu).sharing(Sharing::dictionary(2, true));
    for config in [config().sharing(Sharing::tied()), config().pairing(Pairing::Neighbours), gpt] {
        let model = model(config);
        for (kind, targets) in kinds() {
            let targets: Vec<&str> = targets
                .iter()
                .copied()
                .filter(|name| model.config.linears().iter().any(|(own, _)| own == name))
                .collect();
            let fresh =
                Adapter::new(&model, AdapterConfig::new(kind, &targets).unwrap(), &mut Rng::new(5)).unwrap();
            let plain = scores(&model, &tokens());
            assert!(
                apart(&scores(&fresh.apply(&model).unwrap(), &tokens()), &plain) < 1e-5,
                "{kind:?} begins with the model"
            );
            let adapter = trained(&model, (kind, &targets));
            let tuned = adapter.apply(&model).unwrap();
            let own: Vec<_> = adapter.parameters().trainable().iter().map(|(_, x)| x.leaf_id()).collect();
            let mut leaves: Vec<_> =
                tuned.parameters().trainable().iter().map(|(_, x)| x.leaf_id()).collect();
            leaves.dedup();
            assert!(
                own.iter().all(|id| leaves.contains(id)) && own.len() == leaves.len(),
                "{kind:?}: only its leaves train"
            );
            let want = scores(&tuned, &tokens());
            assert!(apart(&want, &plain) > 1e-3, "{kind:?}");
            adapter.save(folder.join(""), &model, &base()).unwrap();
            let again = Adapter::open(folder.join(""), &model, Some(&base())).unwrap();
            assert_eq!(scores(&again.apply(&model).unwrap(), &tokens()), want, "{kind:?}");
            assert_eq!(again.config(), adapter.config());
            let other = Base { name: "other".into(), fingerprint: 8 };
            let error =
                Adapter::open(folder.join(""), &model, Some(&other)).err().expect("refused").to_string();
            assert!(error.contains("is of base") && error.contains("the model is other"), "{error}");
            assert!(Adapter::open(folder.join(""), &model, None).is_ok());
        }
    }
}

/// A GGUF file has the rows of q and k in another order; PEFT's adapters are for the order of folders.
#[test]
fn adapters_go_from_gguf_files_to_folders() {
    let folder = Folder::new("adapters-order");
    let model = model(config().pairing(Pairing::Neighbours));
    model.save_folder(folder.join("plain"), DType::F32).unwrap();
    let plain = Published::open(folder.join("plain")).unwrap().load(gpu(), 64, Form::F32).unwrap();
    assert_eq!(plain.config.pairing, Pairing::Halves);
    for (kind, targets) in kinds() {
        let adapter = trained(&model, (kind, targets));
        adapter.save(folder.join("adapter"), &model, &base()).unwrap();
        let opened = Adapter::open(folder.join("adapter"), &plain, None);
        if matches!(kind, AdapterKind::Mos(_)) {
            let error = opened.err().expect("refused").to_string();
            assert!(error.contains("pair neighbours"), "{error}");
            continue;
        }
        let [a, b] = [adapter.apply(&model), opened.unwrap().apply(&plain)]
            .map(|tuned| scores(&tuned.unwrap(), &tokens()));
        assert!(apart(&a, &b) < 1e-5, "{kind:?}: {:e}", apart(&a, &b));
    }
    // An adapter of a folder may have such blocks, and is refused for the GGUF file.
    let bone = trained(&plain, (AdapterKind::Bone { rank: 4 }, &["q"]));
    bone.save(folder.join("bone"), &plain, &base()).unwrap();
    let error = Adapter::open(folder.join("bone"), &model, None).err().expect("refused").to_string();
    assert!(error.contains("take the folder from which it was made"), "{error}");
    // Bone's blocks mix rows, so that those of q and k cannot be brought to another order. That is told before any training.
    let config = AdapterConfig::new(AdapterKind::Bone { rank: 4 }, &["q", "v"]).unwrap();
    let error = Adapter::new(&model, config, &mut Rng::new(1)).err().expect("refused").to_string();
    assert!(error.contains("leave out these targets"), "{error}");
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}

#[test]
fn files_of_adapters_that_do_not_fit_are_refused() {
    let folder = Folder::new("adapters-wrong");
    let model = model(config());
    let refused =
        |model: &Lm| Adapter::open(folder.join(""), model, None).err().expect("refused").to_string();
    assert!(refused(&model).contains("adapter_config.json"));
    trained(&model, kinds()[0]).save(folder.join(""), &model, &base()).unwrap();
    assert!(
        refused(&Lm::new(gpu(), config().depth(2), &mut Rng::new(1)))
            .contains("block 2, and the model has 2 blocks")
    );
    assert!(
        refused(&Lm::new(gpu(), config().hidden(32), &mut Rng::new(1)))
            .contains("`down` in block 0 is for another size")
    );
    let plain = config().mlp(MlpKind::Gelu);
    let other = Folder::new("adapters-gate");
    trained(&model, (kinds()[0].0, &["gate"])).save(other.join(""), &model, &base()).unwrap();
    let error =
        Adapter::open(other.join(""), &Lm::new(gpu(), plain, &mut Rng::new(1)), None).err().expect("refused");
    assert!(
        error.to_string().contains("an adapter of `gate`, which the model's blocks do not have"),
        "{error}"
    );
    // What names the base is damaged.
    let weights = folder.join("adapter_model.safetensors");
    let (whole, name) = (std::fs::read(&weights).unwrap(), format!("{:032x}", base().fingerprint));
    let at = whole.windows(32).position(|part| part == name.as_bytes()).expect("the fingerprint");
    let mut damaged = whole.clone();
    damaged[at] = b'z';
    std::fs::write(&weights, damaged).unwrap();
    let error = Adapter::open(folder.join(""), &model, Some(&base())).err().expect("refused").to_string();
    assert!(error.contains("is no fingerprint"), "{error}");
    std::fs::write(&weights, whole).unwrap();
    let settings = folder.join("adapter_config.json");
    let text = std::fs::read_to_string(&settings).unwrap();
    for (from, to, want) in [
        ("LORA", "IA3", "'IA3'"),
        ("\"lora_alpha\": 3.0", "\"lora_alpha\": \"x\"", "no number `lora_alpha`"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "`bias` is \"all\""),
        ("LORA", "MISS", "belongs to no linear layer"),
    ] {
        write(&settings, &text.replace(from, to));
        let found = refused(&model);
        assert!(found.contains(want), "{found}");
    }
    for (kind, targets, want) in [
        (AdapterKind::Lora { rank: 17, alpha: 1.0, rslora: false }, "q", "the rank 17 exceeds it"),
        (AdapterKind::Bone { rank: 5 }, "q", "blocks of 5 do not divide both sides"),
        (AdapterKind::Miss { rank: 17 }, "q", "the rank 17 exceeds its inputs"),
    ] {
        let config = AdapterConfig::new(kind, &[targets]).unwrap();
        let error = Adapter::new(&model, config, &mut Rng::new(1)).err().expect(want).to_string();
        assert!(error.contains(want), "{error}");
    }
    let lora = AdapterKind::Lora { rank: 1, alpha: 1.0, rslora: false };
    assert!(AdapterConfig::new(lora, &["query"]).unwrap_err().to_string().contains("there are q, k, v, o"));
    assert!(
        AdapterConfig::new(lora, &[]).is_err()
            && AdapterConfig::new(AdapterKind::Miss { rank: 0 }, &["q"]).is_err()
    );
}

/// A folder with the tokenizer of bytes, and examples that ask for a letter's successor.
fn examples(folder: &Folder, lines: &str) -> (Words, Result<Examples, String>) {
    write(&folder.join("tokenizer.json"), &byte_tokenizer());
    write(&folder.join("data.jsonl"), lines);
    let words = Words::open(folder).unwrap();
    let read = Examples::of_jsonl(&words, &folder.join("data.jsonl"), None, (64, false, 1));
    (words, read.map_err(|error| error.to_string()))
}

fn successors() -> String {
    let line = |i: u8| {
        let (a, b) = (char::from(b'a' + i % 25), char::from(b'b' + i % 25));
        match i % 2 {
            0 => format!("{{\"prompt\": \"after {a} comes \", \"completion\": \"{b}{b}{b}\"}}\n"),
            _ => format!("{{\"instruction\": \"after {a} comes \", \"output\": \"{b}{b}{b}\"}}\n"),
        }
    };
    (0..50).map(line).collect()
}

#[test]
fn an_adapter_learns_answers_and_goes_on_with_the_same_bits() {
    let folder = Folder::new("adapters-learn");
    let (_, examples) = examples(&folder, &successors());
    let examples = examples.unwrap();
    assert_eq!((examples.counts(), examples.cut()), ([45, 5], 0));
    let model = model(config());
    let options =
        TrainingOptions::default().steps(60).every(20).batch(8).lr(0.05).warmup(3).weight_decay(0.0);
    let run = |stops: bool| {
        let config = AdapterConfig::new(
            AdapterKind::Lora { rank: 4, alpha: 8.0, rslora: false },
            &["q", "v", "o", "up", "down"],
        )
        .unwrap();
        let adapter = Adapter::new(&model, config, &mut Rng::new(1)).unwrap();
        let tuned = adapter.apply(&model).unwrap();
        let path = folder.join("checkpoint.safetensors");
        let before = examples.measure(&tuned, usize::MAX, &Alone, &mut |_, _| Ok(())).unwrap();
        let mut training = Training::new(&tuned, &examples, options).unwrap();
        if stops {
            // It ends with an error in the middle, and another run goes on from the last point.
            let mut points = 0;
            let ended = training.run(Some(&path), &mut |progress| {
                points += u32::from(matches!(progress, tiebeam::language::Progress::Point(_)));
                if points == 2 { Err(tiebeam::Error::config("enough")) } else { Ok(()) }
            });
            assert!(ended.is_err());
            let elements: usize =
                File::open(&path).unwrap().names().filter(|n| !n.starts_with("optimizer")).count();
            assert!(elements < 40, "the base is not in the checkpoint");
            let adapter = Adapter::new(&model, adapter.config().clone(), &mut Rng::new(1)).unwrap();
            let tuned = adapter.apply(&model).unwrap();
            let mut training = Training::new(&tuned, &examples, options).unwrap();
            training.resume(&path).unwrap();
            assert_eq!(training.step(), 40);
            assert!(training.run(None, &mut |_| Ok(())).unwrap());
            return (before, training.curve()[2].validation);
        }
        assert!(training.run(None, &mut |_| Ok(())).unwrap());
        (before, training.curve()[2].validation)
    };
    let (before, after) = run(false);
    assert!(after < 0.9 * before, "{before} before, {after} after");
    assert_eq!(run(true), (before, after));
}

/// Another factor or another base is another run, although all sizes are the same.
#[test]
fn another_adapter_does_not_go_on() {
    let folder = Folder::new("adapters-other");
    let (_, examples) = examples(&folder, &successors());
    let (examples, model, path) = (examples.unwrap(), model(config()), folder.join("checkpoint.safetensors"));
    let options = TrainingOptions::default().steps(4).every(2).batch(2);
    let lora =
        |alpha| AdapterConfig::new(AdapterKind::Lora { rank: 2, alpha, rslora: false }, &["q"]).unwrap();
    let tuned = |alpha| Adapter::new(&model, lora(alpha), &mut Rng::new(1)).unwrap().apply(&model).unwrap();
    let (one, two) = (tuned(1.0), tuned(100.0));
    let told = |model, alpha: f32| {
        Training::new(model, &examples, options).unwrap().say("adapter", format!("{:?}", lora(alpha)))
    };
    assert!(told(&one, 1.0).run(Some(&path), &mut |_| Ok(())).unwrap());
    told(&one, 1.0).resume(&path).unwrap();
    let error = told(&two, 100.0).resume(&path).unwrap_err().to_string();
    assert!(error.contains("`train.adapter`") && error.contains("100.0"), "{error}");
}

/// A run that is stopped between two points has the curve of one that was not.
#[test]
fn a_curve_goes_on_between_points() {
    let folder = Folder::new("adapters-curve");
    let (_, examples) = examples(&folder, &successors());
    let (examples, path) = (examples.unwrap(), folder.join("checkpoint.safetensors"));
    let options = TrainingOptions::default().steps(12).every(6).batch(2);
    let run = |stop_at: Option<u64>| {
        let model = model(config());
        let flag = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let mut training = Training::new(&model, &examples, options).unwrap().stop(flag.clone());
        if stop_at.is_none() && path.exists() {
            training.resume(&path).unwrap();
        }
        let mut stop = |progress: tiebeam::language::Progress| {
            let due =
                matches!(progress, tiebeam::language::Progress::Step(report) if Some(report.step) == stop_at);
            flag.fetch_or(due, std::sync::atomic::Ordering::SeqCst);
            Ok(())
        };
        let done = training.run(Some(&path), &mut stop).unwrap();
        (
            done,
            training.step(),
            training.curve().iter().map(|point| (point.loss, point.validation)).collect::<Vec<_>>(),
        )
    };
    let (_, _, want) = run(None);
    std::fs::remove_file(&path).unwrap();
    let (done, step, _) = run(Some(2));
    assert!(!done && step > 2 && step < 6, "it was stopped at step {step}, between points");
    assert_eq!(run(None).2, want);
    // Stopped before the held-out examples of a point were measured, it measures them first.
    std::fs::remove_file(&path).unwrap();
    assert_eq!(run(Some(6)), (false, 6, vec![]));
    assert_eq!(run(None).2, want);
}

/// Models with short contexts have short batches.
#[test]
fn examples_fit_short_contexts() {
    let folder = Folder::new("adapters-short");
    let (words, _) = examples(&folder, &successors());
    let short = Examples::of_jsonl(&words, &folder.join("data.jsonl"), None, (20, false, 1)).unwrap();
    let model = model(config().context(20));
    let mut training = Training::new(&model, &short, TrainingOptions::default().steps(2).batch(2)).unwrap();
    assert!(training.run(None, &mut |_| Ok(())).unwrap());
    let tiny = Lm::new(gpu(), config().context(16), &mut Rng::new(1));
    assert!(Training::new(&tiny, &short, TrainingOptions::default()).is_err());
}

#[test]
fn lines_that_cannot_be_learned_are_named() {
    let folder = Folder::new("adapters-lines");
    let good = "{\"text\": \"abc\"}\n{\"text\": \"abd\"}\n";
    let told = |line: &str| examples(&folder, &format!("{good}{line}\n")).1.err().expect(line);
    for (line, want) in [
        ("{\"text\": ", "line 3: EOF"),
        ("{\"question\": \"a\"}", "line 3: it has neither text, prompt and completion"),
        ("{\"prompt\": \"a\", \"completion\": 3}", "line 3: `completion` is 3, and must be text"),
        ("{\"prompt\": \"a\", \"completion\": \"\"}", "line 3: its prompt or its answer is empty"),
        ("{\"text\": \"\"}", "line 3: its text is empty"),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}",
            "the last of its messages must be the assistant's",
        ),
        (
            "{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}]}",
            "its `messages` need one before the answer",
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}",
            "need a model with a chat template",
        ),
    ] {
        let found = told(line);
        assert!(found.contains(want) && found.contains("data.jsonl"), "{found}");
    }
    let long = format!("{{\"prompt\": \"{}\", \"completion\": \"b\"}}", "a".repeat(70));
    assert!(told(&long).contains(
        "line 3: its prompt has 70 tokens, which leaves no place for an answer in a context of 64"
    ));
    assert!(examples(&folder, "{\"text\": \"abc\"}").1.err().unwrap().contains("both parts need one"));
    let (_, cut) = examples(&folder, &format!("{good}{{\"text\": \"{}\"}}\n", "a".repeat(90)));
    assert_eq!(cut.unwrap().cut(), 1);
}
