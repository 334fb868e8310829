//! Compares the other rules with loops in f64 and all of them with PyTorch, and checks what every optimizer keeps: replays and
//! saved states give the same bits.

use crate::optim::*;
use crate::support::*;
use tiebeam::optim::{
    Adam, AdamConfig, AdamW, AdamWConfig, Group, Lion, LionConfig, Optimizer, RmsProp, RmsPropConfig, Sgd,
    SgdConfig,
};
use tiebeam::{Gpu, Result, Step, Tensor};

#[test]
fn adam_follows_the_formula() {
    let gpu = gpu();
    for (name, clip, arena_limit) in [("adam", None, None), ("adam clipped", Some(CLIP), Some(4096))] {
        let problem = Problem::new(5);
        let leaves = problem.leaves(gpu);
        let config = AdamConfig::default().betas((0.9, 0.95)).eps(1e-3).clip(clip).arena_limit(arena_limit);
        let (b1, b2, eps) = (0.9f64, 0.95f64, f64::from(config.eps));
        let mut optimizer = Adam::new(gpu, groups(&leaves), config).expect("adam");
        let (mut m, mut v) = (vec![0.0; SIZES.iter().sum()], vec![0.0; SIZES.iter().sum()]);
        follow(
            name,
            &problem,
            &leaves,
            clip,
            |grads, lr| optimizer.step(grads, lr).expect("step"),
            |s, e, w, g, lr| {
                let g = g + settings(leaf_of(e)).0 * *w;
                m[e] = b1 * m[e] + (1.0 - b1) * g;
                v[e] = b2 * v[e] + (1.0 - b2) * g * g;
                let s = s as i32 + 1;
                *w -= lr * (m[e] / (1.0 - b1.powi(s))) / ((v[e] / (1.0 - b2.powi(s))).sqrt() + eps);
            },
        );
    }
}

#[test]
fn rmsprop_follows_the_formula() {
    let gpu = gpu();
    for (name, momentum, centered, clip, arena_limit) in [
        ("plain", 0.0f32, false, None, None),
        ("momentum", 0.5, false, Some(CLIP), Some(4096)),
        ("centered", 0.0, true, Some(CLIP), None),
        ("centered with momentum", 0.5, true, Some(CLIP), Some(4096)),
    ] {
        let problem = Problem::new(6);
        let leaves = problem.leaves(gpu);
        let config = RmsPropConfig::default().alpha(0.75).eps(1e-2).momentum(momentum).centered(centered);
        let (alpha, eps) = (config.alpha, f64::from(config.eps));
        let config = config.clip(clip).arena_limit(arena_limit);
        let mut optimizer = RmsProp::new(gpu, groups(&leaves), config).expect("rmsprop");
        let zeros = || vec![0.0; SIZES.iter().sum()];
        let (mut v, mut m, mut b) = (zeros(), zeros(), zeros());
        follow(
            name,
            &problem,
            &leaves,
            clip,
            // A step is up to twenty times the rate: the first mean square is small, and momentum doubles it.
            |grads, lr| optimizer.step(grads, lr * 0.0625).expect("step"),
            |_, e, w, g, lr| {
                let g = g + settings(leaf_of(e)).0 * *w;
                v[e] = alpha * v[e] + (1.0 - alpha) * g * g;
                m[e] = alpha * m[e] + (1.0 - alpha) * g;
                let variance = if centered { v[e] - m[e] * m[e] } else { v[e] };
                b[e] = f64::from(momentum) * b[e] + g / (variance.sqrt() + eps);
                *w -= lr * 0.0625 * b[e];
            },
        );
        let parts = 1 + usize::from(centered) + usize::from(momentum > 0.0);
        assert_eq!(optimizer.state_bytes(), parts * 4 * SIZES.iter().sum::<usize>());
    }
}

/// A variance that rounding makes negative counts as 0.
#[test]
fn a_centered_mean_square_is_never_negative() {
    let gpu = gpu();
    let data: Vec<f32> = (0..1000).map(|i| 1.0 + i as f32 * 1e-3).collect();
    let w = Tensor::from_slice(gpu, &data, [1000]).requires_grad();
    let config = RmsPropConfig::default().alpha(1e-7).eps(1.0).centered(true);
    let mut optimizer = RmsProp::new(gpu, vec![Group::new([("w", &w)])], config).unwrap();
    let c = Tensor::from_slice(gpu, &data, [1000]);
    for _ in 0..3 {
        optimizer.step(&w.mul(&c).sum_all().backward().unwrap(), 0.01).unwrap();
    }
    assert!(download(&w).iter().all(|w| w.is_finite()));
}

#[test]
fn lion_follows_the_formula() {
    let gpu = gpu();
    for (name, clip, arena_limit) in [("lion", None, None), ("lion clipped", Some(CLIP), Some(4096))] {
        let problem = Problem::new(7);
        let leaves = problem.leaves(gpu);
        let config = LionConfig::default().clip(clip).arena_limit(arena_limit);
        let (b1, b2) = config.betas;
        let mut optimizer = Lion::new(gpu, groups(&leaves), config).expect("lion");
        let mut m = vec![0.0f64; SIZES.iter().sum()];
        follow(
            name,
            &problem,
            &leaves,
            clip,
            |grads, lr| optimizer.step(grads, lr).expect("step"),
            |_, e, w, g, lr| {
                *w *= 1.0 - lr * settings(leaf_of(e)).0;
                *w -= lr * (b1 * m[e] + (1.0 - b1) * g).signum();
                m[e] = b2 * m[e] + (1.0 - b2) * g;
            },
        );
    }
}

/// The numbers are PyTorch 2.15's, in f64, after four steps at rate 0.1 and weight decay 0.2 with `clip_grad_norm_` at 1.5.
#[test]
fn four_steps_are_those_of_pytorch() -> Result<()> {
    let gpu = gpu();
    let check = |name: &str, make: &dyn Fn(Vec<Group>) -> Box<dyn Optimizer>, want: [f64; 4]| -> Result<()> {
        let w = Tensor::from_slice(gpu, &[1f32, -2.0, 0.5, 0.0], [4]).requires_grad();
        let mut optimizer = make(vec![Group::new([("w", &w)]).weight_decay(0.2)]);
        for g in [
            [0.5f32, -1.0, 2.0, 0.25],
            [-0.25, 0.5, 1.0, -0.5],
            [1.0, 1.0, -1.0, 0.125],
            [0.0, -2.0, 0.5, 0.75],
        ] {
            let c = Tensor::from_slice(gpu, &g, [4]);
            optimizer.step(&w.mul(&c).sum_all().backward()?, 0.1)?;
        }
        within(name, &download(&w), &want, |_| 1e-6);
        Ok(())
    };
    let clip = Some(1.5);
    let betas = (0.8, 0.9);
    check(
        "adam",
        &|groups| {
            Box::new(Adam::new(gpu, groups, AdamConfig::default().betas(betas).eps(1e-3).clip(clip)).unwrap())
        },
        [0.700019962, -1.78390109, 0.224845353, -0.047057052],
    )?;
    check(
        "adamw",
        &|groups| {
            Box::new(
                AdamW::new(gpu, groups, AdamWConfig::default().betas(betas).eps(1e-3).clip(clip)).unwrap(),
            )
        },
        [0.716642381, -1.77288061, 0.207803192, -0.0495985692],
    )?;
    for (centered, momentum, want) in [
        (false, 0.0, [0.626349613, -1.75513123, 0.216845901, -0.1996933]),
        (false, 0.5, [0.393579066, -1.66141372, 0.00306358969, -0.237354721]),
        (true, 0.0, [0.558798646, -1.70718837, 0.147425798, -0.218233127]),
        (true, 0.5, [0.28545402, -1.59118597, -0.120494427, -0.267656905]),
    ] {
        let config =
            RmsPropConfig::default().alpha(0.75).eps(1e-3).clip(clip).centered(centered).momentum(momentum);
        check("rmsprop", &|groups| Box::new(RmsProp::new(gpu, groups, config.clone()).unwrap()), want)?;
    }
    check(
        "sgd",
        &|groups| {
            Box::new(
                Sgd::new(gpu, groups, SgdConfig::default().momentum(0.5).nesterov(true).clip(clip)).unwrap(),
            )
        },
        [0.704569771, -1.64583325, 0.121232853, -0.0355371667],
    )
}

type Make = fn(&Gpu, Vec<Group>) -> Result<Box<dyn Optimizer>>;

/// Every optimizer, each in its form with the most state.
fn all() -> [(&'static str, Make); 5] {
    [
        ("sgd", |gpu, groups| Ok(Box::new(Sgd::new(gpu, groups, SgdConfig::default().momentum(0.9))?))),
        ("adam", |gpu, groups| Ok(Box::new(Adam::new(gpu, groups, AdamConfig::default())?))),
        ("adamw", |gpu, groups| {
            Ok(Box::new(AdamW::new(gpu, groups, AdamWConfig::default().clip(Some(1.0)))?))
        }),
        ("rmsprop", |gpu, groups| {
            Ok(Box::new(RmsProp::new(gpu, groups, RmsPropConfig::default().momentum(0.9).centered(true))?))
        }),
        ("lion", |gpu, groups| Ok(Box::new(Lion::new(gpu, groups, LionConfig::default())?))),
    ]
}

/// Two parameters in two groups, and their optimizer.
struct Run {
    leaves: [Tensor; 2],
    optimizer: Box<dyn Optimizer>,
}

impl Run {
    fn new(gpu: &Gpu, make: Make, start: [&[f32]; 2]) -> Result<Run> {
        let leaves = start.map(|x| Tensor::from_slice(gpu, x, [x.len()]).requires_grad());
        let [a, b] = [("a", &leaves[0]), ("b", &leaves[1])].map(|leaf| Group::new([leaf]));
        let optimizer = make(gpu, vec![a.weight_decay(0.1), b.lr_scale(0.5)])?;
        Ok(Run { leaves, optimizer })
    }

    fn step(&mut self, x: &Tensor) -> Result<()> {
        let [a, b] = &self.leaves;
        let loss = a.mul(x).sum_all().square().add(&b.mul(x).sum_all());
        self.optimizer.step(&loss.backward()?, 0.01).map(drop)
    }

    fn values(&self) -> Result<[Vec<f32>; 2]> {
        Ok([self.leaves[0].to_vec()?, self.leaves[1].to_vec()?])
    }

    fn bits(&self) -> Result<Vec<u32>> {
        let state = self.optimizer.state_dict()?.into_iter().flat_map(|(_, _, data)| data);
        Ok(self.values()?.into_iter().flatten().chain(state).map(f32::to_bits).collect())
    }
}

#[test]
fn replays_and_saved_states_give_the_same_bits() -> Result<()> {
    let gpu = gpu();
    let start: Vec<f32> = (0..67).map(|i| (i as f32 * 0.37).sin()).collect();
    let inputs: Vec<Tensor> = (0..6)
        .map(|s| {
            Tensor::from_slice(
                gpu,
                &(0..67).map(|i| (i as f32 + 71.0 * s as f32).cos()).collect::<Vec<_>>(),
                [67],
            )
        })
        .collect();
    for (name, make) in all() {
        let mut code = Run::new(gpu, make, [&start, &start])?;
        assert_eq!(code.optimizer.name(), name);
        let mut saved = None;
        for (s, x) in inputs.iter().enumerate() {
            if s == 3 {
                saved = Some((code.values()?, code.optimizer.steps(), code.optimizer.state_dict()?));
            }
            code.step(x)?;
        }
        let mut replayed = Run::new(gpu, make, [&start, &start])?;
        let mut step = Step::record(gpu, &[&inputs[0]], |x| replayed.step(&x[0]).map(|()| vec![]))?;
        for x in &inputs[1..] {
            step.run(&[x])?;
        }
        assert_eq!(replayed.bits()?, code.bits()?, "{name}: replays");
        assert_eq!((replayed.optimizer.steps(), replayed.optimizer.skipped()?), (6, 0), "{name}");
        let ([a, b], steps, state) = saved.expect("the third step");
        let mut resumed = Run::new(gpu, make, [&a, &b])?;
        assert_ne!(
            state.iter().filter_map(|(_, _, data)| data.first()).sum::<f32>(),
            0.0,
            "{name}: it has a state"
        );
        assert_eq!(
            state.iter().map(|(_, _, data)| 4 * data.len()).sum::<usize>(),
            resumed.optimizer.state_bytes()
        );
        resumed.optimizer.load_state(steps, &state)?;
        for x in &inputs[3..] {
            resumed.step(x)?;
        }
        assert_eq!(
            (resumed.bits()?, resumed.optimizer.steps()),
            (code.bits()?, 6),
            "{name}: saved and loaded"
        );
        // What is not finite changes nothing, and is counted and named.
        code.step(&inputs[0].scale(f32::INFINITY))?;
        assert_eq!(code.bits()?[..134], resumed.bits()?[..134], "{name}: infinite");
        assert_eq!((code.optimizer.skipped()?, code.optimizer.watch()?.events()?.len()), (1, 1), "{name}");
    }
    Ok(())
}

#[test]
fn settings_out_of_range_are_named() {
    let gpu = gpu();
    let w = Tensor::ones(gpu, [2]).requires_grad();
    let groups = || vec![Group::new([("w", &w)])];
    let wrong = |made: Result<()>, words: &str| {
        let message = made.expect_err("out of range").to_string();
        assert!(message.contains(words), "{message}");
    };
    let rmsprop = |config| RmsProp::new(gpu, groups(), config).map(drop);
    wrong(rmsprop(RmsPropConfig::default().alpha(1.0)), "rmsprop: alpha is 1");
    wrong(rmsprop(RmsPropConfig::default().momentum(-0.1)), "rmsprop: momentum is -0.1");
    wrong(rmsprop(RmsPropConfig::default().eps(f32::NAN)), "rmsprop: eps is NaN");
    wrong(Lion::new(gpu, groups(), LionConfig::default().betas((0.9, 1.5))).map(drop), "lion: beta2 is 1.5");
    wrong(Lion::new(gpu, groups(), LionConfig::default().clip(Some(0.0))).map(drop), "lion: clip is 0");
    wrong(Adam::new(gpu, groups(), AdamConfig::default().lr(-1.0)).map(drop), "adam: lr is -1");
    // None of them has taken the parameter.
    let optimizer = Lion::new(gpu, groups(), LionConfig::default()).unwrap();
    assert_eq!((optimizer.lr(), optimizer.config()), (1e-4, &LionConfig::default()));
}

#[test]
fn groups_are_made_by_tests_on_names() -> Result<()> {
    let gpu = gpu();
    let [w, b] = [&[2usize, 3][..], &[2]].map(|shape| Tensor::ones(gpu, shape));
    let params = [("head.w", &w), ("head.b", &b), ("neck.w", &w), ("neck.b", &b)];
    let names = |group: &Group| group.params.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    let [matrices, rest] = Group::split(params, |_, p| p.shape().len() > 1);
    assert_eq!(
        (names(&matrices), names(&rest)),
        (vec!["head.w".into(), "neck.w".into()], vec!["head.b".into(), "neck.b".into()])
    );
    let neck = |name: &str, _: &Tensor| name.starts_with("neck");
    let [first, second] = Group::matching(params, [&neck, &|_, p| p.shape().len() == 2 || p.count() == 2])?;
    assert_eq!(
        (names(&first), names(&second)),
        (vec!["neck.w".into(), "neck.b".into()], vec!["head.w".into(), "head.b".into()])
    );
    assert_eq!((first.weight_decay, first.lr_scale), (0.0, 1.0));
    let fails = |made: Result<()>| made.expect_err("refused").to_string();
    let message = fails(Group::matching(params, [&neck, &|_, p| p.count() == 2]).map(drop));
    assert!(message.contains("no test holds for `head.w` [2, 3]"), "{message}");
    let message = fails(Group::matching(params, [&|_, _| true, &neck]).map(drop));
    assert!(message.contains("test 1 got no parameter"), "{message}");
    let message = fails(Group::matching([("w", &w), ("w", &b)], [&|_, _| true]).map(drop));
    assert!(message.contains("two parameters are named `w`"), "{message}");
    Ok(())
}
