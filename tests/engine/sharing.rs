//! Systems of shared weights, each tested for its defining property.

use crate::support::{download, gpu, quiet};
use tiebeam::models::convert::{RecursivePlan, Selection, low_rank, untied_names};
use tiebeam::models::foldgpt::{Gated, ranking, tail_distillation};
use tiebeam::models::lm::{ExpertsConfig, FeedForward, Lm, LmConfig, NormKind};
use tiebeam::models::mor::{Keys, Mor, Routing, capacities};
use tiebeam::models::sharing::Sharing;
use tiebeam::models::sret::Sliced;
use tiebeam::nn::Parameters;
use tiebeam::ops::sequence::cache::KvCache;
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::{DType, Precision, Rng, Tensor, autocast};

fn config(depth: usize, sharing: Sharing) -> LmConfig {
    LmConfig::small()
        .vocab(11)
        .width(16)
        .heads(2)
        .kv_heads(2)
        .hidden(24)
        .context(8)
        .depth(depth)
        .sharing(sharing)
}

fn model(depth: usize, sharing: Sharing) -> Lm {
    Lm::new(gpu(), config(depth, sharing), &mut Rng::new(5))
}

fn tokens() -> [Tensor; 2] {
    let ids: Vec<u32> = (0..16).map(|i| (i * 7 + i / 3) % 11).collect();
    let next: Vec<u32> = (0..16).map(|i| (i * 5 + 2) % 11).collect();
    [ids, next].map(|ids| Tensor::from_slice(gpu(), &ids, [2, 8]))
}

fn normal(shape: &[usize], seed: u64) -> Tensor {
    Tensor::randn(gpu(), shape, &mut Rng::new(seed))
}

/// The largest difference of two tensors.
fn apart(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.shape(), b.shape());
    download(a).iter().zip(download(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn truncated_svd_is_exact_at_full_rank_and_better_with_every_rank() {
    for shape in [[6, 10], [10, 6]] {
        let w = normal(&shape, 1);
        let error = |rank: usize| {
            let [b, a] = low_rank(&w, rank).unwrap();
            download(&b.matmul(&a).sub(&w).square().sum_all())[0]
        };
        let all: Vec<f64> = (1..=6).map(error).collect();
        assert!(all.windows(2).all(|e| e[1] < e[0]) && all[5] < 1e-9, "{shape:?}: {all:?}");
    }
}

fn plan(blocks: usize, rank: usize, selection: Selection) -> RecursivePlan {
    RecursivePlan::default().blocks(blocks).rank(rank).selection(selection)
}

#[test]
fn a_recursive_model_of_full_rank_is_the_model_it_was_made_from() {
    let [x, _] = tokens();
    let original = model(4, Sharing::none());
    let want = original.forward(&x);
    for selection in [Selection::Stepwise, Selection::Average, Selection::Lower] {
        let full = original.recursive(plan(2, 64, selection)).unwrap();
        assert!(apart(&full.forward(&x), &want) < 2e-5, "{selection:?}: {}", apart(&full.forward(&x), &want));
        let [some, none] = [4, 0].map(|rank| original.recursive(plan(2, rank, selection)).unwrap());
        assert!(
            apart(&none.forward(&x), &want) > 1e-3,
            "{selection:?} without low-rank parts is another model"
        );
        assert!(Parameters::of(&none).stored() < Parameters::of(&some).stored());
        assert!(Parameters::of(&none).stored() < Parameters::of(&original).stored());
    }
    let error =
        original.recursive(plan(3, 0, Selection::Lower)).err().expect("3 does not divide 4").to_string();
    assert!(error.contains("3 blocks in turn do not divide 4 layers; use one of [1, 2, 4]"), "{error}");
}

#[test]
fn the_gradient_of_a_cycle_is_the_sum_over_its_uses() {
    let [x, y] = tokens();
    let tied = model(4, Sharing::cycle(2, 0));
    let free = tied.untied(&[0, 1, 2, 3]).unwrap();
    let (a, b) = (tied.loss(&x, &y).backward().unwrap(), free.loss(&x, &y).backward().unwrap());
    for k in 0..2 {
        let shared = tied.blocks[k].attention.q.weight.leaves().remove(0);
        let uses =
            [k, k + 2].map(|l| b.get(&free.blocks[l].attention.q.weight.leaves().remove(0)).unwrap().clone());
        let sum = uses[0].add(&uses[1]);
        assert!(apart(a.get(&shared).unwrap(), &sum) < 1e-6);
        assert!(apart(&uses[0], &uses[1]) > 1e-6, "the uses differ, else the sum shows nothing");
    }
    // All uses of a matrix share one gradient buffer.
    let stored = Parameters::of(&tied).named().len();
    assert_eq!(a.len(), stored);
    assert!(Parameters::of(&free).named().len() > stored);
}

#[test]
fn untying_takes_the_optimizer_along() {
    let [x, y] = tokens();
    let tied = model(3, Sharing::tied());
    let optimizer = |model: &Lm| {
        let all = Parameters::of(model);
        let group = Group::new(all.named().iter().map(|(n, p)| (n.clone(), p)));
        AdamW::new(gpu(), vec![group], AdamWConfig::default()).unwrap()
    };
    let mut old = optimizer(&tied);
    for _ in 0..2 {
        old.step(&tied.loss(&x, &y).backward().unwrap(), 1e-2).unwrap();
    }
    // The untied model may be deeper than the original, as in training stage by stage.
    let map = [0, 0, 1, 2];
    let free = tied.untied(&map).unwrap();
    assert_eq!(free.blocks.len(), 4);
    let mut new = optimizer(&free);
    let state = old.state_dict().unwrap();
    let renamed: Vec<_> = untied_names(&tied, &map)
        .iter()
        .flat_map(|(to, from)| {
            ["m", "v"].map(|kind| {
                let found = state.iter().find(|s| s.0 == format!("{kind}/{from}"));
                let (_, shape, data) =
                    found.unwrap_or_else(|| panic!("{kind}/{from} is not in the state")).clone();
                (format!("{kind}/{to}"), shape, data)
            })
        })
        .collect();
    assert_eq!(renamed.len(), 2 * Parameters::of(&free).named().len());
    new.load_state(old.steps(), &renamed).unwrap();
    assert_eq!(new.steps(), 2);
    let moments = |of: &AdamW, depth: usize| {
        let name = format!("m/blocks.{depth}.mlp.up.weight");
        of.state_dict().unwrap().into_iter().find(|s| s.0 == name).expect("a moment").2
    };
    assert_eq!(moments(&new, 1), moments(&new, 3), "copies of one state");
    new.step(&free.loss(&x, &y).backward().unwrap(), 1e-2).unwrap();
    assert_ne!(moments(&new, 1), moments(&new, 3), "from here on each is its own");
    let error = tied.untied(&[0, 7]).err().expect("there is no depth 7").to_string();
    assert!(error.contains("[0, 7]"), "{error}");
}

#[test]
fn dictionaries_store_what_the_published_count_says() {
    let sizes = |sharing: Sharing| {
        let config = LmConfig::small()
            .vocab(63)
            .width(128)
            .heads(4)
            .kv_heads(4)
            .hidden(512)
            .context(64)
            .depth(6)
            .sharing(sharing.clone());
        Parameters::of(&Lm::new(gpu(), config, &mut Rng::new(1))).stored()
    };
    assert_eq!(sizes(Sharing::none()), 1_197_568);
    assert_eq!(sizes(Sharing::tied()), 214_528);
    assert_eq!(sizes(Sharing::tied_lora(16, 1.0)), 435_712);
    assert_eq!(sizes(Sharing::dictionary(2, true)), 935_472);
    assert_eq!(sizes(Sharing::dictionary(2, false)), 1_000_996);
}

#[test]
fn one_pass_moves_the_bytes_that_it_must() {
    let gpu = quiet();
    let (layers, atoms, size) = (12, 4, 64 * 64);
    let draw = |shape: &[usize]| Tensor::randn(&gpu, shape, &mut Rng::new(1)).contiguous();
    let d = draw(&[atoms, 64, 64]).requires_grad();
    let c = draw(&[layers, atoms]).requires_grad();
    let dw = draw(&[64, 64]);
    [&d, &c, &dw].iter().for_each(|t| t.evaluate());
    let (mut grads, mut kernels) = (None, Vec::new());
    for _ in 0..2 {
        let work = || {
            let w = d.combine(&c);
            let sum = w[1..].iter().fold(w[0].mul(&dw).sum_all(), |sum, w| sum.add(&w.mul(&dw).sum_all()));
            grads = Some(sum.backward().unwrap());
        };
        kernels = gpu.profile(work).unwrap();
    }
    let bytes = |entry: &str| {
        let found = kernels.iter().find(|k| k.kernel == format!("combine: combine {entry}"));
        let found = found.unwrap_or_else(|| panic!("no {entry} in {kernels:?}"));
        assert_eq!(found.count, 1, "one pass");
        found.bytes as usize
    };
    // Coefficients and partial sums of their gradients do not grow with the weights.
    let small = 4 * layers * atoms;
    assert_eq!(bytes("forward"), 4 * (layers + atoms) * size + small);
    let partial = bytes("backward") - 4 * (layers + 2 * atoms) * size - small;
    assert!(partial.is_multiple_of(small) && partial <= 4 * (layers + 2 * atoms) * size, "{partial}");
    assert_eq!(grads.expect("ran").len(), 2);
}

#[test]
fn gradients_take_the_memory_of_what_is_stored() {
    let bytes = |sharing: Sharing| {
        let gpu = quiet();
        let config = LmConfig::small()
            .vocab(64)
            .width(128)
            .heads(4)
            .kv_heads(4)
            .hidden(512)
            .context(32)
            .depth(6)
            .sharing(sharing.clone());
        let m = Lm::new(&gpu, config, &mut Rng::new(1));
        let ids: Vec<u32> = (0..32).map(|i| i * 7 % 64).collect();
        let x = Tensor::from_slice(&gpu, &ids, [1, 32]);
        let used = || {
            gpu.synchronize().unwrap();
            gpu.memory_stats().used as usize
        };
        let before = used();
        let grads = m.loss(&x, &x).backward().unwrap();
        let all = Parameters::of(&m);
        let params = Group::new(all.named().iter().map(|(name, leaf)| (name.clone(), leaf)));
        let held = used() - before;
        let optimizer = AdamW::new(&gpu, vec![params], AdamWConfig::default()).unwrap();
        assert_eq!(optimizer.state_bytes(), 8 * all.stored(), "two moments of what is stored");
        let elements: usize =
            all.named().iter().map(|(_, leaf)| grads.get(leaf).expect("a gradient").count()).sum();
        assert_eq!((elements, grads.len()), (all.stored(), all.named().len()), "{sharing:?}");
        (held, 4 * all.stored())
    };
    for sharing in [Sharing::none(), Sharing::tied(), Sharing::dictionary(2, true)] {
        let (held, stored) = bytes(sharing.clone());
        // Apart from rounding of buffer sizes, nothing else is kept, and no layer's dW outlives the pass.
        assert!(held >= stored && held < stored * 5 / 4 + (1 << 16), "{sharing:?}: {held} for {stored}");
    }
}

#[test]
fn a_dictionary_model_learns_its_atoms_and_coefficients() {
    let [x, y] = tokens();
    let m = model(3, Sharing::dictionary(2, true));
    let grads = m.loss(&x, &y).backward().unwrap();
    for made in &m.made {
        for leaf in [&made.dictionary.atoms, &made.dictionary.coefficients] {
            assert!(download(grads.get(leaf).expect("a gradient")).iter().any(|g| g.abs() > 1e-7));
        }
    }
    assert_eq!(grads.len(), Parameters::of(&m).named().len(), "what is not stored gets no gradient");
}

fn mor(routing: Routing, keys: Keys) -> Mor {
    let block = model(1, Sharing::none()).blocks[0].dense().expect("a plain block");
    Mor::new(gpu(), block, 3, routing, keys, &mut Rng::new(8))
}

/// Routing may choose other tokens when scores are rounded, so this compares no numbers. It shows that every system runs in a
/// scope, and that the same parameters get finite f32 gradients.
#[test]
fn every_system_runs_in_half_precision() {
    let [ids, targets] = tokens();
    let (x, mut rng) = (normal(&[2, 8, 16], 3), Rng::new(6));
    let check = |what: &str, all: Parameters, loss: &dyn Fn() -> Tensor| {
        let run = |precision: Precision| {
            let loss = autocast(precision, loss);
            assert!(loss.item().unwrap().is_finite(), "{what}");
            let grads = loss.backward().unwrap();
            for (name, leaf) in all.named() {
                let Some(dx) = grads.get(leaf) else { continue };
                assert_eq!(dx.dtype(), DType::F32, "{what} {name}");
                assert!(download(dx).iter().all(|g| g.is_finite()), "{what} {precision}: {name}");
            }
            (grads.len(), loss.item().unwrap())
        };
        let (count, want) = run(Precision::F32);
        for precision in [Precision::F16, Precision::Bf16] {
            let (own, loss) = run(precision);
            assert_eq!(own, count, "{what} {precision}");
            assert!(loss != want && (loss - want).abs() < 0.05 * want.abs(), "{what}: {loss}, not {want}");
        }
    };
    let gated = Gated::new(model(4, Sharing::none()));
    let loss = || gated.forward(&ids).cross_entropy(&targets, None);
    check("foldgpt", Parameters::of(&gated.model), &loss);
    for (routing, keys) in [(Routing::Expert, Keys::Recursion), (Routing::Token, Keys::Shared)] {
        let mor = mor(routing, keys);
        let loss = || mor.forward(&x, &[4, 2, 1]).unwrap().0.square().mean_all();
        check("mor", Parameters::of(&mor), &loss);
    }
    let net = widenet([4, 2]);
    let loss = || net.training_loss(&ids, &targets, &mut Rng::new(2));
    check("widenet", Parameters::of(&net), &loss);
    let net = Sliced::new(gpu(), 16, 2, 24, &[4, 4, 4], &mut rng);
    check("sret", Parameters::of(&net), &|| net.forward(&x, &mut Rng::new(1)).square().mean_all());
}

#[test]
fn tokens_that_are_not_chosen_rest() {
    let x = normal(&[2, 8, 16], 3);
    let model = mor(Routing::Expert, Keys::Recursion);
    assert_eq!(capacities(8, 3), [8, 6, 3]);
    let (y, done) = model.forward(&x, &[4, 2, 1]).unwrap();
    let chosen = done[0].selected.to_vec::<u32>().unwrap();
    let (before, after) = (download(&x), download(&y));
    for b in 0..2 {
        for t in 0..8 {
            let moved = (0..16).any(|c| before[(b * 8 + t) * 16 + c] != after[(b * 8 + t) * 16 + c]);
            assert_eq!(moved, chosen[b * 4..][..4].contains(&(t as u32)), "token {t} of {b}");
        }
    }
    // Each recursion selects from the tokens that the one before it selected.
    for pair in done.windows(2) {
        let [wide, narrow] = [0, 1].map(|i| pair[i].selected.to_vec::<u32>().unwrap());
        let (w, n) = (wide.len() / 2, narrow.len() / 2);
        assert!((0..2).all(|b| narrow[b * n..][..n].iter().all(|t| wide[b * w..][..w].contains(t))));
    }
    let loss = download(&done[1].auxiliary_loss())[0];
    assert!(loss.is_finite() && loss > 0.0);
}

#[test]
fn token_choice_gives_every_token_its_depth() {
    let x = normal(&[2, 8, 16], 4);
    for keys in [Keys::Recursion, Keys::Shared] {
        let model = mor(Routing::Token, keys);
        let (y, done) = model.forward(&x, &[]).unwrap();
        let p = x.reshape([16, 16]).matmul(&model.routers[0]).softmax(-1);
        let depth = p.argmax(1).to_vec::<u32>().unwrap();
        for (r, one) in done.iter().enumerate() {
            let (width, rows) = (one.selected.shape()[1], one.selected.to_vec::<u32>().unwrap());
            for b in 0..2 {
                let want: Vec<u32> = (0..8).filter(|&t| depth[b * 8 + t as usize] >= r as u32).collect();
                let got: Vec<u32> = rows[b * width..][..width].iter().copied().filter(|&t| t < 8).collect();
                assert_eq!(got, want, "recursion {r}, sequence {b}");
            }
        }
        let grads = y.sum_all().backward().unwrap();
        assert!(grads.get(&model.routers[0]).is_some(), "the router learns through the gates");
        let balance = download(&model.balance_loss(&x))[0];
        assert!((0.3..3.01).contains(&balance), "{balance}");
    }
}

#[test]
fn the_experts_are_the_gated_sum_that_they_stand_for() {
    let x = normal(&[6, 16], 2);
    let FeedForward::Experts(mut experts) = widenet([3, 3]).blocks.remove(0).mlp else {
        panic!("a model with experts has them");
    };
    let router = experts.router.leaves().remove(0);
    // With all three experts selected, the result is their sum, weighted by the softmax.
    let p = x.matmul(&router.t()).softmax(-1);
    let want = experts.experts.iter().enumerate().fold(Tensor::zeros(gpu(), [6, 16]), |sum, (e, mlp)| {
        sum.add(&mlp.forward(&x, None).mul(&p.slice(1, e..e + 1)))
    });
    let routed = experts.forward(&x, None);
    assert!(apart(&routed.output, &want) < 1e-5);
    assert!((download(&routed.balance_loss)[0] - 1.0).abs() < 1e-5, "all experts are used alike");
    let grads = routed.output.sum_all().backward().unwrap();
    assert!(grads.get(&router).is_some());
    // Noise in the router's scores, the same for the same seed, changes the gates and nothing else.
    experts.capacity = 3.0;
    let noisy = |seed| experts.forward(&x, Some(&mut Rng::new(seed))).output;
    assert_eq!(apart(&noisy(1), &noisy(1)), 0.0);
    assert!(apart(&noisy(1), &routed.output) > 1e-4 && apart(&noisy(1), &noisy(2)) > 1e-4);
    // With one expert per token and a capacity of one row, every list has the first token that chose the expert.
    (experts.top, experts.capacity) = (1, 0.01);
    let routed = experts.forward(&x, Some(&mut Rng::new(1)));
    let best = {
        let noise = Tensor::randn(gpu(), [6, 3], &mut Rng::new(1)).scale(1.0 / 3.0);
        x.matmul(&router.t()).add(&noise).argmax(1).to_vec::<u32>().unwrap()
    };
    for (e, list) in routed.rows.iter().enumerate() {
        let first = best.iter().position(|&b| b as usize == e).unwrap_or(6) as u32;
        assert_eq!(list.to_vec::<u32>().unwrap(), [first], "expert {e}");
    }
    let rows = download(&routed.output);
    let passed = (0..6).filter(|r| rows[r * 16..][..16].iter().all(|&v| v == 0.0)).count();
    let used = routed.rows.iter().filter(|l| l.to_vec::<u32>().unwrap()[0] < 6).count();
    assert_eq!(passed, 6 - used, "rows beyond the capacity pass by");
    // At evaluation nobody is full.
    let rows = download(&experts.forward(&x, None).output);
    assert!((0..6).all(|r| rows[r * 16..][..16].iter().any(|&v| v != 0.0)));
}

/// One attention layer and one layer of experts for three depths.
fn widenet([count, top]: [usize; 2]) -> Lm {
    let experts = ExpertsConfig { count, top, capacity: 1.25, balance: 0.01 };
    let config = config(3, Sharing::tied()).norm(NormKind::Layer).hidden(12).experts(Some(experts));
    Lm::new(gpu(), config, &mut Rng::new(4))
}

#[test]
fn widenet_shares_all_but_its_norms() {
    let [x, y] = tokens();
    let net = widenet([4, 2]);
    let grads = net.training_loss(&x, &y, &mut Rng::new(1)).backward().unwrap();
    let gains: Vec<&Tensor> =
        net.blocks.iter().map(|block| grads.get(&block.norm1.gain).expect("its own norm")).collect();
    assert!(apart(gains[0], gains[1]) > 1e-6 && apart(gains[1], gains[2]) > 1e-6);
    let all = Parameters::of(&net);
    let (tables, last) = (11 * 16 + 8 * 16, 2 * 16);
    assert_eq!(all.stored(), tables + 4 * 256 + 4 * 16 + 4 * 2 * 192 + 3 * 4 * 16 + last);
    assert_eq!(grads.len(), all.named().len());
    // With shared norms only one pair is stored, and computes something else once it has learned.
    let same = Lm::new(gpu(), net.config.clone().shared_norms(true), &mut Rng::new(4));
    assert_eq!(all.stored() - Parameters::of(&same).stored(), 2 * 4 * 16);
    assert_eq!(same.training_loss(&x, &y, &mut Rng::new(1)).backward().unwrap().len(), grads.len() - 8);
}

#[test]
fn sliced_attention_stays_in_its_group_until_the_order_changes() {
    let net = Sliced::new(gpu(), 8, 2, 12, &[4, 4, 4], &mut Rng::new(3));
    let x = normal(&[1, 8, 8], 5);
    // The last token of group 0 (tokens 0 and 1) changes, by different amounts per channel, because a norm would remove an equal
    // change of all channels.
    let mut data = x.to_vec::<f32>().unwrap();
    data[8..16].iter_mut().zip(1..).for_each(|(v, i)| *v += i as f32 * if i % 2 == 0 { -0.5 } else { 0.5 });
    let moved = Tensor::from_slice(gpu(), &data, [1, 8, 8]);
    let change = |a: &Tensor, b: &Tensor| -> Vec<f64> {
        let (a, b) = (download(a), download(b));
        (0..8).map(|t| (0..8).map(|c| (a[t * 8 + c] - b[t * 8 + c]).abs()).fold(0.0, f64::max)).collect()
    };
    // Far above the rounding of any adapter.
    const SEEN: f64 = 1e-4;
    let first = &net.applications[0];
    let once = change(&net.apply(first, &x), &net.apply(first, &moved));
    assert!(once[..2].iter().all(|&c| c > SEEN), "both tokens of the group see it: {once:?}");
    assert!(once[2..].iter().all(|&c| c == 0.0), "nobody else does: {once:?}");
    let twice = change(&net.forward(&x, &mut Rng::new(9)), &net.forward(&moved, &mut Rng::new(9)));
    assert!(
        twice.iter().filter(|&&c| c > SEEN).count() > 2,
        "another order lets other groups meet: {twice:?}"
    );
    // The block is stored once and used at every application.
    let all = Parameters::of(&net);
    assert!(all.used() > all.stored());
    assert_eq!(net.forward(&x, &mut Rng::new(9)).sum_all().backward().unwrap().len(), all.named().len());
}

#[test]
fn gates_fold_a_model() {
    let [x, y] = tokens();
    let original = model(4, Sharing::none());
    let want = original.forward(&x);
    let mut gated = Gated::new(model(4, Sharing::none()));
    assert!(apart(&gated.forward(&x), &want) < 1e-5, "gates of 1 change nothing");
    let grads =
        gated.forward(&x).cross_entropy(&y, None).add(&gated.penalty(0.1, 1.2, 0.5)).backward().unwrap();
    assert!(gated.gates.iter().all(|g| grads.get(g).is_some()));
    // Gates near 0 and 1 have a smaller penalty than gates in the middle.
    let penalty = |values: [f32; 4], gated: &mut Gated| {
        gated.gates = values.map(|v| Tensor::from_slice(gpu(), &[v], [1]).requires_grad()).to_vec();
        download(&gated.penalty(1.0, 1.0, 0.5))[0]
    };
    assert!(penalty([1.0, 0.0, 1.0, 0.0], &mut gated) < penalty([0.5; 4], &mut gated));
    penalty([0.9, 0.0, 0.7, 1.0], &mut gated);
    assert_eq!(ranking(&gated.values().unwrap()), [1, 2, 0, 3]);
    // A gate of 0 removes the block.
    gated.gates = [1.0, 0.0, 1.0, 1.0].map(|v| Tensor::from_slice(gpu(), &[v], [1])).to_vec();
    let folded = gated.fold(&[1], 1).unwrap();
    assert_eq!(folded.blocks.len(), 3);
    assert!(apart(&folded.forward(&x), &gated.forward(&x)) < 1e-5);
    // Groups share matrices and keep their norms.
    let pairs = gated.fold(&[], 2).unwrap();
    let matrices = 4 * 256 + 2 * 384;
    assert_eq!(Parameters::of(&original).stored() - Parameters::of(&pairs).stored(), 2 * matrices);
    assert_eq!(pairs.config.sharing, Sharing::fold(2));
    let built = Lm::new(gpu(), pairs.config.clone(), &mut Rng::new(1));
    let names = |m: &Lm| Parameters::of(m).named().iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    assert_eq!(names(&built), names(&pairs), "its config builds a model that its file fits");
    assert_ne!(pairs.blocks[0].norm1.gain.leaf_id(), pairs.blocks[1].norm1.gain.leaf_id());
    assert!(gated.fold(&[0, 1, 2, 3], 1).is_err() && gated.fold(&[9], 1).is_err());
    // A student that equals the teacher has no loss, but a folded one has.
    let same = download(&tail_distillation(&original, &original, &x, 2.0, 2))[0];
    let loss = tail_distillation(&folded, &original, &x, 2.0, 2);
    assert!(same.abs() < 1e-5 && download(&loss)[0] > 1e-3);
    assert_eq!(loss.backward().unwrap().len(), Parameters::of(&folded).named().len());
}

#[test]
fn what_an_earlier_sequence_left_in_a_cache_is_not_read() {
    // Head widths for one, two and four threads, with few keys and with enough keys for several parts.
    for (head_dim, context) in [(16, 24), (96, 24), (200, 24), (96, 700)] {
        let attend = |left: f32| {
            let list = |v: u32| Tensor::from_slice(gpu(), &[v], [1]);
            let mut cache = KvCache::new(gpu(), 2, 1, context, head_dim);
            let old = Tensor::full(gpu(), [1, context, 1, head_dim], left);
            cache.append(&old, &old, &list(1), &list(0)).unwrap();
            let [k, v] = [1, 2].map(|seed| normal(&[1, 6, 1, head_dim], seed));
            cache.append(&k, &v, &list(1), &list(0)).unwrap();
            download(&cache.attend(&normal(&[1, 2, 2, head_dim], 3), &list(1), &list(6)))
        };
        let (clean, left) = (attend(0.0), attend(f32::INFINITY));
        assert!(clean.iter().all(|y| y.is_finite()) && clean == left, "{head_dim} {context}");
    }
}
