//! Modules, networks and language models on weights that are computed from something else: what is trained through them is what
//! they were computed from.

use crate::support::{download, gpu, within};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tiebeam::models::lm::{Lm, LmConfig, MlpKind, NormKind, Positions};
use tiebeam::models::network::Network;
use tiebeam::nn::{
    BatchNorm, Conv2d, Conv2dConfig, Init, Layer, Linear, Module, Norm, Sequential, functional, module,
};
use tiebeam::store::{Tracked, Weights};
use tiebeam::{Rng, Tensor};

type Named = BTreeMap<String, Tensor>;

fn normal(shape: &[usize], rng: &mut Rng) -> Tensor {
    Tensor::randn(gpu(), shape, rng).contiguous()
}

/// A small convolutional network with batch norms.
fn cnn(rng: &mut Rng) -> Sequential {
    let conv = |channels, stride: usize, rng: &mut Rng| {
        let config = Conv2dConfig::default().stride([stride; 2]).padding([1, 1]);
        Conv2d::new(gpu(), channels, [3, 3], config, true, Init::KaimingUniform, rng)
    };
    Sequential::new()
        .add(conv([1, 4], 1, rng))
        .add(BatchNorm::new(gpu(), 4))
        .add_fn(Tensor::relu)
        .add(conv([4, 6], 2, rng))
        .add(BatchNorm::new(gpu(), 6))
        .add_fn(Tensor::relu)
        .add_fn(|x| x.flatten(2, -1).mean(2))
        .add(Linear::new(gpu(), 6, 3, true, Init::KaimingUniform, rng))
}

/// One block of a transformer over patches of an image, with a class token that is the mean.
struct Vit {
    patches: Linear,
    positions: Tensor,
    norm: Norm,
    qkv: Linear,
    out: Linear,
    head: Linear,
}

module!(Vit { patches, positions, norm, qkv, out, head });

impl Layer for Vit {
    fn forward(&self, x: &Tensor) -> Tensor {
        let x = self.patches.forward(x).add(&self.positions);
        let parts = self.qkv.forward(&self.norm.forward(&x)).chunk(3, 2);
        let scores = parts[0].matmul(&parts[1].transpose(1, 2)).softmax(2);
        let x = x.add(&self.out.forward(&scores.matmul(&parts[2])));
        self.head.forward(&x.mean(1))
    }
}

fn vit(rng: &mut Rng) -> Vit {
    let mut linear = |a, b| Linear::new(gpu(), a, b, true, Init::KaimingUniform, rng);
    let [patches, qkv, out, head] = [linear(4, 8), linear(8, 24), linear(8, 8), linear(8, 3)];
    let positions = normal(&[5, 8], rng).requires_grad();
    let norm = Norm { gain: Tensor::ones(gpu(), [8]), bias: Some(Tensor::zeros(gpu(), [8])), eps: 1e-5 };
    Vit { patches, positions, norm, qkv, out, head }
}

/// Trains one coefficient of each tensor through `loss`, and checks its gradient against `<dL/dtheta, tau>` with the gradient of the
/// loss by the weights themselves.
fn coefficients(named: &Named, rng: &mut Rng, loss: &mut dyn FnMut(&dyn Weights) -> Tensor) {
    let taus: Named = named.iter().map(|(n, x)| (n.clone(), normal(x.shape(), rng).scale(0.1))).collect();
    let c: Vec<Tensor> = named.keys().map(|_| Tensor::scalar(gpu(), 0.3).requires_grad()).collect();
    let made: Named = named
        .iter()
        .zip(&c)
        .map(|((name, base), c)| (name.clone(), base.detach().add(&taus[name].mul(c))))
        .collect();
    let grads = loss(&Tracked(&made)).backward().unwrap();
    let leaves: Named =
        made.iter().map(|(name, x)| (name.clone(), x.detach().copy().requires_grad())).collect();
    let direct = loss(&Tracked(&leaves)).backward().unwrap();
    let mut trained = 0;
    for ((name, leaf), c) in leaves.iter().zip(&c) {
        let Some(gradient) = direct.get(leaf) else {
            assert!(grads.get(c).is_none(), "{name}");
            continue;
        };
        let want: f64 = download(gradient).iter().zip(download(&taus[name])).map(|(g, t)| g * t).sum();
        let sizes: f64 =
            download(gradient).iter().zip(download(&taus[name])).map(|(g, t)| (g * t).abs()).sum();
        let got = f64::from(grads.get(c).unwrap_or_else(|| panic!("{name} has no gradient")).item().unwrap());
        assert!((got - want).abs() <= 2e-4 * sizes + 1e-7, "{name}: {got}, {want}");
        trained += 1;
    }
    assert!(trained + 4 >= named.len(), "{trained} of {} tensors are trained", named.len());
}

fn state(module: &dyn Module) -> Named {
    module.parameters().state_dict().into_iter().collect()
}

#[test]
fn coefficients_train_through_convolutions_norms_and_transformers() {
    let mut rng = Rng::new(1);
    let (mut cnn, images) = (cnn(&mut rng), normal(&[7, 1, 6, 6], &mut rng));
    let named = state(&cnn);
    coefficients(&named, &mut rng, &mut |weights| {
        functional(&mut cnn, weights, |net| net.forward(&images).square().sum_all()).unwrap()
    });
    let (mut vit, patches) = (vit(&mut rng), normal(&[3, 5, 4], &mut rng));
    let named = state(&vit);
    coefficients(&named, &mut rng, &mut |weights| {
        functional(&mut vit, weights, |net| net.forward(&patches).square().sum_all()).unwrap()
    });
}

#[test]
fn coefficients_train_through_language_models() {
    let mut rng = Rng::new(2);
    let config = LmConfig::small().vocab(19).width(16).heads(4).kv_heads(2).hidden(24).depth(2).context(8);
    let mut lm = Lm::new(gpu(), config.clone(), &mut rng);
    let tokens = Tensor::from_slice(gpu(), &[1u32, 5, 7, 18, 0, 3, 2, 2, 9, 4], [2, 5]);
    let targets = Tensor::from_slice(gpu(), &[5u32, 7, 18, 0, 1, 2, 2, 9, 4, 6], [2, 5]);
    let named = state(&lm);
    coefficients(&named, &mut rng, &mut |weights| {
        functional(&mut lm, weights, |lm| lm.loss(&tokens, &targets)).unwrap()
    });
    // A published model, by the names of its file.
    let folder = crate::support::folder::Folder::new("functional-llama");
    let kinds = config.norm(NormKind::Rms).positions(Positions::Rotary).mlp(MlpKind::SwiGlu);
    let lm = Lm::new(gpu(), kinds, &mut rng);
    lm.save_folder(folder.join("llama"), tiebeam::DType::F32).unwrap();
    let shards = tiebeam::merge::Shards::open(folder.join("llama")).unwrap();
    let named: Named =
        shards.names().into_iter().map(|name| (name.clone(), shards.read(gpu(), &name).unwrap())).collect();
    let text = std::fs::read_to_string(folder.join("llama/config.json")).unwrap();
    let config = LmConfig::from_json(&text).unwrap();
    coefficients(&named, &mut rng, &mut |weights| {
        Lm::from_weights(gpu(), weights, config.clone()).unwrap().loss(&tokens, &targets)
    });
}

#[test]
fn modules_have_their_own_tensors_again() {
    let mut rng = Rng::new(3);
    let mut net = cnn(&mut rng);
    let x = normal(&[2, 1, 6, 6], &mut rng);
    let before = download(&net.forward(&x));
    let ids: Vec<Option<u64>> = net.parameters().named().iter().map(|(_, x)| x.leaf_id()).collect();
    let weights: Named = state(&net).into_iter().map(|(n, x)| (n, x.detach().scale(2.0))).collect();
    let doubled = functional(&mut net, &weights, |net| net.forward(&x)).unwrap();
    assert_ne!(download(&doubled), before);
    let panics = catch_unwind(AssertUnwindSafe(|| functional(&mut net, &weights, |_| panic!("inside"))));
    assert!(panics.is_err());
    let after: Vec<Option<u64>> = net.parameters().named().iter().map(|(_, x)| x.leaf_id()).collect();
    assert_eq!((download(&net.forward(&x)), after), (before.clone(), ids));
    // One tensor in two places, and one that the module holds elsewhere, find their ways back too.
    let mut two = Sequential::new()
        .add(Linear::new(gpu(), 3, 3, false, Init::KaimingUniform, &mut rng))
        .add(Linear::new(gpu(), 3, 3, false, Init::KaimingUniform, &mut rng));
    let x = normal(&[2, 3], &mut rng);
    let (before, own) = (download(&two.forward(&x)), state(&two));
    let same = normal(&[3, 3], &mut rng);
    for weights in [
        Named::from([("0.weight".to_string(), same.clone()), ("1.weight".to_string(), same.clone())]),
        Named::from([("0.weight".to_string(), own["1.weight"].clone())]),
        Named::from([
            ("0.weight".to_string(), own["1.weight"].clone()),
            ("1.weight".to_string(), own["0.weight"].clone()),
        ]),
    ] {
        let want = {
            let of = |name: &str| weights.get(name).unwrap_or(&own[name]).detach();
            x.matmul(&of("0.weight").t()).matmul(&of("1.weight").t())
        };
        let got = functional(&mut two, &Tracked(&weights), |net| net.forward(&x)).unwrap();
        within("borrowed", &download(&got), &download(&want), |_| 1e-5);
        assert_eq!(download(&two.forward(&x)), before);
    }
    // What does not fit is an error, and changes nothing.
    for (name, x, words) in [
        ("2.weight", normal(&[3, 3], &mut rng), "no tensor `2.weight`; near: `0.weight`, `1.weight`"),
        (
            "0.weight",
            normal(&[2, 3], &mut rng),
            "`0.weight` is [3, 3] in the module, the weights have [2, 3]",
        ),
    ] {
        let weights = Named::from([(name.to_string(), x)]);
        let message = functional(&mut two, &weights, |_| ()).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    }
    assert_eq!(download(&two.forward(&x)), before);
}

/// A network's steps compute what the layers of the same names do.
#[test]
fn described_networks_compute_what_layers_do() {
    let mut rng = Rng::new(4);
    let net = cnn(&mut rng);
    let mut weights = state(&net);
    for norm in ["1", "4"] {
        let width = weights[&format!("{norm}.weight")].count();
        for (part, shift) in [("running_mean", 0.0), ("running_var", 1.5), ("weight", 1.0), ("bias", 0.0)] {
            let x = normal(&[width], &mut rng).scale(0.3).affine(1.0, shift);
            weights.insert(format!("{norm}.{part}"), x);
        }
    }
    let text = r#"{"input": [1, 6, 6], "steps": [
        {"conv": {"name": "0", "padding": 1}}, {"batch_norm": {"name": "1"}}, "relu",
        {"conv": {"name": "3", "stride": 2, "padding": 1}}, {"batch_norm": {"name": "4"}}, "relu",
        "global_pool", {"linear": "7"}]}"#;
    let network = Network::from_json(text).unwrap();
    let x = normal(&[600, 36], &mut rng);
    let got = network.logits(gpu(), &weights, &x).unwrap();
    let mut net = net;
    let want = functional(&mut net, &weights, |net| net.forward(&x.reshape([600, 1, 6, 6]))).unwrap();
    within("logits", &download(&got), &download(&want), |_| 1e-5);
    coefficients(&weights, &mut rng, &mut |weights| {
        network.logits(gpu(), weights, &x.slice(0, 0..5)).unwrap().square().sum_all()
    });
    // A residual block with pools and the other norms, by hand.
    let text = r#"{"steps": [{"residual": {"body": [{"conv": {"name": "c", "padding": 1}}, {"group_norm": {"name": "g", "groups": 2}}, "gelu"],
        "shortcut": [{"conv": {"name": "s"}}]}}, {"max_pool": {"size": 2}}, {"avg_pool": {"size": 3, "stride": 1, "padding": 1}},
        "flatten", {"layer_norm": {"name": "l"}}, {"linear": "f"}]}"#;
    let network = Network::from_json(text).unwrap();
    let weights: Named = [
        ("c.weight", vec![4, 2, 3, 3]),
        ("c.bias", vec![4]),
        ("g.weight", vec![4]),
        ("g.bias", vec![4]),
        ("s.weight", vec![4, 2, 1, 1]),
        ("l.weight", vec![36]),
        ("l.bias", vec![36]),
        ("f.weight", vec![3, 36]),
    ]
    .map(|(name, shape)| (name.to_string(), normal(&shape, &mut rng).scale(0.5)))
    .into();
    let x = normal(&[3, 2, 6, 6], &mut rng);
    let w = |name: &str| weights[name].clone();
    let one = Conv2dConfig::default();
    let body = x
        .conv2d(&w("c.weight"), Some(&w("c.bias")), one.padding([1, 1]))
        .group_norm(2, Some(&w("g.weight")), Some(&w("g.bias")), 1e-5)
        .gelu();
    let sum = body.add(&x.conv2d(&w("s.weight"), None, one));
    let pooled = sum.max_pool2d([2, 2], [2, 2], [0, 0]).avg_pool2d([3, 3], [1, 1], [1, 1]);
    let normed = pooled.flatten(1, -1).layer_norm(Some(&w("l.weight")), Some(&w("l.bias")), 1e-5);
    let want = normed.matmul(&w("f.weight").t());
    let got = network.logits(gpu(), &weights, &x).unwrap();
    within("residual", &download(&got), &download(&want), |_| 1e-5);
}
