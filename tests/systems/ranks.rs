//! Language models on several ranks.

use crate::support::gpu;
use crate::support::ranks::on_ranks;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiebeam::language::{Corpus, Data, Progress, Training, TrainingOptions};
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::Module;
use tiebeam::ranks::{Alone, Ranks};
use tiebeam::{Gpu, Rng};

fn config(sharing: &str) -> LmConfig {
    let config = LmConfig::small().vocab(13).width(32).heads(2).kv_heads(2).hidden(64).context(16).depth(4);
    config.sharing(Sharing::named(sharing).unwrap())
}

fn corpus() -> Corpus {
    Corpus::new((0..2000u32).map(|i| (i * i + i / 7) % 13).collect(), 13).unwrap()
}

fn options() -> TrainingOptions {
    TrainingOptions::default().steps(12).warmup(2).batch(8).lr(0.01).every(5).seed(3)
}

fn bits(model: &Lm) -> Vec<u32> {
    let all = model.parameters().trainable();
    all.iter().flat_map(|(_, leaf)| leaf.to_vec::<f32>().unwrap()).map(f32::to_bits).collect()
}

/// Trains, or goes on. Returns bits, and losses and validation at the points.
fn train(
    world: Arc<dyn Ranks>,
    options: TrainingOptions,
    file: Option<&Path>,
    go_on: bool,
    stop_at: u64,
) -> (Vec<u32>, Vec<[f64; 2]>) {
    let model = Lm::new(gpu(), config("tied"), &mut Rng::new(1 + world.rank() as u64));
    let (corpus, flag) = (corpus(), Arc::new(AtomicBool::new(false)));
    let first = world.rank() == 0;
    let training = Training::new(&model, &corpus, options).unwrap();
    let mut training = training.ranks(world).unwrap().stop(flag.clone());
    if go_on {
        training.resume(file.unwrap()).unwrap();
    }
    let done = training.run(file, &mut |progress| {
        if let Progress::Step(report) = progress {
            flag.fetch_or(first && report.step == stop_at, Ordering::SeqCst);
        }
        Ok(())
    });
    assert_eq!(done.unwrap(), stop_at == 0);
    (bits(&model), training.curve().iter().map(|p| [p.loss, p.validation]).collect())
}

#[test]
fn the_number_of_ranks_changes_rounding_only() {
    let one = train(Arc::new(Alone), options(), None, false, 0);
    assert_eq!(one.1.len(), 3);
    for (ranks, accumulate) in [(1, 4), (2, 1), (2, 2), (3, 1)] {
        let all = on_ranks(ranks, |world| train(world, options().accumulate(accumulate), None, false, 0));
        assert!(all.iter().all(|own| *own == all[0]), "{ranks} ranks have the same bits and losses");
        for (a, b) in all[0].1.iter().flatten().zip(one.1.iter().flatten()) {
            assert!(
                (a - b).abs() < 2e-3,
                "{ranks} ranks, {accumulate} parts: {:?} and {:?}",
                all[0].1,
                one.1
            );
        }
    }
}

#[test]
fn ranks_go_on_with_the_same_bits_and_in_other_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.safetensors");
    let whole = on_ranks(2, |world| train(world, options(), None, false, 0));
    // A flag on one of the ranks stops both, in the middle between two points.
    on_ranks(2, |world| train(world, options(), Some(&file), false, 7));
    let kept = std::fs::read(&file).unwrap();
    let again = on_ranks(2, |world| train(world, options(), Some(&file), true, 0));
    assert!(again == whole, "as if it had not been stopped");
    for ranks in [1, 4] {
        std::fs::write(&file, &kept).unwrap();
        let other = on_ranks(ranks, |world| train(world, options(), Some(&file), true, 0));
        for (a, b) in other[0].1.iter().flatten().zip(whole[0].1.iter().flatten()) {
            assert!((a - b).abs() < 2e-3, "{ranks} ranks: {:?} and {:?}", other[0].1, whole[0].1);
        }
    }
}

#[test]
fn what_is_measured_has_the_bits_of_one_rank() {
    let model = Lm::new(gpu(), config("none"), &mut Rng::new(1));
    let corpus = corpus();
    let alone = corpus.measure(&model, usize::MAX, &Alone, &mut |_, _| Ok(())).unwrap();
    let all = on_ranks(3, |world| corpus.measure(&model, usize::MAX, &*world, &mut |_, _| Ok(())).unwrap());
    assert_eq!(all, [alone; 3]);
}

/// A leaf is sent once, whatever its uses: tied blocks send a quarter of four blocks of their own, dictionaries their atoms.
#[test]
fn bytes_of_a_step_are_those_of_stored_leaves() {
    let gpu: &Gpu = gpu();
    let of = |sharing: &str| {
        let model = Lm::new(gpu, config(sharing), &mut Rng::new(1));
        let part = corpus().batch(gpu, [2, 16], (1, 0..1), 0, &mut Rng::new(1)).swap_remove(0);
        let grads = model.loss(&part.tokens, &part.targets).backward().unwrap();
        let stored: usize = model.parameters().trainable().iter().map(|(_, leaf)| leaf.count()).sum();
        assert_eq!(grads.bytes(), 4 * stored as u64, "{sharing}");
        let blocks = |name: &str| name.starts_with("blocks.") && !name.contains("norm");
        let named = model.parameters().trainable();
        let in_blocks: usize =
            named.iter().filter(|(name, _)| blocks(name)).map(|(_, leaf)| leaf.count()).sum();
        (grads.bytes(), 4 * in_blocks as u64)
    };
    let [(untied, untied_blocks), (tied, tied_blocks), (dictionary, _)] =
        ["none", "tied", "dictionary 2 output true"].map(of);
    assert_eq!(4 * tied_blocks, untied_blocks, "a quarter");
    assert_eq!(untied - tied, untied_blocks - tied_blocks);
    assert!(tied < dictionary && dictionary < untied);
}

#[test]
fn more_parts_than_windows_are_refused() {
    let errors = on_ranks(3, |world| {
        let (model, corpus) = (Lm::new(gpu(), config("tied"), &mut Rng::new(1)), corpus());
        let training = Training::new(&model, &corpus, options().batch(2));
        training.unwrap().ranks(world).map(drop).unwrap_err().to_string()
    });
    assert!(errors[0].starts_with("a step of 2 windows cannot be cut into 3 parts"), "{}", errors[0]);
}

#[test]
fn ranks_of_another_text_or_model_are_named_before_the_first_step() {
    let run = |world: Arc<dyn Ranks>, tokens: u32, sharing: &str| {
        let model = Lm::new(gpu(), config(sharing), &mut Rng::new(1));
        let corpus = Corpus::new((0..tokens).map(|i| i % 13).collect(), 13).unwrap();
        let mut training = Training::new(&model, &corpus, options()).unwrap().ranks(world).unwrap();
        training.run(None, &mut |_| panic!("no step is taken")).unwrap_err().to_string()
    };
    let text = on_ranks(2, |world| run(world.clone(), 900 + world.rank() as u32, "tied"));
    assert!(
        text.iter().all(|e| e.starts_with("rank 1 is of another run than rank 0: `train.data` is ")),
        "{text:?}"
    );
    let model = on_ranks(2, |world| run(world.clone(), 900, ["tied", "none"][world.rank()]));
    assert!(model.iter().all(|e| e.starts_with("rank 1 is of another run than rank 0: `")), "{model:?}");
}
