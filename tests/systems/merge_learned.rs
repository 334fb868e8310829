//! Merging by data and by bases: the defining property of each method, on small problems with known solutions.

use crate::support::folder::Folder;
use crate::support::{download, gpu, matching_vectors, within};
use std::collections::BTreeMap;
use tiebeam::merge::Weights;
use tiebeam::merge::learned::{Atlas, fisher_diagonal};
use tiebeam::merge::methods::{average, fisher};
use tiebeam::merge::pareto::{Link, Search, Surrogate, front, hypervolume, samples};
use tiebeam::merge::pleas::{Split, flops_factor, least_squares, merge_bias, merge_layer, targets};
use tiebeam::merge::reversible::Reversible;
use tiebeam::merge::signature::{Patched, Signature};
use tiebeam::models::network::Network;
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::{Rng, Tensor};

fn normal(shape: &[usize], rng: &mut Rng) -> Tensor {
    Tensor::randn(gpu(), shape, rng).contiguous()
}

fn squared(x: &Tensor) -> f64 {
    download(x).iter().map(|v| v * v).sum()
}

#[test]
fn reversible_errors_fall_to_nothing() {
    let mut rng = Rng::new(5);
    // Rows in which the models have much in common, and one row in which all are 0.
    let common = normal(&[7, 30], &mut rng);
    let mask = Tensor::from_slice(gpu(), &[1.0f32, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0], [7, 1]);
    let models: Vec<Tensor> =
        (0..4).map(|_| common.add(&normal(&[7, 30], &mut rng).scale(0.3)).mul(&mask).contiguous()).collect();
    let whole: f64 = models.iter().map(squared).sum();
    let mut last = f64::INFINITY;
    for p in 1..=4 {
        let kept = Reversible::new(&models, p).unwrap();
        assert_eq!(kept.stored(), 7 * (p * 30 + 4 * p));
        let error: f64 = models.iter().enumerate().map(|(i, m)| squared(&m.sub(&kept.model(i)))).sum();
        // The least error with p vectors per row is the sum of the other eigenvalues.
        let rest: f64 = (0..7)
            .map(|row| {
                let rows: Vec<Vec<f64>> =
                    models.iter().map(|m| download(&m.slice(0, row..row + 1))).collect();
                let dot = |i: usize, j: usize| rows[i].iter().zip(&rows[j]).map(|(a, b)| a * b).sum();
                let gram: Vec<f64> = (0..16).map(|k| dot(k / 4, k % 4)).collect();
                tiebeam::linalg::symmetric_eigen(&gram, 4).0[p..].iter().sum::<f64>()
            })
            .sum();
        assert!((error - rest).abs() < 1e-5 * whole, "{p}: {error}, at best {rest}");
        assert!(error < last, "{p}: {error} after {last}");
        last = error;
    }
    assert!(last < 1e-10 * whole, "all four: {last} of {whole}");
}

#[test]
fn fisher_of_a_softmax_regression() {
    let mut rng = Rng::new(8);
    let (classes, width, samples) = (4, 5, 6);
    let x = normal(&[samples, width], &mut rng);
    let leaves: BTreeMap<String, Tensor> = [("w", vec![classes, width]), ("b", vec![classes])]
        .map(|(n, shape)| (n.to_string(), normal(&shape, &mut rng).requires_grad()))
        .into();
    let logits = |s: usize| {
        let x = x.slice(0, s..s + 1);
        x.matmul(&leaves["w"].t()).add(&leaves["b"]).reshape([classes])
    };
    let f = fisher_diagonal(&leaves, samples, logits).unwrap();
    // F_w[k, j] = mean x_j^2 p_k (1 - p_k)
    let [x64, w64, b64] = [&x, &leaves["w"], &leaves["b"]].map(download);
    let (mut of_w, mut of_b) = (vec![0.0; classes * width], vec![0.0; classes]);
    for s in 0..samples {
        let logit =
            |k: usize| b64[k] + (0..width).map(|j| w64[k * width + j] * x64[s * width + j]).sum::<f64>();
        let sum: f64 = (0..classes).map(|k| logit(k).exp()).sum();
        for k in 0..classes {
            let p = logit(k).exp() / sum;
            let spread = p * (1.0 - p) / samples as f64;
            of_b[k] += spread;
            (0..width).for_each(|j| of_w[k * width + j] += spread * x64[s * width + j].powi(2));
        }
    }
    for (name, want) in [("w", of_w), ("b", of_b)] {
        within(name, &download(&f[name]), &want, |i| 1e-5 * want[i] + 1e-7);
    }
    // Equal diagonals give the average. Where one model's diagonal is 0, the result is the other's weights.
    let models = [normal(&[6], &mut rng), normal(&[6], &mut rng)];
    let same = normal(&[6], &mut rng).square().affine(1.0, 0.1);
    let merged = fisher(&models, &[same.clone(), same.clone()], &[0.5, 0.5], 1e-6);
    within("equal", &download(&merged), &download(&average(&models)), |_| 1e-6);
    let nothing = Tensor::zeros(gpu(), [6]);
    let merged = fisher(&models, &[same, nothing.clone()], &[0.5, 0.5], 1e-6);
    within("one", &download(&merged), &download(&models[0]), |_| 1e-6);
    let merged = fisher(&models, &[nothing.clone(), nothing], &[0.5, 0.5], 1e-6);
    within("none", &download(&merged), &download(&models[0]), |_| 1e-6);
}

/// Computes the squared distance of weights to a target.
fn loss(weights: &BTreeMap<String, Tensor>, target: &BTreeMap<String, Tensor>) -> Tensor {
    weights
        .iter()
        .map(|(name, w)| w.sub(&target[name]).square().sum_all())
        .reduce(|a, b| a.add(&b))
        .expect("there are tensors")
}

/// Trains one leaf of coefficients and returns the loss.
fn trained(atlas: &Atlas, leaf: &Tensor, target: &BTreeMap<String, Tensor>) -> f64 {
    let group = Group::new([("c", leaf)]);
    let mut optimizer = AdamW::new(gpu(), vec![group], AdamWConfig::default()).unwrap();
    for _ in 0..150 {
        let grads = loss(&atlas.weights_under(leaf), target).backward().unwrap();
        optimizer.step(&grads, 0.05).unwrap();
    }
    f64::from(loss(&atlas.weights_under(leaf), target).item().unwrap())
}

#[test]
fn atlas_learns_more_from_more_coefficients() {
    let mut rng = Rng::new(2);
    let mut set = || -> BTreeMap<String, Tensor> {
        [("a", vec![6, 5]), ("b", vec![9])].map(|(n, s)| (n.to_string(), normal(&s, &mut rng))).into()
    };
    let (base, models) = (set(), [set(), set()]);
    let taus: Vec<BTreeMap<String, Tensor>> =
        models.iter().map(|m| m.iter().map(|(n, x)| (n.clone(), x.sub(&base[n]))).collect()).collect();
    // The target of each tensor has its own coefficients of the task vectors.
    let want = |n: &str| if n == "a" { [0.7, -0.2] } else { [0.1, 0.5] };
    let target: BTreeMap<String, Tensor> = base
        .iter()
        .map(|(n, b)| {
            let [c, d] = want(n);
            (n.clone(), b.add(&taus[0][n].scale(c)).add(&taus[1][n].scale(d)).contiguous())
        })
        .collect();
    let atlas = Atlas::new(gpu(), &base, &models, 1, &mut Rng::new(1));
    // Coefficients start at 0, where the model is the base.
    for (name, w) in atlas.weights() {
        assert_eq!(download(&w), download(&base[&name]));
    }
    // dL/dc[i, b] = <dL/dtheta_b, tau_ib>
    let grads = loss(&atlas.weights(), &target).backward().unwrap();
    let names: Vec<&String> = base.keys().collect();
    let hand: Vec<f64> = (0..4)
        .map(|k| {
            let (tau, name) = (&taus[k / 2], names[k % 2]);
            let d = base[name].sub(&target[name]).scale(2.0).mul(&tau[name]);
            download(&d).iter().sum()
        })
        .collect();
    within("gradient", &download(grads.get(atlas.coefficients()).unwrap()), &hand, |i| {
        1e-5 * hand[i].abs() + 1e-4
    });

    let fixed = (0..21).map(|i| Tensor::full(gpu(), [1, 1, 1], i as f32 * 0.05));
    let fixed = fixed.map(|c| f64::from(loss(&atlas.weights_under(&c), &target).item().unwrap()));
    let fixed = fixed.fold(f64::INFINITY, f64::min);
    let tasks = Tensor::zeros(gpu(), [2, 1, 1]).contiguous().requires_grad();
    let (tasks, blocks) = (trained(&atlas, &tasks, &target), trained(&atlas, atlas.coefficients(), &target));
    assert!(blocks < 1e-3 && blocks < 0.5 * tasks && tasks <= fixed, "{blocks} {tasks} {fixed}");

    // With coefficients for parts of tensors, a target is reached that coefficients for whole tensors cannot reach.
    let parts = Atlas::new(gpu(), &base, &models, 3, &mut Rng::new(1));
    let ramp: Vec<f32> = (0..12).map(|i| i as f32 / 10.0 - 0.5).collect();
    let mixed = parts.weights_under(&Tensor::from_slice(gpu(), &ramp, [2, 2, 3]));
    let mixed: BTreeMap<String, Tensor> = mixed.into_iter().map(|(n, w)| (n, w.contiguous())).collect();
    let fresh = Atlas::new(gpu(), &base, &models, 1, &mut Rng::new(1));
    let [divided, blocks] = [&parts, &fresh].map(|atlas| trained(atlas, atlas.coefficients(), &mixed));
    assert!(divided < 1e-3 && divided < 0.1 * blocks, "{divided} {blocks}");
}

/// Two tasks whose metrics have maxima at different places, and a term that is not quadratic. 30 evaluations find nearly all of
/// the front that 441 on a grid find.
#[test]
fn surrogates_find_the_front() {
    let task = |c: &[f64], at: [f64; 2], turn: f64| {
        let (x, y) = (c[0] - at[0], c[1] - at[1]);
        1.0 / (1.0 + (-(2.0 - x * x - y * y - turn * x * y + 0.02 * (3.0 * x).sin())).exp())
    };
    let metrics = |c: &[f64]| vec![task(c, [1.0, 0.2], 0.3), task(c, [0.1, 0.9], -0.2)];
    let bounds = [0.0, 1.0];
    let points = samples(2, 30, bounds, &mut Rng::new(4));
    let measured: Vec<Vec<f64>> = points.iter().map(|c| metrics(c)).collect();
    let surrogates: Vec<Surrogate> = (0..2)
        .map(|t| {
            let values: Vec<f64> = measured.iter().map(|m| m[t]).collect();
            let fit = Surrogate::fit(&points, &values, Link::Sigmoid).unwrap();
            let r2 = fit.r_squared(&points, &values);
            assert!(r2 > 0.9, "task {t}: {r2}");
            fit
        })
        .collect();
    let search = Search::default().bounds(bounds).population(40).generations(40);
    let predicted = |c: &[f64]| surrogates.iter().map(|s| s.value(c)).collect::<Vec<f64>>();
    let found = front(&predicted, 2, &search, &mut Rng::new(9), &mut |_| Ok(())).unwrap();
    assert!(found.len() > 10, "{} points", found.len());
    let areas = |all: &mut dyn Iterator<Item = Vec<f64>>| {
        let all: Vec<[f64; 2]> = all.map(|c| [metrics(&c)[0], metrics(&c)[1]]).collect();
        hypervolume(&all, [0.5, 0.5])
    };
    let ours = areas(&mut found.iter().map(|p| p.coefficients.clone()));
    let grid = areas(&mut (0..441).map(|i| vec![(i % 21) as f64 / 20.0, (i / 21) as f64 / 20.0]));
    assert!(ours >= 0.95 * grid, "{ours} of {grid}");
    // The same seed gives the same front.
    assert_eq!(found, front(&predicted, 2, &search, &mut Rng::new(9), &mut |_| Ok(())).unwrap());
}

/// Creates a network of three layers, `6 -> 8 -> 8 -> 3`.
fn network(rng: &mut Rng) -> BTreeMap<String, Tensor> {
    let sizes = [6, 8, 8, 3];
    let mut all = BTreeMap::new();
    for i in 0..3 {
        all.insert(format!("fc{i}.weight"), normal(&[sizes[i + 1], sizes[i]], rng).scale(0.4).contiguous());
        all.insert(format!("fc{i}.bias"), normal(&[sizes[i + 1]], rng).scale(0.1).contiguous());
    }
    all
}

#[test]
fn pleas_between_the_average_and_both_models() {
    let mut rng = Rng::new(21);
    let (a, b) = (network(&mut rng), network(&mut rng));
    let x = normal(&[64, 6], &mut rng);
    let outputs = |w: &BTreeMap<String, Tensor>| Network::mlp(w).unwrap().activations(gpu(), w, &x).unwrap();
    let merged = |ratio: f64| {
        let agreement: Vec<f64> = (0..8).map(|i| ((i * 5) % 8) as f64).collect();
        let hidden = Split::by_agreement(&agreement, ratio);
        let splits = [Split::whole(6), hidden.clone(), hidden.clone(), Split::whole(3)];
        let mut all = BTreeMap::new();
        for i in 0..3 {
            let [weight, bias] = ["weight", "bias"].map(|kind| format!("fc{i}.{kind}"));
            let w = merge_layer(&a[&weight], &b[&weight], &splits[i + 1], &splits[i]).contiguous();
            assert_eq!(w.shape()[..], [splits[i + 1].width(), splits[i].width()]);
            all.insert(bias.clone(), merge_bias(&a[&bias], &b[&bias], &splits[i + 1]).contiguous());
            all.insert(weight, w);
        }
        (all, splits)
    };
    // With nothing kept apart, the result is the average.
    let (none, splits) = merged(0.0);
    for (name, w) in &none {
        within(name, &download(w), &download(&average(&[a[name].clone(), b[name].clone()])), |_| 1e-6);
    }
    assert_eq!(flops_factor(&splits[2], &splits[1]), 1.0);
    // With everything kept apart, it is both models side by side, with averaged logits.
    let (all, splits) = merged(1.0);
    assert_eq!((splits[1].width(), flops_factor(&splits[2], &splits[1])), (16, 2.0));
    let [la, lb] = [&a, &b].map(|w| outputs(w).pop().unwrap());
    let mean = download(&la.add(&lb).scale(0.5));
    within("ensemble", &download(outputs(&all).last().unwrap()), &mean, |_| 1e-5);
    // With half kept apart, the units that agree are merged.
    let (_, splits) = merged(0.5);
    assert_eq!((&splits[1].merged[..], &splits[1].apart[..]), (&[1, 3, 4, 6][..], &[0, 2, 5, 7][..]));
    let within_budget = Split::within(&[vec![4.0, 2.0, 1.0], vec![1.0, 0.9, 0.1, 0.8]], 3.0 / 7.0);
    assert_eq!((&within_budget[0].apart[..], &within_budget[1].apart[..]), (&[1, 2][..], &[2][..]));
    // Least squares is nearer to both models' outputs than the average is, in every layer.
    let [ya, yb] = [&a, &b].map(outputs);
    for i in 1..3 {
        let split = Split::whole(8);
        let z = targets(&ya[i - 1], &yb[i - 1], &split);
        let name = format!("fc{i}.weight");
        let y = |inner: &[Tensor], w: &BTreeMap<String, Tensor>| inner[i - 1].matmul(&w[&name].t());
        let y = y(&ya, &a).add(&y(&yb, &b)).scale(0.5);
        let best = least_squares(&z, &y, 1e-4).unwrap();
        let error = |w: &Tensor| squared(&z.matmul(&w.t()).sub(&y));
        assert!(error(&best) < 0.9 * error(&none[&name]), "{i}: {} {}", error(&best), error(&none[&name]));
        // A changed solution is worse.
        let moved = best.add(&normal(&[best.shape()[0], best.shape()[1]], &mut rng).scale(1e-2));
        assert!(error(&best) < error(&moved));
    }
    // Inputs of 0 do not determine the weights.
    assert!(least_squares(&Tensor::zeros(gpu(), [4, 2]), &Tensor::zeros(gpu(), [4, 1]), 0.0).is_err());
}

#[test]
fn signatures_add_and_come_off() {
    let mut rng = Rng::new(31);
    let clean = network(&mut rng);
    let change = |rng: &mut Rng| -> BTreeMap<String, Tensor> {
        clean
            .iter()
            .map(|(n, w)| (n.clone(), w.scale(1.1).add(&normal(w.shape(), rng).scale(0.05)).contiguous()))
            .collect()
    };
    let (robust, other) = (change(&mut rng), change(&mut rng));
    let shallow = |name: &str| name.starts_with("fc0");
    let exact: BTreeMap<String, Vec<f64>> = clean
        .iter()
        .map(|(name, c)| {
            let [c, r] = [c, &robust[name]].map(download);
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let along = dot(&c, &r) / dot(&c, &c);
            (name.clone(), c.iter().zip(&r).map(|(c, r)| r - along * c).collect())
        })
        .collect();
    for bits in [2u32, 3, 5, 8] {
        let signature = Signature::extract(gpu(), &clean, &robust, shallow, bits).unwrap();
        assert!(signature.tensor(gpu(), "fc1.weight").is_none());
        for name in ["fc0.weight", "fc0.bias"] {
            let got = download(&signature.tensor(gpu(), name).unwrap());
            let want = &exact[name];
            let row = want.len() / if name.ends_with("bias") { 1 } else { 8 };
            let most = |i: usize| want[i / row * row..][..row].iter().fold(0.0f64, |m, x| m.max(x.abs()));
            let step = |i: usize| most(i) / f64::from((1 << (bits - 1)) - 1);
            within(&format!("{name}, {bits} bits"), &got, want, |i| 0.5001 * step(i) + 1e-7);
        }
        assert_eq!(signature.bytes(), (48 * bits as usize).div_ceil(8) + 8 * 4 + bits as usize + 4);
        let folder = Folder::new("signature");
        let path = folder.join("signature");
        signature.save(&path).unwrap();
        assert_eq!(Signature::load(&path).unwrap(), signature);
    }
    let all = |_: &str| true;
    let [first, second] = [&robust, &other].map(|r| Signature::extract(gpu(), &clean, r, all, 8).unwrap());
    let patched = Patched { weights: &clean, signatures: vec![(&first, 0.5), (&second, 2.0)] };
    let bare = Patched { weights: &clean, signatures: Vec::new() };
    for (name, c) in &clean {
        let sum = c
            .add(&first.tensor(gpu(), name).unwrap().scale(0.5))
            .add(&second.tensor(gpu(), name).unwrap().scale(2.0));
        assert_eq!(download(&patched.read(gpu(), name).unwrap()), download(&sum), "{name}");
        assert_eq!(download(&bare.read(gpu(), name).unwrap()), download(c), "{name}");
    }
    // A signature of another model is an error, and so is a file that is not a signature.
    let mut wide = clean.clone();
    wide.insert("fc0.bias".into(), Tensor::zeros(gpu(), [9]));
    assert!(Patched { weights: &wide, signatures: vec![(&first, 1.0)] }.read(gpu(), "fc0.bias").is_err());
    assert!(Signature::load(matching_vectors("pleas_ls.safetensors")).is_err());
}
