//! Depth-wise batching of language models, and the loss that trains their exits.

use crate::support::{download, gpu};
use tiebeam::decode::{DepthBatch, Emitted, Exit, Request, Scheduling};
use tiebeam::models::lm::{ExpertsConfig, Lm, LmConfig, NormKind, Positions};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::Parameters;
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::share::{LowRank, Site};
use tiebeam::{Rng, Tensor};

fn normal(shape: &[usize], seed: u64) -> Tensor {
    Tensor::randn(gpu(), shape, &mut Rng::new(seed))
}

/// Sizes of the form of GPT-2, with RMS norms.
fn plain(sharing: Sharing) -> LmConfig {
    let sizes = LmConfig::small().vocab(11).width(16).heads(2).kv_heads(2).hidden(24).context(8);
    sizes.depth(3).sharing(sharing)
}

/// Sizes of the form of Llama: rotary angles, two query heads for each key head, SwiGLU. Heads are wider than `width / heads`.
fn llama(sharing: Sharing) -> LmConfig {
    let sizes = LmConfig::default().vocab(11).width(16).heads(4).kv_heads(2).head_width(Some(6)).hidden(24);
    sizes.context(8).depth(6).sharing(sharing)
}

/// A model whose norms, biases and low-rank parts differ from depth to depth.
fn varied(config: LmConfig) -> Lm {
    let mut m = Lm::new(gpu(), config, &mut Rng::new(5));
    let mut seed = 50;
    let mut drawn = |shape: &[usize]| {
        seed += 1;
        normal(shape, seed)
    };
    for block in &mut m.blocks {
        for norm in [&mut block.norm1, &mut block.norm2] {
            norm.gain = drawn(&[16]).affine(0.3, 1.0);
            norm.bias = norm.bias.as_ref().map(|_| drawn(&[16]).scale(0.3));
        }
        for (_, linear) in block.linears_mut() {
            if let [theta, a, b] = &linear.weight.leaves()[..] {
                linear.weight = LowRank::new(theta, a, &drawn(b.shape()), 0.5).shared();
            }
            linear.bias = linear.bias.as_ref().map(|bias| drawn(bias.shape()).scale(0.3));
        }
    }
    m
}

/// What is served, with the depths at which tokens may leave.
fn forms() -> Vec<(LmConfig, Vec<usize>)> {
    let layer_norms = llama(Sharing::tied_lora(2, 0.5)).norm(NormKind::Layer).biases([true; 7]);
    vec![
        (plain(Sharing::tied()), vec![1, 2, 3]),
        (plain(Sharing::tied_lora(2, 0.5)), vec![1, 2, 3]),
        (llama(Sharing::tied()), vec![1, 2, 3, 4, 5, 6]),
        (llama(Sharing::cycle(1, 3)), vec![1, 2, 3, 4, 5, 6]),
        (llama(Sharing::cycle(2, 0)), vec![2, 4, 6]),
        (llama(Sharing::cycle(2, 3)), vec![2, 4, 6]),
        (llama(Sharing::cycle(2, 3)).ends([1, 1]).shared_norms(true), vec![3, 6]),
        (llama(Sharing::cycle(1, 2)).ends([2, 0]), vec![3, 4, 5, 6]),
        (layer_norms, vec![1, 2, 3, 4, 5, 6]),
        (plain(Sharing::cycle(1, 2)).positions(Positions::None).biases([true; 7]), vec![1, 2, 3]),
    ]
}

fn requests() -> Vec<Request> {
    let prompt = |i: u32| (0..1 + i % 3).map(|t| (i * 5 + t * 3) % 11).collect();
    (0..7).map(|i| Request { id: i as u64, prompt: prompt(i), count: 2 + i as usize % 4 }).collect()
}

/// Each request's answer, and the number of ticks.
fn serve(model: &Lm, slots: usize, exit: Exit, scheduling: Scheduling) -> (Vec<Vec<Emitted>>, u64) {
    let mut batch = DepthBatch::new(model, slots, exit, scheduling).unwrap();
    requests().into_iter().for_each(|r| batch.push(r).unwrap());
    let all = batch.run().unwrap();
    let by_request = |id| all.iter().copied().filter(|e| e.id == id).collect();
    ((0..7).map(by_request).collect(), batch.ticks())
}

/// Serves one request after the other, then mixed and in lock-step, and compares. Returns the answers.
fn compared(model: &Lm, exit: impl Fn() -> Exit) -> Vec<Vec<Emitted>> {
    let sharing = &model.config.sharing;
    let (alone, sequential) = serve(model, 1, exit(), Scheduling::Continuous);
    let (mixed, continuous) = serve(model, 4, exit(), Scheduling::Continuous);
    let (waited, lock_step) = serve(model, 4, exit(), Scheduling::LockStep);
    assert_eq!(alone, mixed, "{sharing:?}");
    assert_eq!(alone, waited, "{sharing:?}");
    for (answer, request) in alone.iter().zip(requests()) {
        assert_eq!(answer.len(), request.count);
    }
    assert!(
        continuous < lock_step && lock_step < sequential,
        "{sharing:?}: {continuous} {lock_step} {sequential} ticks"
    );
    alone
}

#[test]
fn tokens_at_different_depths_come_out_as_one_after_the_other() {
    let gpt = [Sharing::tied(), Sharing::tied_lora(2, 0.5)].map(plain);
    for config in gpt.into_iter().chain([llama(Sharing::cycle(2, 3))]) {
        let last = config.depth;
        let answers = compared(&varied(config), || Exit::Confidence(THRESHOLD));
        let depths: Vec<usize> = answers.iter().flatten().map(|e| e.depth).collect();
        assert!(depths.iter().any(|&d| d < last) && depths.contains(&last), "{depths:?} shows both ends");
    }
}

/// The probability from which tokens leave: some pass it early and some never.
const THRESHOLD: f32 = 0.35;

#[test]
fn tokens_leave_at_the_ends_of_loops() {
    let leaves = |id: u64, i: usize| 1 + (id as usize * 2 + i * 3) % 6;
    for (config, exits) in forms() {
        let (sharing, depth) = (config.sharing.clone(), config.depth);
        let model = varied(config);
        assert_eq!(model.exits(), exits, "{sharing:?}");
        let answers = compared(&model, || Exit::Oracle(Box::new(leaves)));
        for (i, emitted) in answers.iter().flat_map(|answer| answer.iter().enumerate()) {
            let asked = leaves(emitted.id, i).min(depth);
            let end = exits.iter().copied().find(|&exit| exit >= asked);
            assert_eq!(Some(emitted.depth), end, "{sharing:?}: asked to leave at {asked}");
        }
        // Tokens of a prompt go through all depths, so the first token of an answer is that of the model's own stream.
        for (answer, request) in answers.iter().zip(requests()) {
            let length = request.prompt.len();
            let x = Tensor::from_slice(gpu(), &request.prompt, [1, length]);
            let stream = &model.streams(&x)[answer[0].depth - 1];
            assert_eq!(answer[0].token, best(&model.logits(stream)), "{sharing:?} request {}", request.id);
        }
    }
}

/// The best token after the last one, by scores `[1, tokens, vocab]`.
fn best(scores: &Tensor) -> u32 {
    let length = scores.shape()[1];
    scores.slice(1, length - 1..length).reshape([11]).argmax(0).to_vec::<u32>().unwrap()[0]
}

#[test]
fn served_at_full_depth_is_the_model_itself() {
    for (config, _) in forms() {
        let (sharing, depth) = (config.sharing.clone(), config.depth);
        let model = varied(config);
        let answers = compared_at_full_depth(&model);
        let mut seen: Vec<u32> = answers.iter().flatten().map(|emitted| emitted.token).collect();
        for (answer, request) in answers.iter().zip(requests()) {
            let mut tokens = request.prompt.clone();
            for emitted in answer {
                let x = Tensor::from_slice(gpu(), &tokens, [1, tokens.len()]);
                let want = (best(&model.forward(&x)), depth);
                assert_eq!((emitted.token, emitted.depth), want, "{sharing:?} request {}", request.id);
                tokens.push(emitted.token);
            }
        }
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 3, "{sharing:?}: {seen:?} shows little");
    }
}

/// Answers without early exits, which both schedulings give.
fn compared_at_full_depth(model: &Lm) -> Vec<Vec<Emitted>> {
    let never = || Exit::Confidence(2.0);
    let (answers, _) = serve(model, 3, never(), Scheduling::Continuous);
    assert_eq!(answers, serve(model, 3, never(), Scheduling::LockStep).0);
    answers
}

#[test]
fn what_cannot_be_served_is_refused() {
    let refused = |model: &Lm, slots: usize, what: &str| {
        let made = DepthBatch::new(model, slots, Exit::Confidence(0.5), Scheduling::Continuous);
        let error = made.err().expect("an error").to_string();
        assert!(error.contains("depth-wise batching: ") && error.contains(what), "{error}");
    };
    let model = |config: LmConfig| Lm::new(gpu(), config, &mut Rng::new(5));
    let alone = "must share one block, or several in turn, of stored matrices";
    let kinds = [
        Sharing::none(),
        Sharing::fold(3),
        Sharing::low_rank(2),
        Sharing::hashed(2.0),
        Sharing::dictionary(2, true),
        Sharing::parts(&[(&["q", "k", "v", "o"], Sharing::tied())], Sharing::none()),
    ];
    for sharing in kinds {
        let text = format!("not `{}`", sharing.text());
        let model = model(llama(sharing));
        assert_eq!(model.exits(), [6], "{text}");
        refused(&model, 2, alone);
        refused(&model, 2, &text);
    }
    // All depths use one block, but one of them adds a part of another rank, or with another factor.
    for (rank, scale) in [(1, 0.5), (2, 0.25)] {
        let mut model = model(llama(Sharing::tied_lora(2, 0.5)));
        let q = &mut model.blocks[3].attention.q;
        let theta = q.weight.leaves().remove(0);
        q.weight = LowRank::new(&theta, &normal(&[rank, 16], 1), &normal(&[24, rank], 2), scale).shared();
        refused(&model, 2, "low-rank parts of one rank and factor");
    }
    let experts = ExpertsConfig { count: 2, top: 1, capacity: 1.0, balance: 0.0 };
    refused(&model(llama(Sharing::tied()).experts(Some(experts))), 2, "models with experts are not served");
    let window = model(llama(Sharing::tied()).window(Some(4)));
    refused(&window, 2, "a window of 4 of 8 tokens is not served");
    let tied = model(plain(Sharing::tied()));
    refused(&tied, 0, "requests are served in slots, and there are none");
    let mut batch = DepthBatch::new(&tied, 2, Exit::Confidence(0.5), Scheduling::Continuous).unwrap();
    for (prompt, count) in [(vec![], 1), (vec![11], 1), (vec![1; 8], 2)] {
        let error = batch.push(Request { id: 4, prompt, count }).expect_err("it does not fit").to_string();
        assert!(error.contains("request 4") && error.contains("context of 8"), "{error}");
    }
    assert!(batch.run().unwrap().is_empty());
}

/// Two sequences of which each token follows from the one before.
fn lesson() -> [Tensor; 2] {
    let ids = |from: u32| (0..16).map(|i| (from + i / 8 * 4 + i % 8 * 3) % 11).collect::<Vec<u32>>();
    [ids(0), ids(3)].map(|ids| Tensor::from_slice(gpu(), &ids, [2, 8]))
}

#[test]
fn early_depths_predict_better_if_their_scores_are_trained() {
    let [x, y] = lesson();
    // The loss after each loop.
    let trained = |weight: Option<f32>| {
        let model = Lm::new(gpu(), llama(Sharing::cycle(2, 2)), &mut Rng::new(8));
        let group = Group::new(Parameters::of(&model).trainable());
        let mut adam = AdamW::new(gpu(), vec![group], AdamWConfig::default()).unwrap();
        for _ in 0..40 {
            let loss = match weight {
                Some(weight) => model.exit_loss(&x, &y, weight),
                None => model.loss(&x, &y),
            };
            adam.step(&loss.backward().unwrap(), 1e-2).unwrap();
        }
        let streams = model.streams(&x);
        let after = |exit: usize| download(&model.logits(&streams[exit - 1]).cross_entropy(&y, None))[0];
        model.exits().into_iter().map(after).collect::<Vec<f64>>()
    };
    let [last_only, aggressive, uniform] = [None, Some(0.1), Some(1.0)].map(trained);
    let all = format!("{last_only:?} {aggressive:?} {uniform:?}");
    assert!(
        aggressive[2] < 0.1 && aggressive[2] < 1.2 * last_only[2],
        "the last depth learns as well: {all}"
    );
    assert!(aggressive[0] < 0.4 * last_only[0], "after the first loop: {all}");
    assert!(aggressive[1] < 0.8 * last_only[1], "after the second: {all}");
    assert!(uniform[0] < aggressive[0], "a larger weight trains the first exit more: {all}");
}
