//! Networks that are described by their steps: merged in part, permuted, matched by activations and repaired.

use crate::merge_data::{CNN, cnn, mlp, normal, nothing};
use crate::support::{download, gpu, within};
use tiebeam::Rng;
use tiebeam::merge::partial::{PleasOptions, merge_networks};
use tiebeam::merge::{Similarity, Spec, Weights, match_activations, repair_network};
use tiebeam::models::network::Network;

#[test]
fn partly_merged_networks_keep_their_zeros_and_reach_both() {
    let mut rng = Rng::new(6);
    let x = |rng: &mut Rng, width| normal(&[80, width], rng);
    let cases = [
        (Network::mlp(&mlp(&mut rng)).unwrap(), [mlp(&mut rng), mlp(&mut rng)], x(&mut rng, 6)),
        (Network::from_json(CNN).unwrap(), [cnn(&mut rng), cnn(&mut rng)], x(&mut rng, 50)),
    ];
    for (network, [a, b], inputs) in cases {
        let merge = |options: &PleasOptions| {
            merge_networks(gpu(), &network, [&a, &b], &inputs, options, &mut nothing)
        };
        // What is kept apart has no way to the other network, in any layer: the zeros are exact, before and behind the fit.
        for by_activations in [false, true] {
            let half = merge(&PleasOptions::default().ratio(0.5).by_activations(by_activations)).unwrap();
            assert!(half.flops > 1.0 && half.flops < 2.5, "{}", half.flops);
            let mut zeros = 0;
            for layer in network.layers() {
                let w = &half.weights[&format!("{layer}.weight")];
                let shape = w.shape();
                let values = download(w);
                let [rows, columns] = [shape[0], w.count() / shape[0]];
                // The group of what a layer writes, and of what it reads.
                let (out, inner) = match layer {
                    "d" => continue,
                    "c3" => ("c0", "c1"),
                    "c1" | "c2" => (layer, "c0"),
                    "fc1" => ("fc1", "fc0"),
                    "f0" => ("f0", "c2"),
                    _ => continue,
                };
                let [out, inner] = [out, inner].map(|name| &half.splits[name]);
                let times = columns / inner.width();
                let of = |at: usize, split: &tiebeam::merge::pleas::Split| match at
                    .checked_sub(split.merged.len())
                {
                    None => 0,
                    Some(rest) if rest < split.apart.len() => 1,
                    Some(_) => 2,
                };
                for row in 0..rows {
                    for column in 0..columns {
                        let [r, c] = [of(row, out), of(column / times, inner)];
                        if r * c == 2 {
                            assert_eq!(values[row * columns + column], 0.0, "{layer} [{row}, {column}]");
                            zeros += 1;
                        }
                    }
                }
            }
            assert!(zeros > 20, "{zeros} structural zeros were looked at");
            half.network.output(&half.weights, inputs.shape()).expect("the network fits its weights");
        }
        // With everything apart and two heads, both networks are in it.
        let all = merge(&PleasOptions::default().ratio(1.0).separate_heads(true)).unwrap();
        let logits = all.network.logits(gpu(), &all.weights, &inputs).unwrap();
        assert_eq!(logits.shape()[..], [80, 6]);
        for (i, model) in [&a, &b].into_iter().enumerate() {
            let want = download(&network.logits(gpu(), model, &inputs).unwrap());
            let got = download(&logits.slice(1, 3 * i..3 * i + 3));
            let most = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            // Statistics of batch norms are those of these data, in which both networks of the test lie about.
            if network.batch_norms().is_empty() {
                within("both", &got, &want, |_| 1e-3 * most);
            }
        }
        // A fit that is held to the merged weights changes nothing; a free one is nearer to both networks' mean.
        let held = merge(&PleasOptions::default().ridge(1e12)).unwrap();
        let free = merge(&PleasOptions::default()).unwrap();
        let [la, lb] = [&a, &b].map(|model| network.logits(gpu(), model, &inputs).unwrap());
        let mean = la.add(&lb).scale(0.5);
        let error = |merged: &tiebeam::merge::partial::Partly| {
            let logits = merged.network.logits(gpu(), &merged.weights, &inputs).unwrap();
            download(&logits.sub(&mean)).iter().map(|x| x * x).sum::<f64>()
        };
        assert!(error(&free) < error(&held), "{} {}", error(&free), error(&held));
        assert_eq!(free.flops, 1.0);
        for (options, words) in [
            (PleasOptions::default().ratio(1.5), "ratio of 1.5 must be in [0, 1]"),
            (PleasOptions::default().ridge(0.0), "ridge of 0 above 0"),
        ] {
            let message = merge(&options).expect_err(words).to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}

/// A permuted network is found again by weights and by activations, whatever its steps are, and computes the same.
#[test]
fn specs_follow_from_descriptions() {
    let mut rng = Rng::new(7);
    for (network, weights, width) in [
        (Network::mlp(&mlp(&mut rng)).unwrap(), mlp(&mut rng), 6),
        (Network::from_json(CNN).unwrap(), cnn(&mut rng), 50),
    ] {
        let spec = Spec::network(&weights, &network).unwrap();
        let x = normal(&[60, width], &mut rng);
        let identity = tiebeam::merge::Permutation::identity(&spec, &weights).unwrap();
        let mut orders = identity.orders().clone();
        orders.values_mut().for_each(|order| rng.shuffle(order));
        let turned = tiebeam::merge::Permutation::new(spec.clone(), orders).unwrap();
        let moved = turned.permuted(&weights);
        let [plain, other] =
            [&weights as &dyn Weights, &moved].map(|w| download(&network.logits(gpu(), w, &x).unwrap()));
        let most = plain.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        within("permuted", &other, &plain, |_| 1e-5 * most + 1e-6);
        let found = match_activations(
            gpu(),
            &network,
            &spec,
            [&weights, &moved],
            &x,
            Similarity::Correlation,
            &mut nothing,
        )
        .unwrap();
        let back = found.permutation.permuted(&moved);
        for (name, x) in &weights {
            assert_eq!(download(&back.read(gpu(), name).unwrap()), download(x), "{name}");
        }
    }
    // Between a network and itself with other units in the middle, activations have their deviations back.
    let (a, b) = (mlp(&mut rng), mlp(&mut rng));
    let network = Network::mlp(&a).unwrap();
    let x = normal(&[200, 6], &mut rng);
    let middle = tiebeam::merge::Interpolated { a: &a, b: &b, t: 0.5 };
    let repaired = repair_network(gpu(), &network, [&a, &b], 0.5, &middle, &x).unwrap();
    let deviations = |weights: &dyn Weights| {
        // Of the second hidden layer's inputs, whose mean and deviation are repaired before their ReLU.
        let w = weights.read(gpu(), "fc0.weight").unwrap();
        let b = weights.read(gpu(), "fc0.bias").unwrap();
        let y = download(&x.matmul(&w.t()).add(&b));
        (0..8)
            .map(|unit| {
                let all: Vec<f64> = y.iter().skip(unit).step_by(8).copied().collect();
                let mean = all.iter().sum::<f64>() / 200.0;
                (all.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 200.0).sqrt()
            })
            .collect::<Vec<f64>>()
    };
    let [of_a, of_b, now] = [&a as &dyn Weights, &b, &repaired].map(deviations);
    let want: Vec<f64> = of_a.iter().zip(&of_b).map(|(a, b)| (a + b) / 2.0).collect();
    within("deviations", &now, &want, |i| 1e-3 * want[i]);
}
