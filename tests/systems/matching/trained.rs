//! The effect of matching on the losses between two or three networks of the reference vectors, trained from different seeds.

use super::*;
use std::ops::ControlFlow;
use tiebeam::merge::{
    Barrier, Evaluation, LossPath, Mean, StraightThroughOptions, VisitOrder, match_many, match_weights_with,
    repair, singular_alignment, straight_through,
};
use tiebeam::models::network::Network;
use tiebeam::store::{File, FileDType};

/// Reads a trained network of the reference vectors; see `tests/vectors/matching/README.md`.
fn trained(file: &str, prefix: &str) -> Model {
    let file = File::open(matching_vectors(file)).unwrap();
    let own = |full: &str| Some((full.strip_prefix(prefix)?.to_string(), full.to_string()));
    let floats: Vec<_> =
        file.names().filter(|n| file.info(n).unwrap().dtype == FileDType::F32).filter_map(own).collect();
    let read = |(name, full): (String, String)| {
        let shape = &file.info(&full).unwrap().shape;
        (name, Tensor::from_slice(gpu(), &file.tensor_f32(&full).unwrap(), &shape[..]))
    };
    floats.into_iter().map(read).collect()
}

fn digits() -> (Tensor, Vec<u32>) {
    let file = File::open(matching_vectors("wm_mlp.safetensors")).unwrap();
    let shape = &file.info("x").unwrap().shape;
    (Tensor::from_slice(gpu(), &file.tensor_f32("x").unwrap(), &shape[..]), file.tensor_u32("y").unwrap())
}

#[test]
fn the_objective_only_rises_and_the_end_is_a_fixed_point() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let spec = mlp_spec(&a);
    let mut last = f64::NEG_INFINITY;
    let mut whole = None;
    for stop in 0.. {
        let mut seen = 0;
        let matching = match_weights_with(gpu(), &spec, &a, &b, &MatchOptions::default(), &mut |_| {
            seen += 1;
            if seen > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        assert!(matching.objective >= last * (1.0 - 1e-7), "{} after {last}", matching.objective);
        last = matching.objective;
        let done = seen <= stop;
        whole = Some(matching);
        if done {
            break;
        }
    }
    let whole = whole.expect("the loop ran");
    assert!(whole.visits.last().is_some_and(|visit| !visit.accepted));
    let again = MatchOptions::default().start(Some(whole.permutation.clone()));
    let next = found(&spec, &a, &b, &again);
    assert_eq!(next.permutation, whole.permutation);
    assert_eq!(next.sweeps, 1);
    // Matching a matched model again moves nothing.
    let moved: Model = noisy(&whole.permuted(&b), 0.0, 0);
    assert_eq!(found(&spec, &a, &moved, &MatchOptions::default()).permutation.moved(), 0);
    // The same settings give the same result, however many tensors stay on the device.
    let small = MatchOptions::default().cache_bytes(0);
    let twice = found(&spec, &a, &b, &small);
    assert_eq!((twice.permutation, twice.objective), (whole.permutation, whole.objective));
}

#[test]
fn orders_seeds_and_runs() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let spec = mlp_spec(&a);
    let one = |options: MatchOptions| found(&spec, &a, &b, &options);
    let given = one(MatchOptions::default().order(VisitOrder::Given));
    let groups: Vec<&str> = given.visits.iter().map(|visit| visit.group.as_str()).collect();
    assert!(groups.chunks(2).all(|pair| pair == ["P0", "P1"]), "{groups:?}");
    let first = one(MatchOptions::default());
    let many = one(MatchOptions::default().runs(8));
    assert!(many.objective >= first.objective);
    let orders: std::collections::BTreeSet<Vec<String>> = (0..8)
        .map(|seed| one(MatchOptions::default().seed(seed)))
        .map(|m| m.visits.iter().take(2).map(|visit| visit.group.clone()).collect())
        .collect();
    assert_eq!(orders.len(), 2, "eight seeds begin with either group");
    assert!(match_weights(gpu(), &spec, &a, &b, &MatchOptions::default().runs(0)).is_err());
}

fn evaluate(weights: &dyn Weights) -> tiebeam::Result<Evaluation> {
    let (x, y) = digits();
    Evaluation::of(&Network::mlp(weights)?.logits(gpu(), weights, &x)?, &y)
}

#[test]
fn barriers_fall_by_matching_and_singular_vectors_turn() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let spec = mlp_spec(&a);
    let matching = found(&spec, &a, &b, &MatchOptions::default());
    let permuted = matching.permuted(&b);
    let [naive, matched] =
        [&b as &dyn Weights, &permuted].map(|end| LossPath::between(&a, end, 11, evaluate).unwrap());
    let [n, m] = [&naive, &matched].map(|path| Barrier::of(&path.losses()));
    assert!(m.above_mean < 0.3 * n.above_mean && m.above_line <= n.above_line, "{n:?} {m:?}");
    let tempered = Barrier::of(&naive.tempered_losses());
    assert!(tempered.above_mean < n.above_mean, "{tempered:?} {n:?}");
    assert!(naive.points.iter().all(|point| point.tempered_loss <= point.loss + 1e-9));
    assert!((naive.points[0].loss - matched.points[0].loss).abs() < 1e-6);
    assert!(
        (naive.points[10].loss - matched.points[10].loss).abs() < 1e-5,
        "a permuted model is the same model"
    );
    let tensors = ["fc0.weight", "fc1.weight", "fc2.weight"];
    let r = |end: &dyn Weights| singular_alignment(gpu(), [&a, end], &tensors, 0.3).unwrap();
    assert!((r(&a) - 1.0).abs() < 1e-5);
    let [before, after] = [r(&b), r(&permuted)];
    assert!(before.abs() < 0.2 && after > before + 0.1, "{before} {after}");
    assert!(singular_alignment(gpu(), [&a, &b], &tensors, 1.5).is_err());
}

#[test]
fn straight_through_is_no_worse_at_the_midpoint() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let spec = mlp_spec(&a);
    let (x, y) = digits();
    let targets = Tensor::from_slice(gpu(), &y, [y.len()]);
    let options = StraightThroughOptions::default().steps(12);
    let found = straight_through(gpu(), &spec, &a, &b, &options, &mut |weights, _| {
        let mut h = x.clone();
        for layer in ["fc0", "fc1", "fc2"] {
            h = h.matmul(&weights[&format!("{layer}.weight")].t()).add(&weights[&format!("{layer}.bias")]);
            h = if layer == "fc2" { h } else { h.relu() };
        }
        Ok(h.cross_entropy(&targets, None))
    })
    .unwrap();
    // The first step is plain weight matching.
    assert!(found.losses.len() == 12 && found.losses[found.best] <= found.losses[0]);
    let middle = found.permutation.permuted(&b);
    let loss = evaluate(&Mean(vec![&a, &middle])).unwrap().loss;
    assert!((loss - found.losses[found.best]).abs() < 1e-4, "{loss} {:?}", found.losses);
    // Only a copy is trained, and the model itself is unchanged.
    assert_eq!(most_apart(&a["fc0.weight"], &trained("wm_mlp.safetensors", "a.")["fc0.weight"]), 0.0);
}

#[test]
fn many_models_meet() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let c = trained("wm_mlp3.safetensors", "c.");
    let spec = mlp_spec(&a);
    let models: [&dyn Weights; 3] = [&a, &b, &c];
    let many = match_many(gpu(), &spec, &models, &MatchOptions::default()).unwrap();
    assert_eq!(many.permutations[0].moved(), 0);
    assert!(many.objective[1] > 2.0 * many.objective[0].abs(), "{:?}", many.objective);
    let placed: Vec<_> = many.permutations.iter().zip(models).map(|(p, model)| p.permuted(model)).collect();
    let [naive, merged] = [
        evaluate(&Mean(models.to_vec())).unwrap(),
        evaluate(&Mean(placed.iter().map(|p| p as &dyn Weights).collect())).unwrap(),
    ];
    assert!(merged.loss < 0.3 * naive.loss && merged.accuracy > naive.accuracy + 0.3, "{naive:?} {merged:?}");
    // Permuted copies of one model are aligned exactly.
    let away = planted(&spec, &a, 2);
    let copies: [&dyn Weights; 3] = [&a, &away.permuted(&a), &a];
    let many = match_many(gpu(), &spec, &copies, &MatchOptions::default()).unwrap();
    assert_eq!(many.permutations[1], away.inverse());
    assert!(match_many(gpu(), &spec, &models[..1], &MatchOptions::default()).is_err());
}

/// Computes the outputs of a layer before its ReLU.
fn before_relu(weights: &dyn Weights, layer: &str, x: &Tensor) -> Tensor {
    let mut h = x.clone();
    for name in ["fc0", "fc1", "fc2"] {
        let read = |part: &str| weights.read(gpu(), &format!("{name}.{part}")).unwrap();
        h = h.matmul(&read("weight").t()).add(&read("bias"));
        if name == layer {
            break;
        }
        h = h.relu();
    }
    h
}

#[test]
fn repair_restores_means_and_deviations() {
    let [a, b] = ["a.", "b."].map(|prefix| trained("wm_mlp.safetensors", prefix));
    let spec = mlp_spec(&a);
    let matching = found(&spec, &a, &b, &MatchOptions::default());
    let permuted = matching.permuted(&b);
    let merged = noisy(&Mean(vec![&a, &permuted]), 0.0, 0);
    let x = digits().0;
    let layers = ["fc0", "fc1"];
    let repaired =
        repair(gpu(), [&a, &permuted], 0.5, &merged, &layers, &mut |w, layer| Ok(before_relu(w, layer, &x)))
            .unwrap();
    for layer in layers {
        let moments = |w: &dyn Weights| {
            let h = before_relu(w, layer, &x);
            let deviation = h.sub(&h.mean(0)).square().mean(0).sqrt();
            [download(&h.mean(0)), download(&deviation)]
        };
        let [of_a, of_b, got] = [moments(&a), moments(&permuted), moments(&repaired)];
        for part in 0..2 {
            for (i, got) in got[part].iter().enumerate() {
                let want = (of_a[part][i] + of_b[part][i]) / 2.0;
                assert!((got - want).abs() < 1e-4 * (1.0 + want.abs()), "{layer} {part} {i}: {got} {want}");
            }
        }
    }
    let [plain, better] = [&merged, &repaired].map(|w| evaluate(w).unwrap().loss);
    assert!(better < plain, "{better} {plain}");
    let message =
        repair(gpu(), [&a, &b], 0.5, &merged, &["fc9"], &mut |_, _| Ok(x.clone())).unwrap_err().to_string();
    assert!(message.contains("`fc9.weight`"), "{message}");
}
