//! Models as they were published: three tiny ones of different families say what transformers says, whole, in pieces, with keys in
//! f16 and packed; what cannot be run is refused.

use crate::support::folder::Folder;
use crate::support::{download, gpu, vectors};
use half::f16;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tiebeam::models::llama::{Form, Published};
use tiebeam::models::lm::{Lm, LmConfig, RopeScaling, Session, SessionOptions};
use tiebeam::nn::Parameters;
use tiebeam::quant::{Rounding, round};
use tiebeam::store::gguf::{self, Gguf};
use tiebeam::store::{Entry, File, Shards, Weights, save};
use tiebeam::text::Words;
use tiebeam::{DType, Tensor, no_grad};

const MODELS: [&str; 4] = ["llama3", "qwen2", "mistral", "llama3/model.gguf"];

fn path(model: &str) -> PathBuf {
    vectors().join("llm").join(model)
}

/// Tokens, and the scores behind each of them.
fn expected(model: &str) -> (Vec<u32>, Vec<f64>) {
    let folder = path(model.split('/').next().unwrap());
    let file = File::open(folder.join("expected.safetensors")).unwrap();
    let text = std::fs::read_to_string(folder.join("expected.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let tokens = serde_json::from_value(json["sequence"].clone()).unwrap();
    (tokens, file.tensor_f32("logits").unwrap().into_iter().map(f64::from).collect())
}

fn open(model: &str, form: Form) -> Lm {
    Published::open(path(model)).unwrap().load(gpu(), 64, form).unwrap()
}

fn scores(model: &Lm, tokens: &[u32]) -> Vec<f64> {
    let x = Tensor::from_slice(gpu(), tokens, [1, tokens.len()]);
    download(&no_grad(|| model.forward(&x)))
}

fn largest(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn scores_are_those_of_transformers() {
    for model in MODELS {
        let (tokens, want) = expected(model);
        for form in [Form::Stored, Form::F32] {
            let off = largest(&scores(&open(model, form), &tokens), &want);
            assert!(off < 1e-4, "{model} {form:?}: off by {off:e}");
        }
    }
}

/// The window of Mistral's vectors is 4 and a context 64, so caches are used in rings; the others keep all keys.
#[test]
fn sessions_say_the_same_in_pieces_of_any_size() {
    for model in MODELS {
        let (tokens, want) = expected(model);
        let model_of = open(model, Form::Stored);
        let vocab = model_of.config.vocab;
        for (chunk, pieces) in
            [(64, vec![16]), (3, vec![16]), (5, vec![1, 7, 1, 1, 6]), (1, vec![16]), (2, vec![1; 16])]
        {
            for (keys, bound) in [(DType::F32, 1e-4), (DType::F16, 4e-2)] {
                let options = SessionOptions::default().context(64).chunk(chunk).keys(keys);
                let mut session = model_of.session_with(options).unwrap();
                let mut at = 0;
                for &count in &pieces {
                    let got = session.push(&tokens[at..at + count]).unwrap();
                    at += count;
                    let got: Vec<f64> = got.into_iter().map(f64::from).collect();
                    let off = largest(&got, &want[(at - 1) * vocab..at * vocab]);
                    assert!(
                        off < bound,
                        "{model}, chunks of {chunk}, keys in {keys}, token {at}: off by {off:e}"
                    );
                }
            }
        }
    }
}

/// A ring that has gone round several times still has the last keys of the window.
#[test]
fn a_ring_of_keys_is_used_again_and_again() {
    let model = open("mistral", Form::Stored);
    let tokens: Vec<u32> = (0..60).map(|i| i * 37 % model.config.vocab as u32).collect();
    let want = scores(&model, &tokens);
    let vocab = model.config.vocab;
    for chunk in [1, 3, 8] {
        let mut session = model.session_with(SessionOptions::default().context(64).chunk(chunk)).unwrap();
        let places = 64.min(4 + chunk - 1);
        let c = &model.config;
        assert_eq!(session.cache_bytes(), 8 * c.depth * c.kv_heads * places * c.head_dim());
        for (at, piece) in tokens.chunks(7).enumerate() {
            let got: Vec<f64> = session.push(piece).unwrap().into_iter().map(f64::from).collect();
            let last = at * 7 + piece.len() - 1;
            let off = largest(&got, &want[last * vocab..][..vocab]);
            assert!(off < 1e-4, "chunks of {chunk}, token {last}: off by {off:e}");
        }
        session.clear();
        assert_eq!(session.length(), 0);
        let got: Vec<f64> = session.push(&tokens[..7]).unwrap().into_iter().map(f64::from).collect();
        assert!(largest(&got, &want[6 * vocab..7 * vocab]) < 1e-4, "after it was cleared");
    }
}

/// After a push that failed, and after tokens were forgotten, a session goes on as a new one would, or is empty and says so.
#[test]
fn what_was_not_pushed_leaves_no_trace() {
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 300).collect();
    for model in ["mistral", "qwen2"] {
        let model = open(model, Form::Stored);
        let (want, vocab) = (scores(&model, &tokens), model.config.vocab);
        let is_right = |session: &mut Session, to: usize| {
            let got = session.push(&tokens[session.length()..to]).unwrap();
            let got: Vec<f64> = got.into_iter().map(f64::from).collect();
            let off = largest(&got, &want[(to - 1) * vocab..to * vocab]);
            assert!(off < 1e-4, "to token {to}: off by {off:e}");
        };
        for chunk in [1, 4, usize::MAX] {
            for fails_after in [1, 8, 20] {
                let options = SessionOptions::default().context(64).chunk(chunk);
                let mut session = model.session_with(options).unwrap();
                is_right(&mut session, 10);
                let failed = session.push_watched(&tokens[10..30], |done| match done >= fails_after {
                    true => Err(tiebeam::Error::config("as the test wants")),
                    false => Ok(()),
                });
                assert!(failed.is_err() && [0, 10].contains(&session.length()), "{}", session.length());
                // Without a window nothing is ever lost.
                assert!(model.config.window.is_some() || session.length() == 10);
                is_right(&mut session, 11);
                is_right(&mut session, 33);
                for length in [30, 20, 5] {
                    let kept = session.truncate(length);
                    assert_eq!(session.length(), if kept { length } else { 0 });
                    assert!(kept || model.config.window.is_some());
                    is_right(&mut session, length + 3);
                }
            }
        }
    }
}

/// The first blocks of a Qwen2 see everything, and those from `max_window_layers` on have a window.
#[test]
fn a_window_may_begin_at_any_block() {
    let tokens: Vec<u32> = (0..24).map(|i| i * 37 % 300).collect();
    let folder = |first: usize| {
        changed(
            "qwen2",
            |json| {
                json.as_object_mut().unwrap().remove("layer_types");
                for (key, value) in [
                    ("use_sliding_window", json!(true)),
                    ("sliding_window", json!(4)),
                    ("max_window_layers", json!(first)),
                ] {
                    json[key] = value;
                }
            },
            |_| {},
        )
    };
    let none = scores(&open("qwen2", Form::Stored), &tokens);
    let mut before = none.clone();
    for first in [2, 1, 0, 28] {
        let folder = folder(first);
        let model = Published::open(folder.join("")).unwrap().load(gpu(), 64, Form::Stored).unwrap();
        let all = scores(&model, &tokens);
        let mut session = model.session_with(SessionOptions::default().context(64).chunk(3)).unwrap();
        let got: Vec<f64> = session.push(&tokens).unwrap().into_iter().map(f64::from).collect();
        let vocab = model.config.vocab;
        assert!(largest(&got, &all[23 * vocab..]) < 1e-4, "from block {first} on");
        // Two blocks: from the second or a later one on there is no window.
        assert_eq!(largest(&all, &none) == 0.0, first >= 2, "from block {first} on");
        assert!(first >= 2 || largest(&all, &before) > 1e-3, "from block {first} on");
        before = all;
    }
}

/// Copies a folder of vectors, with another `config.json` and other tensors.
fn changed(
    model: &str,
    config: impl Fn(&mut Value),
    tensors: impl Fn(&mut BTreeMap<String, (Vec<usize>, Vec<f32>)>),
) -> Folder {
    let folder = Folder::new("published");
    let text = std::fs::read_to_string(path(model).join("config.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    config(&mut json);
    std::fs::write(folder.join("config.json"), json.to_string()).unwrap();
    let file = File::open(path(model).join("model.safetensors")).unwrap();
    let mut all: BTreeMap<String, (Vec<usize>, Vec<f32>)> = file
        .names()
        .map(|name| (name.into(), (file.info(name).unwrap().shape.clone(), file.tensor_f32(name).unwrap())))
        .collect();
    tensors(&mut all);
    let entries = all.iter().map(|(name, (shape, data))| Entry::f32(name.as_str(), shape, data));
    save(folder.join("model.safetensors"), entries, &BTreeMap::new()).unwrap();
    folder
}

fn refusal(folder: &Folder) -> String {
    let loaded = Published::open(folder.join("")).and_then(|model| model.load(gpu(), 64, Form::Stored));
    loaded.err().expect("refused").to_string()
}

#[test]
fn what_is_not_computed_is_named() {
    let keep = |_: &mut BTreeMap<String, (Vec<usize>, Vec<f32>)>| {};
    for (key, value, says) in [
        ("model_type", json!("gpt_neox"), "the kind of model is 'gpt_neox'"),
        ("hidden_act", json!("gelu"), "'gelu'"),
        ("partial_rotary_factor", json!(0.5), "partial_rotary_factor"),
        (
            "rope_scaling",
            json!({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}),
            "'dynamic' is not computed",
        ),
        ("rope_scaling", json!("linear"), "must be an object or null"),
        ("attention_multiplier", json!(1.0), "`attention_multiplier` is 1.0"),
        ("norm_type", json!("layer_norm"), "`norm_type` is 'layer_norm'"),
        ("hidden_activation", json!("gelu"), "'gelu'"),
        ("rope_scaling", json!({"rope_type": "longrope"}), "'longrope' is not computed"),
        ("rope_scaling", json!({"rope_type": "linear"}), "'linear' needs a positive number `factor`"),
        ("quantization_config", json!({"quant_method": "bitsandbytes"}), "bitsandbytes"),
        (
            "quantization_config",
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"config_groups": {}}}),
            "`transform_config`, which rotates values",
        ),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 1e-310}), "are no positive numbers"),
        ("original_max_position_embeddings", json!(-1), "`original_max_position_embeddings` is no positive"),
        ("num_key_value_heads", json!(3), "4 heads are no multiple of 3 key and value heads"),
        ("rms_norm_eps", json!(null), "rms_norm_eps"),
        ("rms_norm_eps", json!(-1.0), "the norms add -1"),
        ("rms_norm_eps", json!(1e300), "the norms add inf"),
        (
            "logits_scaling",
            json!(8.0),
            "`logits_scaling` is 8.0, which models of the kind 'llama' do not have",
        ),
        ("residual_multiplier", json!(0.22), "`residual_multiplier` is 0.22"),
        ("num_local_experts", json!(8), "`num_local_experts` is 8"),
        ("rope_theta", json!("10000"), "`rope_theta` is no number"),
        ("tie_word_embeddings", json!("true"), "is not true or false"),
        ("rope_scaling", json!({"full_attention": {"rope_type": "linear"}}), "different rotary angles"),
    ] {
        let folder = changed("llama3", |json| json[key] = value.clone(), keep);
        let error = refusal(&folder);
        assert!(error.contains(says), "{key}: {error}");
    }
    let whole = |_: &mut Value| {};
    let error = refusal(&changed("qwen2", whole, |all| drop(all.remove("lm_head.weight"))));
    assert!(
        error.contains(
            "there is no `lm_head.weight`, and config.json does not say `tie_word_embeddings: true`"
        ),
        "{error}"
    );
    let neutral = |json: &mut Value| {
        json["logits_scaling"] = json!(1.0);
        json["num_experts"] = json!(null);
        json["no_rope_layers"] = json!([]);
        json["pretraining_tp"] = json!(2);
        json["rope_scaling"] = json!({"type": "dynamic", "factor": 2.0});
        json["foo"] = json!(7);
    };
    assert!(Published::open(changed("llama3", neutral, keep).join("")).is_ok());
    let bias = "model.layers.1.self_attn.k_proj.bias";
    let error = refusal(&changed("qwen2", whole, |all| drop(all.remove(bias))));
    assert!(error.contains(bias), "a Qwen2 without a bias: {error}");
    let extra = "model.layers.0.self_attn.q_norm.weight";
    let error =
        refusal(&changed("qwen2", whole, |all| drop(all.insert(extra.into(), (vec![8], vec![1.0; 8])))));
    assert!(error.contains(extra) && error.contains("no model of this kind"), "{error}");
}

/// Copies the GGUF file of the vectors with some more metadata.
fn gguf_with(more: &[(&str, gguf::Value)]) -> Folder {
    let (folder, file) = (Folder::new("published"), Gguf::open(path("llama3").join("model.gguf")).unwrap());
    let mut metadata = file.metadata().clone();
    metadata.extend(more.iter().map(|(key, value)| (key.to_string(), value.clone())));
    let entry = |name| {
        let (kind, shape) = (file.kind(name).unwrap(), file.shape(name).unwrap());
        gguf::Entry::bytes(name, kind, shape, file.bytes_of(name).unwrap())
    };
    let metadata: Vec<_> = metadata.into_iter().collect();
    gguf::save(folder.join("m.gguf"), &metadata, file.names().map(entry)).unwrap();
    folder
}

#[test]
fn what_is_not_computed_in_a_gguf_file_is_named() {
    use gguf::Value::{Bool, Float, Integer, List, Text};
    let open = |more: &[(&str, gguf::Value)]| Published::open(gguf_with(more).join("m.gguf"));
    let says = |more: &[(&str, gguf::Value)], what: &str| {
        let error = open(more).err().expect(what).to_string();
        assert!(error.contains(what), "{error}");
    };
    says(&[("llama.attention.causal", Bool(false))], "attention that sees later tokens");
    assert!(open(&[("llama.attention.causal", Bool(true))]).is_ok());
    says(&[("llama.rope.scaling.attn_factor", Float(1.25))], "under yarn only");
    assert!(open(&[("llama.rope.scaling.attn_factor", Float(1.0))]).is_ok());
    says(
        &[("llama.attention.head_count_kv", List(vec![Integer(2); 2]))],
        "is a list, where one number is read",
    );
    for (key, value) in [
        ("llama.logit_scale", Float(8.0)),
        ("llama.attention.clamp_kqv", Float(6.0)),
        ("llama.final_logit_softcapping", Float(30.0)),
        ("llama.use_parallel_residual", Bool(true)),
        ("llama.attention.temperature_scale", Float(0.1)),
        ("llama.pooling_type", Text("mean".into())),
    ] {
        says(&[(key, value)], &format!("the file's `{key}`: is "));
    }
    for (key, value) in [
        ("llama.logit_scale", Float(1.0)),
        ("llama.logit_scale", Float(0.0)),
        ("llama.rope.scaling.yarn_ext_factor", Float(-1.0)),
        ("llama.expert_used_count", Integer(0)),
        ("llama.use_parallel_residual", Bool(false)),
        ("llama.rope.scaling.finetuned", Bool(false)),
        ("llama.tensor_data_layout", Text("Meta AI original pth".into())),
        ("general.finetune", Text("chat".into())),
    ] {
        assert!(open(&[(key, value)]).is_ok(), "{key}");
    }
    let yarn = |original: i128| {
        let kind = ("llama.rope.scaling.type", Text("yarn".into()));
        let more = [
            kind,
            ("llama.rope.scaling.factor", Float(4.0)),
            ("llama.rope.scaling.original_context_length", Integer(original)),
        ];
        open(&more).unwrap().config().rope_scaling
    };
    let context = open(&[]).unwrap().config().context;
    assert_eq!(yarn(0), yarn(context as i128), "0 is the model's own context");
    assert_ne!(yarn(0), yarn(7));
    // A tokenizer and a table that do not belong together are refused before any weight is read.
    let file = Gguf::open(path("llama3").join("model.gguf")).unwrap();
    let longer = |key: &str, more: gguf::Value| match &file.metadata()[key] {
        List(all) => List([&all[..], &[more]].concat()),
        other => panic!("{key}: {other:?}"),
    };
    let (tokens, kinds) = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type");
    let folder =
        gguf_with(&[(tokens, longer(tokens, Text("more".into()))), (kinds, longer(kinds, Integer(1)))]);
    let rows = file.shape("token_embd.weight").unwrap()[0];
    let error = Words::open(&folder.join("m.gguf")).err().expect("another table").to_string();
    assert!(
        error.contains(&format!("it has {} tokens, and the model's table {rows} rows", rows + 1)),
        "{error}"
    );
    let weights = path("llama3").join("model.safetensors");
    let error = Published::open(weights).err().expect("no model by itself").to_string();
    assert!(error.contains("name the folder of this file"), "{error}");
}

/// Files of tied models sometimes have a head. transformers 5 computes with it, even if it is not the table.
#[test]
fn a_head_in_the_file_of_a_tied_model_is_used() {
    let (tokens, want) = expected("llama3");
    let with_head = |factor: f32| {
        let folder = changed(
            "llama3",
            |_| {},
            |all| {
                let (shape, table) = all["model.embed_tokens.weight"].clone();
                all.insert("lm_head.weight".into(), (shape, table.iter().map(|x| factor * x).collect()));
            },
        );
        let model = Published::open(folder.join("")).unwrap();
        let parameters = model.check().unwrap();
        (scores(&model.load(gpu(), 64, Form::Stored).unwrap(), &tokens), parameters)
    };
    let (same, parameters) = with_head(1.0);
    assert!(largest(&same, &want) < 1e-4);
    assert!(parameters > Published::open(path("llama3")).unwrap().check().unwrap());
    let opposite: Vec<f64> = with_head(-1.0).0.iter().map(|score| -score).collect();
    assert!(largest(&opposite, &want) < 1e-4);
}

#[test]
fn settings_are_those_of_each_kind() {
    let read = |extra: Value| {
        let mut json = json!({"model_type": "llama", "vocab_size": 23, "hidden_size": 16, "num_attention_heads": 4,
            "num_key_value_heads": null, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 12,
            "rms_norm_eps": 1e-5});
        json.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        LmConfig::from_json(&json.to_string())
    };
    let plain = read(json!({})).unwrap();
    assert_eq!((plain.kv_heads, plain.window, plain.rope_scaling), (4, None, RopeScaling::None));
    assert_eq!(read(json!({"head_dim": 6})).unwrap().head_dim(), 6);
    assert_eq!(read(json!({"head_dim": null})).unwrap().head_dim(), 4);
    let window = |extra: Value| read(extra).unwrap().window;
    assert_eq!(window(json!({"model_type": "mistral", "sliding_window": 4})), Some(4));
    assert_eq!(window(json!({"model_type": "mistral", "sliding_window": null})), None);
    assert_eq!(window(json!({"model_type": "mistral"})), Some(4096), "what transformers takes");
    assert_eq!(window(json!({"sliding_window": 4})), None, "a Llama has no window");
    let qwen = json!({"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": true, "max_window_layers": 1});
    let qwen = read(qwen).unwrap();
    assert_eq!((qwen.window, qwen.window_from), (Some(4), 1));
    assert_eq!(
        window(json!({"model_type": "qwen2", "sliding_window": 4, "use_sliding_window": false})),
        None
    );
    let old = read(json!({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5})).unwrap();
    assert_eq!((old.rope_base, old.rope_scaling), (5e5, RopeScaling::Linear { factor: 4.0 }));
    let yarn = |extra: Value| match read(extra).unwrap().rope_scaling {
        RopeScaling::Yarn { original, .. } => original,
        other => panic!("{other:?}"),
    };
    let settings = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 5});
    assert_eq!(yarn(json!({"rope_parameters": settings})), 5.0);
    assert_eq!(yarn(json!({"rope_parameters": settings, "original_max_position_embeddings": 6})), 6.0);
    assert_eq!(yarn(json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}})), 12.0, "the context");
    let qwen = json!({"model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 0});
    assert_eq!(window(qwen), Some(4096), "what transformers takes");
    let default = read(json!({"rope_scaling": {"type": "default"}})).unwrap();
    assert_eq!(default.rope_scaling, RopeScaling::None);
}

/// Writes a folder whose linear layers are packed as compressed-tensors does it. Returns it with the weights that it stands for.
fn packed_folder(bits: u32, group: usize) -> (Folder, Folder) {
    let rounding = Rounding::new(bits, tiebeam::quant::Form::Symmetric).group(group);
    let is_linear = |name: &str| name.contains("_proj.");
    let source = Shards::open(path("qwen2")).unwrap();
    let rounded = |name: &str| {
        let shape = source.shape(name).unwrap();
        let data = source.find(name).and_then(|(file, name)| file.tensor_f32(name)).unwrap();
        round(name, &data, [shape[0], shape[1]], &rounding).unwrap()
    };
    let folder = Folder::new("packed");
    let config = std::fs::read_to_string(path("qwen2").join("config.json")).unwrap();
    let mut json: Value = serde_json::from_str(&config).unwrap();
    json["quantization_config"] = rounding.compressed_config(&["lm_head"]).unwrap();
    std::fs::write(folder.join("config.json"), json.to_string()).unwrap();
    let mut entries: Vec<Entry> = Vec::new();
    let names = source.names();
    for name in &names {
        let data = source.find(name).and_then(|(file, name)| file.tensor_f32(name)).unwrap();
        let shape = source.shape(name).unwrap();
        if is_linear(name) && name.ends_with(".weight") {
            entries.extend(rounded(name).to_compressed(name.trim_end_matches(".weight")).unwrap());
        } else {
            let halves: Vec<f16> = data.iter().map(|&x| f16::from_f32(x)).collect();
            let bytes: Vec<u8> = halves.iter().flat_map(|h| h.to_le_bytes()).collect();
            entries.push(Entry::bytes(name.as_str(), tiebeam::store::FileDType::F16, &shape, bytes));
        }
    }
    save(folder.join("model.safetensors"), entries, &BTreeMap::new()).unwrap();
    let plain = changed(
        "qwen2",
        |_| {},
        |all| {
            for (name, (_, data)) in all.iter_mut() {
                if is_linear(name) && name.ends_with(".weight") {
                    *data = rounded(name).values();
                } else {
                    data.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
                }
            }
        },
    );
    (folder, plain)
}

#[test]
fn packed_folders_are_run_packed() {
    let (tokens, _) = expected("qwen2");
    for (bits, group) in [(4, 16), (8, 16)] {
        let (folder, plain) = packed_folder(bits, group);
        let open =
            |folder: &Folder, form| Published::open(folder.join("")).unwrap().load(gpu(), 64, form).unwrap();
        let want = scores(&open(&plain, Form::F32), &tokens);
        for form in [Form::Stored, Form::F32] {
            let model = open(&folder, form);
            assert_eq!(model.blocks[0].linear("gate").weight.is_compact(), form == Form::Stored);
            let off = largest(&scores(&model, &tokens), &want);
            assert!(off < 1e-4, "{bits} bits, {form:?}: off by {off:e}");
            // Table and head are leaves in either form.
            let leaves = Parameters::of(&model).stored() - 2 * model.config.vocab * model.config.width;
            assert_eq!(leaves > 10_000, form == Form::F32, "{leaves}");
        }
    }
}

#[test]
fn a_truncated_folder_is_refused() {
    let folder = changed("qwen2", |_| {}, |_| {});
    let file = folder.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 8]).unwrap();
    assert!(!refusal(&folder).is_empty());
    let lone = Folder::new("lone");
    assert!(refusal(&lone).contains("config.json"), "{}", refusal(&lone));
    assert!(Published::open(Path::new("/nonexistent.gguf")).is_err());
}
