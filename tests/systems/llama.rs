//! Llama-type models: cached decoding gives the same results as the model, and files that do not fit are refused.

use crate::support::folder::Folder;
use crate::support::{download, gpu, other_kernels};
use std::collections::BTreeMap;
use tiebeam::models::convert::{low_rank, low_rank_seen};
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::masa::{MasaPlan, drift, groups};
use tiebeam::nn::{Module, Parameters, check_listed, distillation};
use tiebeam::ops::sequence::rope::Pairing;
use tiebeam::share::{Site, Tied};
use tiebeam::store::{Entry, File, save};
use tiebeam::{DType, Error, Rng, Tensor};

fn config() -> LmConfig {
    LmConfig::default()
        .vocab(23)
        .width(16)
        .heads(4)
        .kv_heads(2)
        .hidden(24)
        .depth(2)
        .context(12)
        .rope_base(10000.0)
        .eps(1e-5)
        .pairing(Pairing::Halves)
}

/// Writes a file of random weights with the names of Hugging Face, without the tensor `without`.
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
    let folder = Folder::new("llama");
    let path = folder.join(name);
    let entries = all.iter().zip(&data).map(|((name, shape), data)| Entry::f32(name, shape, data));
    save(&path, entries, &BTreeMap::new())?;
    File::from_bytes(&path, std::fs::read(&path).expect("just written"))
}

#[test]
fn a_session_says_what_the_model_says() {
    let model = Lm::from_weights(gpu(), &file("session", "").unwrap(), config()).unwrap();
    let tokens: Vec<u32> = (0..9).map(|i| (i * 5 + 2) % 23).collect();
    let all = model.forward(&Tensor::from_slice(gpu(), &tokens, [1, 9]));
    let want = download(&all);
    let mut session = model.session(12).unwrap();
    let mut at = 0;
    // A prompt, then single tokens, then several at once.
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
    let model = Lm::from_weights(gpu(), &file("leaves", "").unwrap(), config()).unwrap();
    let ids: Vec<u32> = (0..16).map(|i| i * 3 % 23).collect();
    let [x, y] = [&ids[..], &ids[..]].map(|ids| Tensor::from_slice(gpu(), ids, [2, 8]));
    let grads = model.loss(&x, &y).backward().unwrap();
    let all = Parameters::of(&model);
    assert_eq!(grads.len(), all.named().len());
    assert_eq!(all.stored(), 23 * 16 + 16 + 2 * (2 * 16 + 2 * 256 + 2 * 128 + 3 * 384));
}

#[test]
fn what_does_not_fit_is_named() {
    let refused = |result: Result<Lm, Error>| result.err().expect("refused").to_string();
    let lacking = file("lacking", "model.layers.1.mlp.up_proj.weight").unwrap();
    let error = refused(Lm::from_weights(gpu(), &lacking, config()));
    assert!(error.contains("model.layers.1.mlp.up_proj.weight"), "{error}");
    let whole = file("other", "").unwrap();
    let error = refused(Lm::from_weights(gpu(), &whole, config().hidden(32)));
    assert!(error.contains("mlp.gate_proj"), "{error}");
    for (wrong, words) in [
        (config().heads(3), "a width of 16 is no multiple of 3 heads"),
        (config().kv_heads(3), "4 heads are no multiple of 3 key and value heads"),
        (config().depth(0), "0 for blocks"),
        (config().head_width(Some(258)), "heads of width 258"),
        (config().rope_base(1.0), "the base of the rotary angles is 1"),
    ] {
        let error = refused(Lm::from_weights(gpu(), &whole, wrong));
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn settings_come_from_config_json() {
    let text = |extra: &str| {
        format!(
            r#"{{"model_type": "llama", "vocab_size": 23, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 12, "rms_norm_eps": 1e-5{extra}}}"#
        )
    };
    assert_eq!(LmConfig::from_json(&text(r#", "rope_theta": 10000.0"#)).unwrap(), config().tied_head(false));
    let newer = text(r#", "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}"#);
    assert_eq!(LmConfig::from_json(&newer).unwrap().rope_base, 500.0);
    let null = text(r#", "rope_parameters": null, "rope_theta": 500.0"#);
    assert_eq!(LmConfig::from_json(&null).unwrap().rope_base, 500.0);
    for (extra, word) in [
        (r#", "rope_scaling": {"type": "linear"}"#, "rotary"),
        (r#", "hidden_act": "gelu""#, "'gelu'"),
        (r#", "head_dim": 7"#, "heads of width 7"),
        (r#", "rope_parameters": {"rope_type": "llama3"}"#, "rotary"),
    ] {
        let error = LmConfig::from_json(&text(extra)).expect_err(extra).to_string();
        assert!(error.contains(word), "{extra}: {error}");
    }
    for (from, to, word) in
        [("llama", "gpt2", "'gpt2'"), ("vocab_size", "words", "vocab_size"), ("{", "", "config.json")]
    {
        let error = LmConfig::from_json(&text("").replacen(from, to, 1)).expect_err(word).to_string();
        assert!(error.contains(word), "{error}");
    }
}

fn sample() -> Tensor {
    let ids: Vec<u32> = (0..36).map(|i| (i * i + i / 5) % 23).collect();
    Tensor::from_slice(gpu(), &ids, [3, 12])
}

fn apart(a: &Tensor, b: &Tensor) -> f64 {
    download(a).iter().zip(download(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn a_model_from_dictionaries_is_the_model_when_nothing_is_left_out() {
    let model = Lm::from_weights(gpu(), &file("masa", "").unwrap(), config()).unwrap();
    let (x, plan) = (sample(), MasaPlan { atoms: 2, groups: 1, rank: 0 });
    let want = model.forward(&x);
    let whole = model.masa(plan, &x, |_| {}).unwrap();
    assert!(apart(&whole.forward(&x), &want) < 1e-4, "as many atoms as layers");
    // With one atom, the low-rank parts hold the rest. At full rank they hold all of it.
    let one = |rank| model.masa(MasaPlan { atoms: 1, groups: 1, rank }, &x, |_| {}).unwrap();
    let errors = [0, 4, 16].map(|rank| apart(&one(rank).forward(&x), &want));
    assert!(errors[0] > errors[1] && errors[1] > errors[2] && errors[2] < 1e-4, "{errors:?}");
    // A converted model is converted again.
    let again = one(16).masa(plan, &x, |_| {}).unwrap();
    assert!(again.made.len() == 4 && apart(&again.forward(&x), &want) < 2e-4);
    // In groups of one block, an atom is the block's own weight.
    let apart_groups = model.masa(MasaPlan { atoms: 2, groups: 2, rank: 0 }, &x, |_| {}).unwrap();
    assert_eq!(apart_groups.made.len(), 8);
    assert!(apart(&apart_groups.forward(&x), &want) < 1e-4);
    // Stored parameters, and those that get gradients.
    let halved = one(2);
    let all = Parameters::of(&halved);
    let attention = 2 * 256 + 2 * 128;
    let own = 2 * 2 * (2 * (16 + 16) + (16 + 8));
    assert_eq!(all.stored(), Parameters::of(&model).stored() - attention + 4 * 2 + own);
    let grads = halved.loss(&x, &x).backward().unwrap();
    assert_eq!(grads.len(), all.named().len());
    // Decoding computes the weights once and gives the same scores.
    let ids = x.slice(0, 0..1).to_vec::<u32>().unwrap();
    let last = download(&halved.forward(&x.slice(0, 0..1)))[11 * 23..].to_vec();
    let got = halved.session(12).unwrap().push(&ids).unwrap();
    assert!(got.iter().zip(last).all(|(a, b)| (*a as f64 - b).abs() < 2e-5));
}

/// As a module, a model with dictionaries is changed and moved with what its weights are made of, and its angles.
#[test]
fn a_model_is_changed_and_moved_as_a_module() {
    let model = Lm::from_weights(gpu(), &file("module", "").unwrap(), config()).unwrap();
    let x = sample();
    let plan = MasaPlan { atoms: 1, groups: 1, rank: 2 };
    let mut model = model.masa(plan, &x, |_| {}).unwrap();
    check_listed(&model, &model.loss(&x, &x)).unwrap();
    let want = download(&model.forward(&x));
    let ids = |m: &Lm| m.parameters().named().iter().map(|(_, leaf)| leaf.leaf_id()).collect::<Vec<_>>();
    let old = ids(&model);
    model.map(|_, x| Ok(if x.is_leaf() { x.detach().copy().requires_grad() } else { x.copy() })).unwrap();
    assert!(ids(&model).iter().all(|id| !old.contains(id)), "an old leaf is still there");
    check_listed(&model, &model.loss(&x, &x)).unwrap();
    assert_eq!(download(&model.forward(&x)), want);
    model.to(other_kernels()).unwrap();
    let moved = model.forward(&x.to_gpu(other_kernels()).unwrap());
    for (got, want) in download(&moved).iter().zip(&want) {
        assert!((got - want).abs() < 1e-4, "{got}, not {want}");
    }
    // The angles are no parameters.
    model.cast(DType::F16);
    let halved = model.forward(&x.to_gpu(other_kernels()).unwrap());
    for (got, want) in download(&halved).iter().zip(&want) {
        assert!((got - want).abs() < 0.05, "{got}, not {want}");
    }
}

#[test]
fn a_copy_learns_alone() {
    let model = Lm::from_weights(gpu(), &file("copy", "").unwrap(), config()).unwrap();
    let (x, copy) = (sample(), model.copied());
    assert_eq!(apart(&copy.forward(&x), &model.forward(&x)), 0.0);
    let ids = |m: &Lm| Parameters::of(m).named().iter().map(|(_, leaf)| leaf.leaf_id()).collect::<Vec<_>>();
    assert!(ids(&copy).iter().all(|id| !ids(&model).contains(id)));
    let loss = distillation(&copy.forward(&x), &model.forward(&x), 2.0);
    assert!(loss.item().unwrap().abs() < 1e-5, "a copy has nothing to learn");
}

#[test]
fn groups_are_cut_where_the_output_drifts() {
    assert_eq!(groups(&[0.1, 0.9, 0.2, 0.5], 3), [0..2, 2..4, 4..5]);
    assert_eq!(groups(&[0.3, 0.3], 2), [0..1, 1..3]);
    assert_eq!(groups(&[], 1).len(), 1);
    let model = Lm::from_weights(gpu(), &file("drift", "").unwrap(), config()).unwrap();
    let all = drift(&model, &sample()).unwrap();
    assert!(all.len() == 1 && all[0] > 0.0, "{all:?}");
    // A block that adds nothing causes no drift.
    let mut still = model.clone();
    for name in ["o", "down"] {
        let size = still.blocks[1].linear(name).weight.size();
        still.blocks[1].linear_mut(name).weight = Tied::new(&Tensor::zeros(gpu(), size)).shared();
    }
    assert!(drift(&still, &sample()).unwrap()[0].abs() < 1e-6);
}

#[test]
fn the_whitened_residual_errs_least_on_what_was_seen() {
    let mut rng = Rng::new(3);
    let w = Tensor::randn(gpu(), [9, 12], &mut rng);
    let stretch: Vec<f32> = (0..12).map(|i| 0.1 + i as f32 * i as f32).collect();
    let x = Tensor::randn(gpu(), [40, 12], &mut rng).mul(&Tensor::from_slice(gpu(), &stretch, [12]));
    let seen = x.t().matmul(&x);
    let error = |[b, a]: [Tensor; 2]| download(&x.matmul(&w.sub(&b.matmul(&a)).t()).square().sum_all())[0];
    let [plain, whitened] = [low_rank(&w, 2), low_rank_seen(&w, &seen, 2)].map(|f| error(f.unwrap()));
    assert!(whitened < 0.9 * plain, "{whitened} against {plain}");
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let model = Lm::from_weights(gpu(), &file("plan", "").unwrap(), config()).unwrap();
    let refused = |atoms, groups, rank| {
        let made = model.masa(MasaPlan { atoms, groups, rank }, &sample(), |_| {});
        made.err().expect("refused").to_string()
    };
    for (plan, words) in [
        ((3, 1, 0), "3 atoms in 1 groups of 2 blocks"),
        ((0, 1, 0), "use 1 to 2 atoms"),
        ((1, 2, 0), "no more groups than atoms"),
        ((2, 0, 0), "0 groups"),
        ((1, 1, 17), "rank 17"),
    ] {
        let error = refused(plan.0, plan.1, plan.2);
        assert!(error.contains(words), "{plan:?}: {error}");
    }
}
