//! The learning curve of `examples/charlm` in half precision: within the spread of f32's over seeds.

use crate::Long;
use crate::support;
use crate::support::folder::root;
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::Parameters;
use tiebeam::optim::{AdamW, AdamWConfig, Group, LossScale, Schedule, StepEvent};
use tiebeam::{Gpu, Precision, Result, Rng, Tensor, autocast};

/// A run: the example's model, text, optimizer and schedule.
#[derive(Clone, Copy)]
struct Sizes {
    width: usize,
    context: usize,
    batch: usize,
    depth: usize,
    steps: usize,
    seeds: u64,
}

fn batch(gpu: &Gpu, text: &[u8], sizes: Sizes, rng: &mut Rng) -> [Tensor; 2] {
    let Sizes { batch, context, .. } = sizes;
    let starts: Vec<usize> = (0..batch).map(|_| rng.below(text.len() - context)).collect();
    [0, 1].map(|later| {
        let window = |start: &usize| text[start + later..][..context].iter().map(|&b| u32::from(b));
        let ids: Vec<u32> = starts.iter().flat_map(window).collect();
        Tensor::from_slice(gpu, &ids, [batch, context])
    })
}

/// Trains, and returns the mean loss of the last quarter of the steps and the bits of all losses.
fn train(gpu: &Gpu, sizes: Sizes, precision: Precision, seed: u64) -> Result<(f64, Vec<u32>)> {
    let text = std::fs::read(root().join("examples/data/corpus.txt")).expect("the example's text");
    let mut rng = Rng::new(seed);
    let Sizes { width, context, depth, steps, .. } = sizes;
    let config = LmConfig::small().width(width).heads(width / 32).kv_heads(width / 32).hidden(4 * width);
    let model = Lm::new(gpu, config.context(context).depth(depth).sharing(Sharing::tied()), &mut rng);
    let [matrices, vectors] = Group::split(Parameters::of(&model).trainable(), |_, p| p.shape().len() > 1);
    let groups = vec![matrices.weight_decay(0.1), vectors];
    let settings = AdamWConfig::default().betas((0.9, 0.95)).clip(Some(1.0));
    let mut adamw = AdamW::new(gpu, groups, settings)?;
    let scale = LossScale::of(gpu, precision)?;
    let total = steps as u64;
    let schedule = Schedule::WarmupCosine { warmup: (total / 20).max(1), total, floor: 0.1 };
    let mut losses = Vec::new();
    for step in 0..total {
        let [tokens, targets] = batch(gpu, &text, sizes, &mut rng);
        let loss = autocast(precision, || model.loss(&tokens, &targets));
        adamw.step(&scale.backward(&loss)?, schedule.lr(0.4 / width as f32, step))?;
        losses.push(loss.item()?);
    }
    // The first scales of f16 may be too high. Nothing else overflows.
    let events = adamw.watch()?.events()?;
    let early = |event: &StepEvent| matches!(event, StepEvent::Overflow { step, .. } if *step < 20);
    assert!(events.iter().all(early), "{precision}: {events:?}");
    assert!(precision == Precision::F16 || events.is_empty(), "{precision}: {events:?}");
    let last = &losses[steps - steps / 4..];
    let mean = last.iter().map(|&x| f64::from(x)).sum::<f64>() / last.len() as f64;
    Ok((mean, losses.into_iter().map(f32::to_bits).collect()))
}

fn compare(gpu: &Gpu, sizes: Sizes) {
    let of = |precision, seed| train(gpu, sizes, precision, seed).expect("no fault");
    let full: Vec<(f64, Vec<u32>)> = (1..=sizes.seeds).map(|seed| of(Precision::F32, seed)).collect();
    let least = full.iter().map(|run| run.0).fold(f64::INFINITY, f64::min);
    let most = full.iter().map(|run| run.0).fold(f64::NEG_INFINITY, f64::max);
    println!("f32: {least:.4} to {most:.4} over {} seeds", sizes.seeds);
    // It has learned more than how often each byte occurs (3.36 nats).
    assert!(most < 3.3, "nothing was learned: {most}");
    for precision in [Precision::F16, Precision::Bf16] {
        let runs: Vec<(f64, Vec<u32>)> = (1..=sizes.seeds).map(|seed| of(precision, seed)).collect();
        let mean = runs.iter().map(|run| run.0).sum::<f64>() / runs.len() as f64;
        let apart = runs.iter().zip(&full).map(|(run, full)| (run.0 - full.0).abs()).fold(0.0, f64::max);
        println!("{precision}: mean {mean:.4}, at most {apart:.4} from the same seed in f32");
        // The mean over seeds lies well inside their range in any precision, so half of the range is a wide margin.
        let centre = full.iter().map(|run| run.0).sum::<f64>() / full.len() as f64;
        assert!(
            (mean - centre).abs() < (most - least) / 2.0,
            "{precision}: mean {mean:.4}, f32's {centre:.4}"
        );
        assert!(apart < most - least, "{precision}: {apart:.4} apart, seeds {:.4}", most - least);
        assert!(runs.iter().zip(&full).all(|(run, full)| run.1 != full.1), "{precision} is not used");
        assert!(of(precision, 1).1 == runs[0].1, "{precision}: a second run has other bits");
    }
}

pub fn all(long: bool) -> Vec<Long> {
    let short = Sizes { width: 32, context: 32, batch: 8, depth: 2, steps: 70, seeds: 3 };
    let sizes = match long {
        // The example's defaults on CPU drivers.
        true => Sizes { width: 96, context: 64, batch: 12, depth: 4, steps: 350, seeds: 5 },
        false => short,
    };
    let name = format!("learning curves in half precision, {} steps", sizes.steps);
    // A class of devices that is not the adapter's own takes twice as long and shows the same in short.
    let of = move |gpu: &Gpu| if std::ptr::eq(gpu, support::gpu()) { sizes } else { short };
    vec![Long::new(name, 1 << 20, move |gpu| compare(gpu, of(gpu)))]
}
