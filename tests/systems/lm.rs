//! Language models of every kind of sharing: they are saved and opened with the same bits, decode with a cache as they compute
//! without, and what does not fit is refused.

use crate::support::folder::Folder;
use crate::support::{download, gpu};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiebeam::decode::{Sampler, SamplerOptions};
use tiebeam::language::{Corpus, GateOptions, GateTraining, Training, TrainingOptions};
use tiebeam::models::conversion::{Conversion, ConversionOptions};
use tiebeam::models::foldgpt::ranking;
use tiebeam::models::llama::{Form, Published};
use tiebeam::models::lm::{ExpertsConfig, Lm, LmConfig, MlpKind, NormKind, Positions, Saved, SessionOptions};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::{Module, check_listed};
use tiebeam::ops::sequence::rope::Pairing;
use tiebeam::store::{File, save_tensors};
use tiebeam::{DType, Rng, Tensor, no_grad};

fn config() -> LmConfig {
    LmConfig::default().vocab(13).width(16).heads(4).kv_heads(2).hidden(24).depth(6).context(12)
}

fn experts() -> ExpertsConfig {
    ExpertsConfig { count: 3, top: 2, capacity: 1.25, balance: 0.01 }
}

/// Every kind of sharing, and every kind of part.
fn all() -> Vec<(String, LmConfig)> {
    let sharings = [
        "none",
        "tied",
        "tied-lora rank 3 scale 0.5",
        "cycle 2 rank 0",
        "cycle 3 rank 2",
        "fold 4",
        "stages 1 3 2",
        "dictionary 2 output true",
        "dictionary 2 output false net",
        "masa groups 2,4 atoms 1,3 rank 4",
        "low-rank 3",
        "hashed 4",
        "hashed 2 element",
        "q k v o: dictionary 3 output true; gate up: cycle 2 rank 2; tied",
        "gate up down: dictionary 2 output true; q k v o: low-rank 2; none",
        "up down: masa groups 2,4 atoms 1,2 rank 2; none",
    ];
    let mut all: Vec<(String, LmConfig)> = sharings
        .iter()
        .map(|text| (text.to_string(), config().sharing(Sharing::named(text).unwrap())))
        .collect();
    let mut put = |name: &str, config: LmConfig| all.push((name.into(), config));
    let gpt = config().positions(Positions::Learned).mlp(MlpKind::Gelu).norm(NormKind::Layer);
    put(
        "the form of GPT-2",
        gpt.clone().biases([true, true, true, true, false, true, true]).sharing(Sharing::tied()),
    );
    put("no positions", config().positions(Positions::None).mlp(MlpKind::Gelu));
    put("ends", config().ends([1, 2]).sharing(Sharing::dictionary(2, true)));
    put("ends with shared norms", config().ends([1, 1]).shared_norms(true).sharing(Sharing::cycle(2, 0)));
    put("a head of its own", config().tied_head(false).sharing(Sharing::hashed(3.0)));
    put("a window", config().window(Some(4)).window_from(2).sharing(Sharing::tied()));
    put("WideNet", gpt.experts(Some(experts())).sharing(Sharing::tied()));
    let experts = config().experts(Some(experts()));
    put("experts from one store", experts.clone().sharing(Sharing::hashed(2.0)));
    put(
        "experts of which attention is tied",
        experts.sharing(Sharing::named("q k v o: tied; none").unwrap()),
    );
    let qwen = config().biases([true, true, true, false, false, false, false]);
    put("neighbours and biases", qwen.pairing(Pairing::Neighbours).head_width(Some(6)));
    all
}

/// A model whose biases and norms differ from their first values.
fn model(config: LmConfig) -> Lm {
    let mut model = Lm::new(gpu(), config, &mut Rng::new(3));
    let mut rng = Rng::new(5);
    let mut moved =
        |x: &Tensor| x.detach().add(&Tensor::randn(gpu(), *x.shape(), &mut rng).scale(0.1)).contiguous();
    model.map(|_, x| Ok(if x.shape().len() == 1 { moved(x) } else { x.clone() })).unwrap();
    model
}

fn tokens(length: usize) -> Tensor {
    let ids: Vec<u32> = (0..length as u32).map(|i| (i * 7 + i / 3) % 13).collect();
    Tensor::from_slice(gpu(), &ids, [1, length])
}

fn scores(model: &Lm, length: usize) -> Vec<f64> {
    download(&no_grad(|| model.forward(&tokens(length))))
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn every_model_is_opened_with_the_bits_that_were_saved() {
    let folder = Folder::new("lm-saved");
    for (name, config) in all() {
        let model = model(config);
        let path = folder.join("model.safetensors");
        model.save_with(&path, &[("note".to_string(), "kept".to_string())].into()).unwrap();
        let saved = Saved::open(folder.join("")).unwrap();
        assert_eq!((saved.config(), saved.metadata()["note"].as_str()), (&model.config, "kept"), "{name}");
        let again = saved.load(gpu()).unwrap();
        assert_eq!(scores(&again, 9), scores(&model, 9), "{name}");
        assert_eq!(again.counts(), model.counts(), "{name}");
        // What is shared is in the file once.
        let held: usize = File::open(&path).unwrap().names().map(|n| saved_elements(&path, n)).sum();
        assert_eq!(held, model.counts()[0], "{name}");
        std::fs::remove_file(path).unwrap();
    }
}

fn saved_elements(path: &std::path::Path, name: &str) -> usize {
    File::open(path).unwrap().info(name).unwrap().shape.iter().product()
}

#[test]
fn decoding_with_a_cache_is_the_model() {
    let ids = tokens(11).to_vec::<u32>().unwrap();
    for (name, config) in all() {
        let model = model(config);
        let want = scores(&model, 11);
        for chunk in [1, 3, 12] {
            let mut session = model.session_with(SessionOptions::default().context(12).chunk(chunk)).unwrap();
            let first = session.push(&ids[..7]).unwrap();
            let rest: Vec<Vec<f32>> = ids[7..].iter().map(|&id| session.push(&[id]).unwrap()).collect();
            for (i, found) in [first].into_iter().chain(rest).enumerate() {
                let found: Vec<f64> = found.into_iter().map(f64::from).collect();
                let off = apart(&found, &want[(6 + i) * 13..][..13]);
                assert!(off < 2e-4, "{name}, chunks of {chunk}, token {}: {off:e}", 6 + i);
            }
        }
    }
}

#[test]
fn likeliest_tokens_are_generated_to_the_end_of_the_context() {
    let model = model(config().sharing(Sharing::cycle(2, 2)));
    let mut want = tokens(4).to_vec::<u32>().unwrap();
    // Four tokens, and one more for each place that is left and for the scores of the last.
    while want.len() < 13 {
        let ids = Tensor::from_slice(gpu(), &want, [1, want.len()]);
        let last = download(&no_grad(|| model.forward(&ids))).split_off(13 * (want.len() - 1));
        want.push((0..13).max_by(|&a, &b| last[a].total_cmp(&last[b]).then(b.cmp(&a))).unwrap() as u32);
    }
    let from = |most: usize, end: Option<u32>| {
        let mut session = model.session(12).unwrap();
        let scores = session.push(&want[..4]).unwrap();
        let mut likeliest = Sampler::new(SamplerOptions::default()).unwrap();
        let found = session.generate(scores, most, &mut likeliest, |token| Ok(Some(token) != end)).unwrap();
        (found, session.length())
    };
    assert_eq!(from(99, None), (want[4..].to_vec(), 12));
    assert_eq!(from(3, None), (want[4..7].to_vec(), 6));
    assert_eq!(from(0, None), (vec![], 4));
    let end = want[4..].iter().position(|token| *token == want[6]).unwrap();
    assert_eq!(from(99, Some(want[6])), (want[4..4 + end].to_vec(), 4 + end));
}

#[test]
fn every_leaf_is_listed_and_learns() {
    let targets = tokens(9).flip(1);
    for (name, config) in all() {
        let model = model(config);
        let loss = model.training_loss(&tokens(9), &targets, &mut Rng::new(1));
        check_listed(&model, &loss).unwrap_or_else(|error| panic!("{name}: {error}"));
        let grads = loss.backward().unwrap();
        for (leaf, x) in model.parameters().trainable() {
            let found = grads.get(&x).unwrap_or_else(|| panic!("{name}: {leaf} has no gradient"));
            assert!(download(found).iter().all(|g| g.is_finite()), "{name}: {leaf}");
        }
    }
}

/// What the error of a file that holds `settings` says.
fn refusal(settings: &BTreeMap<String, String>) -> String {
    let folder = Folder::new("lm-refused");
    let path = folder.join("model.safetensors");
    let all = model(config()).parameters().state_dict();
    save_tensors(&path, all.iter().map(|(name, x)| (name, x)), settings).unwrap();
    Lm::open(gpu(), &path).err().expect("refused").to_string()
}

#[test]
fn files_that_are_not_theirs_are_refused() {
    let with = |key: &str, value: &str| {
        let mut all = config().metadata();
        all.insert(key.into(), value.into());
        refusal(&all)
    };
    let cases = [
        (refusal(&BTreeMap::new()), "no language model in its metadata"),
        (with("lm.version", "3"), "version 3, and this program reads versions up to 2"),
        (with("lm.version", "new"), "version new, and"),
        (with("lm.depth", "7"), "it lacks blocks.6.norm1.gain"),
        (with("lm.depth", "six"), "`depth` is 'six', and cannot be read as a number"),
        (with("lm.hidden", "25"), "is [24, 16], the model's is [25, 16]"),
        (with("lm.sharing", "circulant"), "others must be registered"),
        (with("lm.sharing", "cycle 4 rank 0"), "4 blocks do not divide 6 depths; use one of [1, 2, 3, 6]"),
        (with("lm.sharing", "stages 3 2"), "stages of [3, 2] depths, and the model has 6"),
        (
            with("lm.sharing", "q x: tied; none"),
            "`x` is no matrix of a block; there are q, k, v, o, gate, up, down",
        ),
        (with("lm.sharing", "q: tied; q: tied; none"), "`q` is named twice"),
        (with("lm.norm", "batch"), "`norm` is 'batch', and must be one of rms, layer"),
        (with("lm.wdith", "3"), "there is no setting `wdith`; the nearest are `width`"),
        (with("lm.ends", "4 3"), "4 first and 3 last blocks of 6 share nothing"),
        (with("lm.experts", "2 top 3"), "the 3 best of 2 experts"),
        (with("lm.heads", "3"), "16 is no multiple of 3 heads"),
        (with("lm.eps", "NaN"), "the norms add NaN"),
        (with("lm.window", "0"), "a window of 0 hides every key"),
        (refusal(&config().ends([3, 3]).sharing(Sharing::tied()).metadata()), "leaves none for `tied`"),
        (with("lm.hidden", "2147483647"), "a matrix of [2147483647, 16]"),
        (with("lm.context", "2147483647"), "a matrix of [2147483647, 16]"),
        (with("lm.vocab", "20000000"), "its settings are those of a model of"),
        (with("lm.depth", "2000000000"), "weights in all"),
        (with("lm.depth", "1000000"), "its settings are those of a model of"),
        (with("lm.experts", "65536 top 65536"), "its settings are those of a model of"),
        (with("lm.sharing", "low-rank 1000000000000"), "a rank of 1000000000000; use 1 to 8"),
        (with("lm.sharing", "hashed 0.5"), "a factor of 0.5"),
    ];
    for (found, want) in cases {
        assert!(found.contains(want), "{found}\nlacks: {want}");
        assert!(found.contains("model.safetensors") || found.starts_with("config"), "{found}");
    }
    assert!(Lm::open(gpu(), "nowhere/at/all").is_err());
}

/// `tests/vectors/lm/v1.safetensors` was written by commit b66c18e, whose models of this form were called `Recursive`.
#[test]
fn files_of_the_first_version_are_read() {
    let path = crate::support::folder::root().join("tests/vectors/lm/v1.safetensors");
    let saved = Saved::open(&path).unwrap();
    let c = saved.config();
    assert_eq!((c.vocab, c.width, c.heads, c.kv_heads, c.depth), (11, 8, 2, 2, 4));
    assert_eq!(
        (c.positions, c.mlp, c.sharing.text().as_str()),
        (Positions::Learned, MlpKind::Gelu, "cycle 2 rank 1")
    );
    let file = File::open(&path).unwrap();
    let tokens = Tensor::from_slice(gpu(), &file.tensor_u32("check.tokens").unwrap(), [1, 5]);
    let model = Lm::new(gpu(), c.clone(), &mut Rng::new(0));
    let loaded = tiebeam::nn::ModuleFile::load_partly(&model, &path).unwrap();
    assert_eq!(
        (loaded.missing.len(), &loaded.unexpected[..]),
        (0, &["check.scores".into(), "check.tokens".into()][..])
    );
    let want: Vec<f64> = file.tensor_f32("check.scores").unwrap().into_iter().map(f64::from).collect();
    let off = apart(&download(&no_grad(|| model.forward(&tokens))), &want);
    assert!(off < 1e-5, "{off:e}");
}

#[test]
fn conversions_are_kept_and_opened() {
    let folder = Folder::new("lm-converted");
    let original = model(config());
    let sample = tokens(12);
    let options = ConversionOptions::default();
    let cases = [
        ("recursive:2", options.clone().rank(2)),
        ("recursive:1", options.clone().ends([1, 2])),
        ("masa:4", options.clone().groups(2).rank(1)),
        ("masa:2", options.clone()),
        ("fold:2", options.clone().removed(vec![1])),
        ("hashed:2", options.clone()),
    ];
    for (text, options) in cases {
        let conversion: Conversion = text.parse().unwrap();
        let new = conversion.apply(&original, &options, &sample, |_| {}).unwrap();
        assert!(new.counts()[0] < original.counts()[0], "{text}");
        let path = folder.join("model.safetensors");
        new.save(&path).unwrap();
        let again = Lm::open(gpu(), &path).unwrap();
        assert_eq!(scores(&again, 9), scores(&new, 9), "{text}");
        assert_eq!(again.counts(), new.counts(), "{text}");
    }
    let wrong = [
        ("fold:2", options.clone().rank(1), "fold:2: it has no low-rank parts"),
        ("masa:2", options.clone().ends([1, 0]), "only a recursive conversion keeps blocks at the ends"),
        ("hashed:2", options.clone().groups(2), "only a masa conversion has groups"),
        ("recursive:2", options.clone().removed(vec![1]), "only a fold conversion removes blocks"),
        ("recursive:4", options.clone(), "4 blocks in turn do not divide 6 layers; use one of [1, 2, 3, 6]"),
        ("recursive:1", options.clone().ends([3, 3]), "3 first and 3 last blocks are kept of 6"),
    ];
    for (text, options, want) in wrong {
        let conversion: Conversion = text.parse().unwrap();
        let found = conversion.apply(&original, &options, &sample, |_| {}).err().expect(want).to_string();
        assert!(found.contains(want), "{found}");
    }
}

/// Whatever a model shares, and however it is converted: what is written is opened and computes the same.
#[test]
fn every_conversion_of_every_model_is_opened() {
    let folder = Folder::new("lm-crossed");
    let path = folder.join("model.safetensors");
    let options = ConversionOptions::default();
    let conversions = [
        ("recursive:2", options.clone().rank(2)),
        ("masa:4", options.clone().groups(2).rank(1)),
        ("fold:2", options.clone().removed(vec![5])),
        ("hashed:2", options.clone()),
    ];
    for (name, config) in all() {
        let original = model(config.clone());
        for (text, options) in &conversions {
            let conversion: Conversion = text.parse().unwrap();
            let new = match conversion.apply(&original, options, &tokens(12), |_| {}) {
                Ok(new) => new,
                Err(error) => {
                    let experts = config.experts.is_some() && error.to_string().contains("models of experts");
                    assert!(experts, "{name} by {text}: {error}");
                    continue;
                }
            };
            new.save(&path).unwrap();
            let again = Lm::open(gpu(), &path).unwrap_or_else(|error| panic!("{name} by {text}: {error}"));
            assert_eq!(scores(&again, 9), scores(&new, 9), "{name} by {text}");
            assert_eq!(again.counts(), new.counts(), "{name} by {text}");
        }
    }
}

/// Blocks before the first window keep seeing everything, however many blocks before them are left out.
#[test]
fn windows_stay_with_their_blocks() {
    let original = model(config().window(Some(4)).window_from(2));
    let folded = original.folded(&[0], 1).unwrap();
    assert_eq!((folded.config.window_from, folded.config.depth), (1, 5));
    assert_eq!(original.folded(&[4], 1).unwrap().config.window_from, 2);
    let error = original.untied(&[0, 3, 1]).err().expect("refused").to_string();
    assert!(error.contains("blocks without a window of attention"), "{error}");
}

/// Depths share norms where they use one matrix, not where their matrices are made of the same numbers.
#[test]
fn norms_are_shared_with_the_matrix() {
    let norms = |text: &str| {
        let config = config().shared_norms(true).sharing(Sharing::named(text).unwrap());
        let mut ids: Vec<_> = model(config).blocks.iter().map(|block| block.norm1.gain.leaf_id()).collect();
        ids.sort();
        ids.dedup();
        ids.len()
    };
    assert_eq!(["tied", "cycle 2 rank 1", "stages 1 3 2"].map(norms), [1, 2, 3]);
    assert_eq!(["none", "dictionary 2 output true", "hashed 2"].map(norms), [6, 6, 6]);
}

#[test]
fn numbers_that_a_type_does_not_hold_are_told() {
    let folder = Folder::new("lm-overflow");
    let mut large = model(config());
    large.norm.gain = Tensor::full(gpu(), [16], 1e5);
    let error = large.save_folder(folder.join("f16"), DType::F16).unwrap_err().to_string();
    assert!(error.contains("`model.norm.weight` has numbers up to 1e5") && error.contains("bf16"), "{error}");
    assert!(!folder.join("f16/model.safetensors").exists());
    large.save_folder(folder.join("bf16"), DType::Bf16).unwrap();
}

/// As many numbers as there are weights, each read once, keep everything; fewer keep their share of the squared norm.
#[test]
fn a_hashed_model_keeps_what_its_store_can_hold() {
    let original = model(config());
    let all = |model: &Lm| {
        let linears = model.blocks.iter().flat_map(|block| block.linears());
        linears.flat_map(|(_, linear)| download(&linear.weight.expand())).collect::<Vec<f64>>()
    };
    let want = all(&original);
    let kept = |factor: f64| {
        let lost: f64 =
            all(&original.hashed(factor).unwrap()).iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum();
        1.0 - lost / want.iter().map(|w| w * w).sum::<f64>()
    };
    assert!((kept(1.0) - 1.0).abs() < 1e-5, "{}", kept(1.0));
    // Weights of unequal deviations that read one number leave more than their share.
    let [half, quarter] = [2.0, 4.0].map(kept);
    assert!((0.45..0.8).contains(&half) && (0.2..0.5).contains(&quarter), "{half}, {quarter}");
}

#[test]
fn an_untied_folder_computes_what_the_model_does() {
    let folder = Folder::new("lm-untied");
    let plain = config();
    let biased = |biases: [bool; 7]| plain.clone().biases(biases);
    let cases = [
        ("llama", plain.clone().sharing(Sharing::cycle(2, 2))),
        ("llama", plain.clone().sharing(Sharing::hashed(2.0)).tied_head(false)),
        ("llama", biased([true; 7]).sharing(Sharing::dictionary(2, true))),
        ("llama", plain.clone().pairing(Pairing::Neighbours).head_width(Some(6))),
        ("qwen2", biased([true, true, true, false, false, false, false]).pairing(Pairing::Neighbours)),
        ("qwen2", biased([true, true, true, false, false, false, false]).window(Some(5)).window_from(3)),
        ("mistral", plain.clone().window(Some(5)).sharing(Sharing::tied())),
    ];
    for (kind, config) in cases {
        let model = model(config);
        for (dtype, most) in [(DType::F32, 1e-5), (DType::Bf16, 0.2), (DType::F16, 0.02)] {
            model.save_folder(folder.join(""), dtype).unwrap();
            let published = Published::open(folder.join("")).unwrap();
            assert_eq!(published.kind(), kind);
            assert_eq!(published.check().unwrap(), model.copied().counts()[0]);
            let again = published.load(gpu(), 12, Form::F32).unwrap();
            let off = apart(&scores(&again, 11), &scores(&model, 11));
            assert!(off < most, "{kind} in {dtype}: off by {off:e}");
        }
    }
    let wrong = [
        plain.clone().norm(NormKind::Layer),
        plain.clone().mlp(MlpKind::Gelu),
        biased([false, true, false, false, false, false, false]),
    ];
    for config in wrong {
        let error = model(config).save_folder(folder.join("wrong"), DType::F32).unwrap_err().to_string();
        assert!(
            error.contains("no published kind has this form") && !folder.join("wrong").exists(),
            "{error}"
        );
    }
}

#[test]
fn a_context_is_changed_where_positions_allow_it() {
    let model = model(config());
    let longer = model.with_context(20).unwrap();
    assert_eq!(scores(&longer, 12), scores(&model, 12));
    assert_eq!(scores(&longer, 20).len(), 20 * 13);
    let learned = Lm::new(gpu(), config().positions(Positions::Learned), &mut Rng::new(1));
    assert!(learned.with_context(20).err().expect("refused").to_string().contains("learned for 12 tokens"));
    assert!(model.with_context(0).is_err() && learned.with_context(12).is_ok());
}

/// The key heads of all depths are tied in one recipe and the experts in none: the recipe of each matrix is its own.
#[test]
fn recipes_by_matrix_share_what_they_name() {
    let text = "k v: tied; up down: cycle 2 rank 0; none";
    let model = model(config().sharing(Sharing::named(text).unwrap()));
    let distinct = |name: &str| {
        let mut ids: Vec<_> =
            model.blocks.iter().map(|b| b.linear(name).weight.leaves()[0].leaf_id()).collect();
        ids.sort();
        ids.dedup();
        ids.len()
    };
    assert_eq!(["q", "k", "v", "o", "gate", "up", "down"].map(distinct), [6, 1, 1, 6, 6, 2, 2]);
}

/// A small model that was trained for a little, of which one block does nothing.
fn idle_block(corpus: &Corpus, idle: usize) -> Lm {
    let model = Lm::new(gpu(), config().depth(4), &mut Rng::new(1));
    let options = TrainingOptions::default().steps(40).warmup(4).batch(8).lr(0.01).every(40);
    assert!(Training::new(&model, corpus, options).unwrap().run(None, &mut |_| Ok(())).unwrap());
    let mut model = model.untied(&[0, 1, 2, 3]).unwrap();
    model.blocks[idle]
        .map(|name, x| {
            Ok(if name.starts_with("attention.o") || name.contains("down") {
                x.scale(0.0)
            } else {
                x.clone()
            })
        })
        .unwrap();
    model
}

#[test]
fn gates_find_the_block_that_does_nothing_and_go_on_with_the_same_bits() {
    let corpus = Corpus::new((0..2000u32).map(|i| (i * i + i / 7) % 13).collect(), 13).unwrap();
    let model = idle_block(&corpus, 2);
    let options = GateOptions::default().steps(30);
    let whole = GateTraining::new(&model, &corpus, options).unwrap().run(None, &mut |_| Ok(()));
    let whole = whole.unwrap().expect("nothing stopped it");
    assert!(ranking(&whole)[0] == 2 && whole[2] < 0.6 && whole[0] > 0.8, "{whole:?}");
    // Stopped in the middle, it goes on from its file; another run's file is refused.
    let folder = Folder::new("gates");
    let path = folder.join("gates.safetensors");
    let flag = Arc::new(AtomicBool::new(false));
    let mut first = GateTraining::new(&model, &corpus, options).unwrap().stop(flag.clone());
    let stopped = first.run(Some(&path), &mut |report| {
        flag.fetch_or(report.step == 11, Ordering::Relaxed);
        Ok(())
    });
    assert!(stopped.unwrap().is_none() && (11..30).contains(&first.step()));
    let mut other = GateTraining::new(&model, &corpus, options.removed(2)).unwrap();
    let error = other.resume(&path).unwrap_err().to_string();
    assert!(error.contains("`gates.removed` is '1' there and '2' here"), "{error}");
    let mut second = GateTraining::new(&model, &corpus, options).unwrap();
    second.resume(&path).unwrap();
    assert_eq!(second.step(), first.step());
    assert_eq!(second.run(Some(&path), &mut |_| Ok(())).unwrap().expect("nothing stopped it"), whole);
}
