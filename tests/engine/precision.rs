//! Training in 16 bits: scopes, the types of gradients, weights that are converted once, and the loss scale.

use crate::support::*;
use std::sync::Arc;
use tiebeam::gpu::plan::Pass;
use tiebeam::models::convert::low_rank;
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::{Mask, Parameters};
use tiebeam::ops::product::matmul::Epilogue;
use tiebeam::optim::{AdamW, AdamWConfig, Group, LossScale, LossScaleConfig, Sgd, SgdConfig, StepEvent};
use tiebeam::share::dictionary::matrix_pca;
use tiebeam::share::hashed::SEEDS;
use tiebeam::share::{Dictionary, Draw, Factored, Hashed, LowRank, Mapping, Miss, Site, Tied};
use tiebeam::store::{Checkpoint, load_checkpoint, save_checkpoint};
use tiebeam::{DType, Gpu, Precision, Result, Rng, Step, Tensor, autocast, checkpoint};

const HALVES: [Precision; 2] = [Precision::F16, Precision::Bf16];

fn config(sharing: Sharing) -> LmConfig {
    LmConfig::small().width(32).heads(2).kv_heads(2).hidden(64).context(16).depth(4).sharing(sharing)
}

fn ids(gpu: &Gpu, seed: u64, shape: [usize; 2]) -> Tensor {
    let mut rng = Rng::new(seed);
    let data: Vec<u32> = (0..shape[0] * shape[1]).map(|_| rng.below(256) as u32).collect();
    Tensor::from_slice(gpu, &data, shape)
}

/// The distance of two arrays relative to the second's norm.
fn distance(got: &[f64], want: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied()).max(1e-30)
}

/// Loss and gradients of a model in a precision, with a loss scale that keeps small gradients in f16.
fn gradients(model: &Lm, precision: Precision, [x, y]: [&Tensor; 2]) -> (f32, Vec<(String, Vec<f64>)>) {
    let scale = LossScale::new(x.gpu(), LossScaleConfig::default().scale(1024.0)).unwrap();
    let loss = autocast(precision, || model.loss(x, y));
    let grads = scale.backward(&loss).unwrap();
    let all = Parameters::of(model);
    let of = |(name, leaf): &(String, Tensor)| {
        let dx = grads.get(leaf).unwrap_or_else(|| panic!("{name}: no gradient"));
        assert_eq!(dx.dtype(), DType::F32, "{name}");
        (name.clone(), download(dx))
    };
    (loss.item().unwrap(), all.named().iter().map(of).collect())
}

#[test]
fn every_model_of_shared_weights_has_its_gradients_in_half_precision() {
    let gpu = gpu();
    let (x, y) = (ids(gpu, 1, [3, 16]), ids(gpu, 2, [3, 16]));
    for sharing in [
        Sharing::none(),
        Sharing::tied(),
        Sharing::tied_lora(2, 1.0),
        Sharing::cycle(2, 2),
        Sharing::fold(3),
        Sharing::dictionary(3, true),
        Sharing::low_rank(8),
    ] {
        let model = Lm::new(gpu, config(sharing.clone()), &mut Rng::new(3));
        let (want, exact) = gradients(&model, Precision::F32, [&x, &y]);
        for (precision, bound) in [(Precision::F16, 0.01), (Precision::Bf16, 0.06)] {
            let (loss, found) = gradients(&model, precision, [&x, &y]);
            assert!(
                (loss - want).abs() < 0.2 * bound as f32 * want,
                "{sharing:?} {precision}: {loss}, {want}"
            );
            assert_ne!(loss, want, "{sharing:?}: {precision} is not used");
            for ((name, got), (_, want)) in found.iter().zip(&exact) {
                let off = distance(got, want);
                assert!(off < bound, "{sharing:?} {precision} {name}: off by {off:.4}");
            }
        }
    }
}

#[test]
fn computed_weights_are_read_in_half_precision() {
    let gpu = gpu();
    let mut data = vec![0f32; 300];
    Rng::new(4).fill_normal(&mut data);
    let theta = Tensor::from_slice(gpu, &data, [300]).requires_grad();
    // Few rows, where the weight is computed in the product's load, and many, where it is materialised.
    for rows in [6, 70] {
        let mut data = vec![0f32; rows * 24];
        Rng::new(5).fill_normal(&mut data);
        let x = Tensor::from_slice(gpu, &data, [rows, 24]).requires_grad();
        let draw = Draw {
            size: [20, 24],
            stored: 300,
            offset: 0,
            layer: 0,
            scale: 0.7,
            mapping: Mapping::Element,
            seeds: SEEDS,
        };
        let site = Hashed::new(&theta, draw).shared();
        let run = |precision| {
            let y = autocast(precision, || x.linear(&site, Epilogue::default()));
            let grads = y.square().sum_all().backward().unwrap();
            [&y, grads.get(&x).unwrap(), grads.get(&theta).unwrap()].map(download)
        };
        let want = run(Precision::F32);
        for (precision, bound) in [(Precision::F16, 2e-3), (Precision::Bf16, 2e-2)] {
            for (got, want) in run(precision).iter().zip(&want) {
                let off = distance(got, want);
                assert!(off < bound && off > 0.0, "{precision}, {rows} rows: off by {off}");
            }
        }
    }
}

#[test]
fn scopes_decide_types() {
    let gpu = gpu();
    let w = Tensor::ones(gpu, [8, 8]).requires_grad();
    let x = Tensor::ones(gpu, [4, 8]);
    for precision in HALVES {
        let half = precision.dtype();
        let (y, z) = autocast(precision, || {
            let y = x.matmul(&w).rms_norm(None, 1e-5);
            assert_eq!(autocast(Precision::F32, || x.matmul(&w)).dtype(), DType::F32);
            let none = Tensor::zeros(gpu, [1, 2, 3, 8]);
            let nothing = none.attention(&none.slice(2, 0..0), &none.slice(2, 0..0), &Mask::None);
            assert_eq!((nothing.dtype(), none.attention(&none, &none, &Mask::None).dtype()), (half, half));
            // Softmax, sums and losses are f32.
            assert_eq!(y.softmax(-1).dtype(), DType::F32);
            assert_eq!(y.sum(0).dtype(), DType::F32);
            (y.clone(), y.gelu().matmul(&w))
        });
        assert_eq!((y.dtype(), z.dtype()), (half, half));
        assert_eq!(x.matmul(&w).dtype(), DType::F32, "outside");
        let grads = z.sum_all().backward().unwrap();
        assert_eq!(grads.get(&w).unwrap().dtype(), DType::F32);
        // A scope does not change what is computed outside of it from half values.
        let h = Tensor::ones(gpu, [4, 8]).cast(half).requires_grad();
        let grads = h.matmul(&w).sum_all().backward().unwrap();
        assert_eq!(grads.get(&h).unwrap().dtype(), DType::F32);
    }
}

/// The dispatches of a training step.
fn passes(gpu: &Gpu, sharing: Sharing, sizes: [usize; 3], precision: Precision) -> Vec<Pass> {
    let [width, tokens, batch] = sizes;
    let config =
        config(sharing).width(width).heads(width / 32).kv_heads(width / 32).hidden(4 * width).context(tokens);
    let model = Lm::new(gpu, config, &mut Rng::new(3));
    let named = Parameters::of(&model);
    let groups = vec![Group::new(named.named().iter().map(|(name, leaf)| (name, leaf)))];
    let mut adamw = AdamW::new(gpu, groups, AdamWConfig::default()).unwrap();
    let scale = LossScale::of(gpu, precision).unwrap();
    let (x, y) = (ids(gpu, 1, [batch, tokens]), ids(gpu, 2, [batch, tokens]));
    let mut step = || {
        let loss = autocast(precision, || model.loss(&x, &y));
        adamw.step(&scale.backward(&loss).unwrap(), 1e-3).unwrap();
    };
    step();
    gpu.planned(step).unwrap()
}

/// A scope may be as long as a training.
#[test]
fn a_scope_keeps_nothing_of_earlier_steps() {
    let gpu = quiet();
    let model = Lm::new(&gpu, config(Sharing::tied()), &mut Rng::new(3));
    let named = Parameters::of(&model);
    let groups = vec![Group::new(named.named().iter().map(|(name, leaf)| (name, leaf)))];
    let mut adamw = AdamW::new(&gpu, groups, AdamWConfig::default()).unwrap();
    let (x, y) = (ids(&gpu, 1, [3, 16]), ids(&gpu, 2, [3, 16]));
    let mut used = Vec::new();
    autocast(Precision::Bf16, || {
        for _ in 0..12 {
            adamw.step(&model.loss(&x, &y).backward().unwrap(), 1e-3).unwrap();
            gpu.synchronize().unwrap();
            used.push(gpu.memory_stats().used);
        }
    });
    assert!(used[4..].iter().all(|&bytes| bytes == used[4]), "{used:?}");
}

#[test]
fn backward_inside_a_scope_computes_what_it_does_outside() {
    let gpu = gpu();
    let (x, y) = (ids(gpu, 1, [3, 16]), ids(gpu, 2, [3, 16]));
    for sharing in [Sharing::tied_lora(2, 1.0), Sharing::dictionary(3, true)] {
        let model = Lm::new(gpu, config(sharing.clone()), &mut Rng::new(3));
        let all = Parameters::of(&model);
        let of = |inside: bool| {
            let scale = LossScale::new(gpu, LossScaleConfig::default().scale(65536.0)).unwrap();
            let loss = autocast(Precision::F16, || model.loss(&x, &y));
            let back = || scale.backward(&loss).unwrap();
            let grads = if inside { autocast(Precision::F16, back) } else { back() };
            let of = |(name, leaf): &(String, Tensor)| {
                let dx = grads.get(leaf).unwrap_or_else(|| panic!("{name}: no gradient"));
                assert_eq!(dx.dtype(), DType::F32, "{sharing:?} {name}");
                download(dx)
            };
            all.named().iter().map(of).collect::<Vec<_>>()
        };
        assert!(of(false) == of(true), "{sharing:?}");
    }
}

/// Numerics of the library are no activations.
#[test]
fn factors_and_dictionaries_are_f32_in_every_scope() {
    let mut data = vec![0f32; 4 * 12 * 10];
    Rng::new(9).fill_normal(&mut data);
    let w = Tensor::from_slice(gpu(), &data, [4, 12, 10]);
    let all = || {
        let (dictionary, _) = matrix_pca(&w, 2).unwrap();
        let layers = dictionary.atoms.combine(&dictionary.coefficients);
        let [b, a] = low_rank(&w.slice(0, 0..1).reshape([12, 10]), 3).unwrap();
        [&dictionary.atoms, &dictionary.coefficients, &layers[1], &b, &a].map(|x| x.to_vec::<f32>().unwrap())
    };
    let want = all();
    for precision in HALVES {
        assert!(autocast(precision, all) == want, "{precision}");
    }
}

#[test]
fn a_weight_is_converted_once_for_all_its_sites() {
    let gpu = quiet();
    let casts = |sharing| {
        let all = passes(&gpu, sharing, [32, 16, 3], Precision::Bf16);
        all.iter().filter(|pass| pass.op == "cast" && pass.workgroups() * 256 >= 32 * 32).count()
    };
    let (tied, untied) = (casts(Sharing::tied()), casts(Sharing::none()));
    // Six matrices, which four depths share or not, beside what both have.
    assert_eq!(untied - tied, 3 * 6, "{tied} casts tied, {untied} untied");
}

#[test]
fn half_precision_moves_fewer_bytes() {
    let gpu = quiet();
    let bytes = |precision| {
        let all = passes(&gpu, Sharing::tied(), [64, 64, 8], precision);
        let of = |word: &str| {
            let own = all.iter().filter(|pass| pass.to_string().starts_with(word));
            own.map(|pass| pass.bytes).sum::<f64>()
        };
        if std::env::var_os("TIEBEAM_PASSES").is_some() {
            all.iter().for_each(|pass| println!("{precision} {} {pass}", pass.op));
        }
        (all.iter().map(|pass| pass.bytes).sum::<f64>(), of("attention"), all.len())
    };
    let (full, attention, count) = bytes(Precision::F32);
    println!("f32: {full} bytes in {count} dispatches, {attention} of them in attention");
    for precision in HALVES {
        let (half, attention, count) = bytes(precision);
        println!("{precision}: {half} bytes in {count} dispatches, {attention} of them in attention");
        assert!(half < 0.8 * full, "{precision}: {half} bytes, {full} in f32");
    }
}

/// A computed weight is written in 16 bits by the kernel that computes it, with the bits of a cast.
#[test]
fn a_materialised_weight_is_rounded_like_a_cast() {
    let gpu = gpu();
    let normal = |seed: u64, shape: &[usize], scale: f32| {
        let mut data = vec![0f32; shape.iter().product()];
        Rng::new(seed).fill_normal(&mut data);
        data.iter_mut().for_each(|x| *x *= scale);
        Tensor::from_slice(gpu, &data, shape)
    };
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 65504.0, 65520.0, -65519.996];
    let special =
        special.into_iter().chain([6e-8, 2.9e-8, -3e-8, 1.0 / 3.0, f32::MAX, 1e-40, 1.0 + 1.0 / 256.0, 1.5]);
    let special = Tensor::from_slice(gpu, &special.collect::<Vec<f32>>(), [4, 4]);
    for columns in [24, 23, 4] {
        let draw = Draw {
            size: [20, columns],
            stored: 300,
            offset: 0,
            layer: 0,
            scale: 0.7,
            mapping: Mapping::Element,
            seeds: SEEDS,
        };
        let (theta, a, b) =
            (normal(1, &[20, columns], 30.0), normal(2, &[3, columns], 1.0), normal(3, &[20, 3], 1.0));
        let atoms = Dictionary::new(&normal(6, &[3, 20, columns], 1.0), &normal(7, &[2, 3], 1.0));
        let sites: [Arc<dyn Site>; 6] = [
            atoms.site(1),
            Hashed::new(&normal(4, &[300], 1e4), draw).shared(),
            LowRank::new(&theta, &a, &b, 0.3).shared(),
            Miss::new(&theta, &normal(5, &[3, 20], 1e-3)).shared(),
            Tied::new(&theta).shared(),
            Tied::new(&special).shared(),
        ];
        for site in sites {
            for precision in HALVES {
                let dtype = precision.dtype();
                let (got, want) = (site.expand_as(dtype), site.expand().cast(dtype));
                assert_eq!((got.dtype(), got.shape()), (dtype, want.shape()));
                let bits = |x: &Tensor| {
                    x.cast(DType::F32)
                        .to_vec::<f32>()
                        .unwrap()
                        .into_iter()
                        .map(f32::to_bits)
                        .collect::<Vec<_>>()
                };
                assert_eq!(bits(&got), bits(&want), "{} of {columns} columns in {precision}", site.name());
            }
        }
        // A product of two factors is made by a product, whose result has the type too.
        let factored = Factored::new(&a, &b);
        assert_eq!(factored.expand_as(DType::F16).dtype(), DType::F16);
        assert_eq!(autocast(Precision::F16, || factored.expand()).dtype(), DType::F32);
    }
    let integers = std::panic::AssertUnwindSafe(|| Tied::new(&special).expand_as(DType::U32));
    assert!(std::panic::catch_unwind(integers).is_err());
}

#[test]
fn a_materialised_weight_takes_one_dispatch() {
    let gpu = quiet();
    let (theta, a, b) =
        (Tensor::ones(&gpu, [20, 24]), Tensor::ones(&gpu, [3, 24]), Tensor::ones(&gpu, [20, 3]));
    [&theta, &a, &b].into_iter().for_each(Tensor::evaluate);
    let site = LowRank::new(&theta, &a, &b, 0.5).shared();
    for precision in HALVES {
        let x = Tensor::ones(&gpu, [70, 24]).cast(precision.dtype());
        x.evaluate();
        let passes =
            || gpu.planned(|| drop(autocast(precision, || x.linear(&site, Epilogue::default())))).unwrap();
        let names: Vec<String> = passes().into_iter().map(|pass| pass.op).collect();
        assert_eq!(names, ["low_rank", "linear"], "{precision}");
    }
}

/// A closure that runs twice is in its scope both times.
#[test]
fn a_checkpointed_part_runs_again_in_its_scope() {
    let gpu = gpu();
    let (x, y) = (ids(gpu, 1, [3, 16]), ids(gpu, 2, [3, 16]));
    let model = Arc::new(Lm::new(gpu, config(Sharing::tied()), &mut Rng::new(3)));
    for precision in HALVES {
        let (_, want) = gradients(&model, precision, [&x, &y]);
        let scale = LossScale::new(gpu, LossScaleConfig::default().scale(1024.0)).unwrap();
        let loss = autocast(precision, || {
            let stream = model.blocks.iter().fold(model.embed(&x), |stream, block| {
                let block = block.dense().expect("a plain block");
                checkpoint(&[&stream], move |x| {
                    assert_eq!(x[0].dtype(), precision.dtype());
                    block.forward(&x[0], &Mask::Causal)
                })
            });
            model.logits(&stream).cross_entropy(&y, None)
        });
        let grads = scale.backward(&loss).unwrap();
        for ((name, leaf), (_, want)) in Parameters::of(&*model).named().iter().zip(&want) {
            let off = distance(&download(grads.get(leaf).unwrap()), want);
            // The gradient of a block's input is summed in f32 instead of 16 bits.
            assert!(off < if precision == Precision::F16 { 2e-3 } else { 2e-2 }, "{name}: off by {off}");
        }
    }
}

/// A small model with its optimizer, and a number by which its loss is multiplied, to make gradients overflow.
struct Run {
    model: Lm,
    adamw: AdamW,
    scale: LossScale,
    precision: Precision,
}

impl Run {
    fn new(gpu: &Gpu, precision: Precision, interval: u32) -> Run {
        let model = Lm::new(gpu, config(Sharing::tied()), &mut Rng::new(3));
        let named = Parameters::of(&model);
        let groups = vec![Group::new(named.named().iter().map(|(name, leaf)| (name, leaf)))];
        let adamw = AdamW::new(gpu, groups, AdamWConfig::default().clip(Some(1.0))).unwrap();
        let scale = LossScale::new(gpu, LossScaleConfig::default().interval(interval)).unwrap();
        Run { model, adamw, scale, precision }
    }

    fn step(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x, y, factor] = inputs else { panic!("three inputs") };
        let loss = autocast(self.precision, || self.model.loss(x, y)).mul(factor);
        let info = self.adamw.step(&self.scale.backward(&loss)?, 1e-2)?;
        Ok(vec![loss, info.norm])
    }

    fn inputs(gpu: &Gpu, step: usize) -> [Tensor; 3] {
        // An overflow in the third step, and another in the sixth.
        let factor = if step % 3 == 2 { f32::INFINITY } else { 1.0 };
        let at = 10 * step as u64;
        [ids(gpu, at, [3, 16]), ids(gpu, at + 1, [3, 16]), Tensor::scalar(gpu, factor)]
    }

    /// All that a later step depends on.
    fn bits(&self) -> Vec<u32> {
        let mut all: Vec<f32> = Vec::new();
        for (_, leaf) in Parameters::of(&self.model).named() {
            all.extend(leaf.to_vec::<f32>().unwrap());
        }
        let state = [self.adamw.state_dict().unwrap(), self.scale.state_dict().unwrap()];
        state.iter().flatten().for_each(|(_, _, data)| all.extend(data));
        all.into_iter().map(f32::to_bits).collect()
    }
}

#[test]
fn runs_replays_and_resumed_runs_have_the_same_bits() {
    let gpu = gpu();
    let folder = folder::Folder::new("precision");
    for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
        let mut eager = Run::new(gpu, precision, 2);
        let mut events = Vec::new();
        let mut bits = Vec::new();
        for step in 0..7 {
            eager.step(&Run::inputs(gpu, step)).unwrap();
            events.extend(eager.adamw.watch().unwrap().events().unwrap());
            bits.push(eager.bits());
        }
        assert_eq!((eager.adamw.skipped().unwrap(), eager.adamw.steps()), (2, 7));
        // The same steps, recorded once and replayed.
        let mut run = Run::new(gpu, precision, 2);
        let first = Run::inputs(gpu, 0);
        let mut step = Step::record(gpu, &first.each_ref(), |inputs| run.step(inputs)).unwrap();
        for i in 1..7 {
            step.run(&Run::inputs(gpu, i).each_ref()).unwrap();
        }
        assert!(run.bits() == bits[6], "{precision}: replays have other bits");
        assert_eq!(run.adamw.watch().unwrap().events().unwrap(), events, "{precision}: replays");
        // The same steps, with a break.
        let path = folder.join(format!("{precision}.safetensors"));
        let mut run = Run::new(gpu, precision, 2);
        (0..4).for_each(|i| drop(run.step(&Run::inputs(gpu, i)).unwrap()));
        let mut state = run.adamw.state_dict().unwrap();
        state.extend(run.scale.state_dict().unwrap());
        let saved = Checkpoint::default().step(run.adamw.steps()).optimizer(state);
        save_checkpoint(&path, Parameters::of(&run.model).named(), &saved).unwrap();
        let mut run = Run::new(gpu, precision, 2);
        let mut loaded = load_checkpoint(&path, Parameters::of(&run.model).named()).unwrap();
        run.scale.load_state(&mut loaded.optimizer).unwrap();
        run.adamw.load_state(loaded.step, &loaded.optimizer).unwrap();
        assert!(run.bits() == bits[3], "{precision}: the checkpoint has other bits");
        (4..7).for_each(|i| drop(run.step(&Run::inputs(gpu, i)).unwrap()));
        assert!(run.bits() == bits[6], "{precision}: the resumed run has other bits");
        let after = |event: &&StepEvent| match event {
            StepEvent::Overflow { step, .. } | StepEvent::Raised { step, .. } => *step > 4,
            _ => panic!("{event}"),
        };
        let later: Vec<StepEvent> = events.iter().filter(after).cloned().collect();
        assert_eq!(run.adamw.watch().unwrap().events().unwrap(), later, "{precision}: resumed");
        // Two finite steps raise the scale, the third lowers it.
        let scales: Vec<(u64, f32)> = events
            .iter()
            .map(|event| match event {
                StepEvent::Overflow { step, next, .. } | StepEvent::Raised { step, next, .. } => {
                    (*step, *next)
                }
                _ => panic!("{event}"),
            })
            .collect();
        assert_eq!(scales, [(2, 131072.0), (3, 65536.0), (5, 131072.0), (6, 65536.0)], "{precision}");
    }
}

#[test]
fn an_overflow_is_named_and_changes_nothing() -> Result<()> {
    let gpu = gpu();
    let leaf = |x: f32| Tensor::from_slice(gpu, &[x, -x], [2]).requires_grad();
    let (a, b, c) = (leaf(1.0), leaf(2.0), leaf(3.0));
    let named = [("first", &a), ("second", &b), ("third", &c)];
    let mut adamw = AdamW::new(gpu, vec![Group::new(named)], AdamWConfig::default())?;
    let config = LossScaleConfig::default().scale(8.0).interval(3);
    let scale = LossScale::new(gpu, config)?;
    let loss = |factors: [f32; 3]| {
        let terms = [&a, &b, &c].map(|x| x.square().sum_all());
        let scaled = terms.iter().zip(factors).map(|(term, factor)| term.scale(factor));
        scaled.reduce(|sum, term| sum.add(&term)).expect("three terms")
    };
    let mut plain = vec![];
    adamw.step(&scale.backward(&loss([1.0; 3]))?, 0.1)?;
    let state = |adamw: &AdamW| -> Result<Vec<Vec<f32>>> {
        // Steps that changed nothing are no steps of a parameter, which the state notes.
        let (steps, moments): (Vec<_>, Vec<_>) =
            adamw.state_dict()?.into_iter().partition(|(name, ..)| name.starts_with("step/"));
        assert!(steps.iter().all(|(_, _, data)| data == &[1.0]));
        let mut all: Vec<Vec<f32>> = moments.into_iter().map(|(_, _, data)| data).collect();
        all.extend([a.to_vec::<f32>()?, b.to_vec::<f32>()?, c.to_vec::<f32>()?]);
        Ok(all)
    };
    let before = state(&adamw)?;
    // The second and the third overflow, then none alone but all together, then one has NaN.
    // The parameters are near 0.9 and 1.9, and the scale is 4.
    let together = [1.1e19 / (8.0 * 0.9), 1.1e19 / (8.0 * 1.9), 0.0];
    for factors in [[1.0, f32::INFINITY, f32::INFINITY], together, [f32::NAN, 0.0, 1.0]] {
        let info = adamw.step(&scale.backward(&loss(factors))?, 0.1)?;
        assert!(!info.norm.item()?.is_finite());
        assert_eq!(state(&adamw)?, before);
        plain.push(scale.scale()?);
    }
    assert_eq!(plain, [4.0, 2.0, 1.0]);
    let events = adamw.watch()?.events()?;
    let lines: Vec<String> = events.iter().map(StepEvent::to_string).collect();
    assert_eq!(
        lines,
        [
            "step 2 changed nothing: at loss scale 8, gradients overflowed of second, third; the scale is 4 now",
            "step 3 changed nothing: at loss scale 4, gradients overflowed of all parameters together; the scale is 2 now",
            "step 4 changed nothing: at loss scale 2, gradients overflowed of first; the scale is 1 now",
        ]
    );
    for _ in 0..3 {
        adamw.step(&scale.backward(&loss([1.0; 3]))?, 0.1)?;
    }
    let events = adamw.watch()?.events()?;
    assert_eq!(events, [StepEvent::Raised { step: 7, scale: 1.0, next: 2.0 }]);
    assert_eq!(events[0].to_string(), "the loss scale was raised from 1 to 2 after step 7");
    assert_eq!(adamw.skipped()?, 3);
    Ok(())
}

#[test]
fn the_loss_scale_does_not_change_a_step() -> Result<()> {
    let gpu = gpu();
    // Powers of two round nothing, so the bits are those of the step without a scale, clipped or not.
    for clip in [None, Some(0.5)] {
        let step = |scale: Option<f32>| -> Result<(Vec<u32>, f32)> {
            let w = Tensor::from_slice(gpu, &[0.3f32, -1.7, 2.9], [3]).requires_grad();
            let config = SgdConfig::default().clip(clip).momentum(0.9);
            let mut sgd = Sgd::new(gpu, vec![Group::new([("w", &w)]).weight_decay(0.1)], config)?;
            let loss = w.mul(&w.sin()).sum_all();
            let grads = match scale {
                None => loss.backward()?,
                Some(scale) => {
                    LossScale::new(gpu, LossScaleConfig::default().scale(scale))?.backward(&loss)?
                }
            };
            let norm = sgd.step(&grads, 0.1)?.norm.item()?;
            Ok((w.to_vec::<f32>()?.into_iter().map(f32::to_bits).collect(), norm))
        };
        let want = step(None)?;
        for scale in [1.0, 1024.0, 65536.0, 0.125] {
            assert_eq!(step(Some(scale))?, want, "{clip:?} {scale}");
        }
    }
    Ok(())
}

#[test]
fn events_that_nobody_read_are_counted() -> Result<()> {
    let gpu = gpu();
    let w = Tensor::ones(gpu, [2]).requires_grad();
    let mut sgd = Sgd::new(gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
    let grads = w.scale(f32::NAN).sum_all().backward()?;
    let early = sgd.watch()?;
    for _ in 0..100 {
        sgd.step(&grads, 0.1)?;
    }
    let events = sgd.watch()?.events()?;
    assert_eq!((events.len(), &events[0]), (64, &StepEvent::Missed { count: 37 }));
    let last = StepEvent::Overflow { step: 100, scale: 1.0, next: 1.0, names: vec!["w".into()] };
    assert_eq!(events[63], last);
    assert_eq!(last.to_string(), "step 100 changed nothing: at loss scale 1, gradients overflowed of w");
    assert!(early.events()?.is_empty() && sgd.watch()?.events()?.is_empty());
    // Gradients of different scales do not add up.
    let scale = LossScale::of(gpu, Precision::F16)?;
    let scaled = scale.backward(&w.sum_all())?;
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| scaled.add(&grads))).is_err());
    for config in [
        LossScaleConfig::default().scale(0.0),
        LossScaleConfig::default().growth(1.0),
        LossScaleConfig::default().backoff(f32::NAN),
    ] {
        assert!(LossScale::new(gpu, config).is_err());
    }
    Ok(())
}
