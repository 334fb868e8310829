//! Modules: every model lists the leaves that it uses, under names that stay, and what is listed can be replaced, moved, frozen,
//! saved and loaded.

use crate::support::folder::Folder;
use crate::support::{download, gpu, other_kernels};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tiebeam::geometry::{Graph, Grid, Ponita, PonitaConfig, PonitaInput};
use tiebeam::models::foldgpt::Gated;
use tiebeam::models::lm::{ExpertsConfig, Lm, LmConfig};
use tiebeam::models::mor::{Keys, Mor, Routing};
use tiebeam::models::sharing::Sharing;
use tiebeam::models::sret::Sliced;
use tiebeam::nn::{
    BatchNorm, Buffer, Conv2d, Conv2dConfig, Dropout, GroupNorm, Init, Linear, Loaded, Module, ModuleFile,
    Norm, Parameters, Sequential, SiteEmbedding, check_listed, module,
};
use tiebeam::share::{LowRank, Site};
use tiebeam::store::{Checkpoint, File, save_checkpoint};
use tiebeam::{DType, Gpu, Rng, Tensor};

fn recursive(sharing: Sharing) -> Lm {
    let config = LmConfig::small().vocab(11).width(16).heads(2).kv_heads(2).hidden(24).context(8).depth(3);
    Lm::new(gpu(), config.sharing(sharing), &mut Rng::new(5))
}

fn stream(gpu: &Gpu) -> Tensor {
    Tensor::randn(gpu, [2, 4, 16], &mut Rng::new(6))
}

/// Checks that a model lists what it uses, and that every leaf that it lists can be replaced and moved.
fn walked<M: Module>(what: &str, mut model: M, loss: impl Fn(&M, &Gpu) -> Tensor) {
    check_listed(&model, &loss(&model, gpu())).unwrap_or_else(|error| panic!("{what}: {error}"));
    let leaves = |model: &M| -> BTreeSet<u64> {
        model.parameters().named().iter().map(|(_, x)| x.leaf_id().expect("a leaf")).collect()
    };
    let names = |model: &M| model.parameters().all().map(|(names, _)| names.to_vec()).collect::<Vec<_>>();
    let (old, old_names, want) = (leaves(&model), names(&model), download(&loss(&model, gpu())));
    model.map(|_, x| Ok(if x.is_leaf() { x.detach().copy().requires_grad() } else { x.copy() })).unwrap();
    assert!(old.is_disjoint(&leaves(&model)), "{what}: an old leaf is still there");
    assert_eq!(names(&model), old_names, "{what}: what was tied is tied");
    assert_eq!(download(&loss(&model, gpu())), want, "{what}");
    check_listed(&model, &loss(&model, gpu())).unwrap_or_else(|error| panic!("{what}: {error}"));
    model.to(other_kernels()).unwrap();
    let moved = download(&loss(&model, other_kernels()));
    assert!((moved[0] - want[0]).abs() <= 1e-4 * want[0].abs(), "{what}: {moved:?}, not {want:?}");
    model.freeze(|_| true);
    assert_eq!(model.parameters().named().len(), old.len(), "{what}: frozen parameters are parameters");
    assert!(model.parameters().trainable().is_empty());
    model.unfreeze(|_| true);
    assert_eq!(leaves(&model).len(), old.len(), "{what}");
}

#[test]
fn every_model_lists_what_it_uses_and_replaces_what_it_lists() {
    let tokens =
        |gpu: &Gpu| Tensor::from_slice(gpu, &(0..16u32).map(|i| i * 7 % 11).collect::<Vec<_>>(), [2, 8]);
    let all = [
        Sharing::none(),
        Sharing::tied(),
        Sharing::tied_lora(2, 0.5),
        Sharing::cycle(3, 2),
        Sharing::fold(2),
        Sharing::dictionary(2, true),
        Sharing::low_rank(3),
        Sharing::stages(&[1, 2]),
        Sharing::dictionary_net(2, true),
        Sharing::masa(&[1, 2], &[1, 1], 3),
        Sharing::hashed(4.0),
        Sharing::named("q k v: dictionary 2 output true net; up: cycle 3 rank 2; tied").unwrap(),
    ];
    for sharing in all {
        let model = recursive(sharing.clone());
        walked(&sharing.text(), model, |m, gpu| m.loss(&tokens(gpu), &tokens(gpu)));
    }
    let gated = Gated::new(recursive(Sharing::none()));
    walked("foldgpt", gated, |m, gpu| m.forward(&tokens(gpu)).cross_entropy(&tokens(gpu), None));
    for (routing, keys) in [(Routing::Expert, Keys::Recursion), (Routing::Token, Keys::Shared)] {
        let block = recursive(Sharing::none()).blocks[0].dense().expect("a plain block");
        let mor = Mor::new(gpu(), block, 3, routing, keys, &mut Rng::new(8));
        walked("mor", mor, |m, gpu| m.forward(&stream(gpu), &[4, 2, 1]).unwrap().0.square().mean_all());
    }
    let experts = ExpertsConfig { count: 4, top: 2, capacity: 1.25, balance: 0.01 };
    let net = Lm::new(gpu(), recursive(Sharing::tied()).config.experts(Some(experts)), &mut Rng::new(9));
    walked("widenet", net, |m, gpu| m.training_loss(&tokens(gpu), &tokens(gpu), &mut Rng::new(1)));
    let net = Sliced::new(gpu(), 16, 2, 24, &[4, 4, 4], &mut Rng::new(3));
    walked("sret", net, |m, gpu| m.forward(&stream(gpu), &mut Rng::new(1)).square().mean_all());
    let config = PonitaConfig::default().channels(4).hidden(8).basis(4).layers(2);
    let net = Ponita::new(gpu(), config, Grid::cube(), &mut Rng::new(11)).unwrap();
    walked("ponita", net, |m, gpu| {
        let positions: Vec<f32> = (0..15).map(|i| (i * i % 7) as f32 * 0.3).collect();
        let graph = Graph::full(gpu, &positions, 3, &[5], true).unwrap();
        let scalars = Tensor::ones(gpu, [5, 1]);
        m.forward(&graph, &PonitaInput::scalars(&scalars)).scalars.square().mean_all()
    });
}

/// A layer that reads a field which it does not list.
struct Forgets {
    layer: Linear,
    scale: Tensor,
}

module!(Forgets { layer, scale: _ });

#[test]
fn a_field_that_is_not_listed_is_found() {
    let layer = Linear::new(gpu(), 3, 2, false, Init::KaimingUniform, &mut Rng::new(1));
    let net = Forgets { layer, scale: Tensor::ones(gpu(), [7, 1]).requires_grad() };
    let loss = net.layer.forward(&Tensor::ones(gpu(), [1, 3])).mul(&net.scale).sum_all();
    let error = check_listed(&net, &loss).unwrap_err().to_string();
    assert!(error.contains("1 leaves that it does not list") && error.contains("[7, 1]"), "{error}");
}

/// A matrix at three places, one of them with a low-rank part and frozen, a norm, and a running mean.
struct Net {
    layers: Vec<Linear>,
    norm: Option<Norm>,
    mean: Buffer,
}

module!(Net { layers, norm, mean => "running.mean" });

fn net(seed: u64) -> Net {
    let rng = &mut Rng::new(seed);
    let theta = Init::Normal(1.0).leaf(gpu(), [4, 4], rng);
    let a = Init::Normal(1.0).leaf(gpu(), [2, 4], rng).detach();
    let b = Init::Normal(1.0).leaf(gpu(), [4, 2], rng);
    let low = Linear::from_site(LowRank::new(&theta, &a, &b, 0.5).shared(), None);
    let layers = vec![Linear::tied(&theta), Linear::tied(&theta), low];
    let mean = Buffer(Tensor::randn(gpu(), [4], rng));
    Net { layers, norm: Some(Norm::layer(gpu(), 4, 1e-5)), mean }
}

impl Net {
    fn forward(&self, x: &Tensor) -> Tensor {
        let x = self.layers.iter().fold(x.sub(&self.mean), |x, layer| layer.forward(&x));
        self.norm.as_ref().map_or(x.clone(), |norm| norm.forward(&x))
    }
}

#[test]
fn tied_leaves_have_all_their_names_and_buffers_are_apart() {
    let net = net(1);
    let all = Parameters::of(&net);
    let names: Vec<&str> = all.named().iter().map(|(name, _)| &**name).collect();
    let want = ["layers.0.weight", "layers.2.lora_a", "layers.2.lora_b", "norm.gain", "norm.bias"];
    assert_eq!(names, want);
    let theta = &net.layers[0].weight.leaves()[0];
    assert_eq!(all.names(theta), ["layers.0.weight", "layers.1.weight", "layers.2.weight"]);
    assert_eq!(all.buffers().map(|(name, _)| name).collect::<Vec<_>>(), ["running.mean"]);
    assert_eq!((all.stored(), all.used()), (16 + 8 + 8 + 8, 48 + 8));
    assert_eq!(all.trainable().len(), 4, "a frozen leaf is a parameter that is not trained");
}

#[test]
fn what_is_cast_stays_tied_and_a_failed_change_changes_nothing() {
    let mut net = net(1);
    let x = Tensor::ones(gpu(), [1, 4]);
    let want = download(&net.forward(&x));
    let error = net.map(|name, x| match name {
        "norm.bias" => Err(tiebeam::Error::config("no")),
        _ => Ok(x.scale(2.0)),
    });
    assert!(error.is_err());
    assert_eq!(download(&net.forward(&x)), want);
    net.cast(DType::F16);
    let all = Parameters::of(&net);
    assert!(all.named().iter().all(|(_, x)| x.dtype() == DType::F16));
    assert_eq!(all.named().len(), 5);
    for (got, want) in download(&net.forward(&x)).iter().zip(&want) {
        assert!((got - want).abs() < 0.02, "{got}, not {want}");
    }
}

#[test]
fn a_module_is_saved_and_loaded_in_place() {
    let folder = Folder::new("modules");
    let path = folder.join("net.safetensors");
    let (from, to) = (net(1), net(2));
    from.save(&path).unwrap();
    let file = File::open(&path).unwrap();
    assert_eq!(file.names().len(), 6, "a tied matrix is written once, and the buffer too");
    assert_eq!(file.metadata()["layers.2.weight"], "layers.0.weight");
    let x = Tensor::ones(gpu(), [1, 4]);
    let leaf = to.layers[1].weight.leaves()[0].leaf_id();
    to.load(&path).unwrap();
    assert_eq!(download(&to.forward(&x)), download(&from.forward(&x)));
    assert_eq!(to.layers[1].weight.leaves()[0].leaf_id(), leaf, "the leaves are the same");
    // In another type, floats are converted.
    let mut half = net(3);
    half.cast(DType::Bf16);
    half.load(&path).unwrap();
    assert_eq!(half.layers[0].weight.leaves()[0].dtype(), DType::Bf16);
    assert_eq!(half.mean.dtype(), DType::F32, "buffers are not cast");
    // A checkpoint of a run is read too.
    let state = Checkpoint::default().optimizer(vec![("m/x".into(), [1].into(), vec![1.0])]);
    save_checkpoint(&path, Parameters::of(&from).named(), &state).unwrap();
    let loaded = to.load_partly(&path).unwrap();
    assert_eq!((loaded.missing, loaded.unexpected), (vec!["running.mean".to_string()], vec![]));
}

#[test]
fn what_a_file_lacks_and_has_besides_is_told() {
    let folder = Folder::new("modules-other");
    let path = folder.join("net.safetensors");
    let (mut other, own) = (net(1), net(2));
    other.norm = None;
    other.layers.push(Linear::tied(&Tensor::ones(gpu(), [4, 4]).requires_grad()));
    other.save(&path).unwrap();
    let x = Tensor::ones(gpu(), [1, 4]);
    let before = download(&own.forward(&x));
    let error = own.load(&path).unwrap_err().to_string();
    assert!(error.contains("lacks norm.gain, norm.bias and has layers.3.weight besides"), "{error}");
    assert_eq!(download(&own.forward(&x)), before, "nothing has changed");
    let loaded = own.load_partly(&path).unwrap();
    assert_eq!(loaded.missing, ["norm.gain", "norm.bias"]);
    assert_eq!(loaded.unexpected, ["layers.3.weight"]);
    assert_ne!(loaded, Loaded::default());
    assert_ne!(download(&own.forward(&x)), before);
    // Another shape is never read.
    let wide = Net { mean: Buffer(Tensor::ones(gpu(), [5])), ..net(4) };
    let error = wide.load_partly(&path).unwrap_err().to_string();
    assert!(error.contains("`running.mean` is [4], the model's is [5]"), "{error}");
    // A tensor under one of its other names is found.
    let first = Net { layers: vec![net(5).layers.remove(0)], ..net(5) };
    first.save(&path).unwrap();
    assert_eq!(own.load_partly(&path).unwrap().missing, ["layers.2.lora_a", "layers.2.lora_b"]);
}

fn convolutional(rng: &mut Rng) -> Sequential {
    let config = Conv2dConfig::default().padding([1, 1]);
    Sequential::new()
        .add(Conv2d::new(gpu(), [2, 4], [3, 3], config, true, Init::KaimingUniform, rng))
        .add(BatchNorm::new(gpu(), 4))
        .add_fn(Tensor::relu)
        .add(GroupNorm::new(gpu(), 2, 4))
        .add(Dropout::new(0.5))
        .add_fn(|x| x.reshape([x.shape()[0], x.shape()[1..].iter().product()]))
        .add(Linear::new(gpu(), 4 * 5 * 5, 3, true, Init::KaimingUniform, rng))
}

#[test]
fn layers_in_sequence_are_named_trained_and_evaluated() {
    let rng = &mut Rng::new(1);
    let net = convolutional(rng);
    let all = net.parameters();
    let names: Vec<&str> = all.all().map(|(names, _)| &*names[0]).collect();
    let want = [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "3.weight",
        "3.bias",
        "6.weight",
        "6.bias",
    ];
    assert_eq!(names, want);
    let x = Tensor::randn(gpu(), [4, 2, 5, 5], rng);
    let loss = net.train(&x, rng).square().mean_all();
    check_listed(&net, &loss).unwrap();
    let grads = loss.backward().unwrap();
    assert_eq!(grads.len(), all.trainable().len(), "every parameter gets a gradient");
    let [first, again] = [(); 2].map(|()| download(&net.forward(&x)));
    assert_eq!(first, again, "evaluation drops nothing and moves nothing");
    assert_ne!(download(&net.train(&x, rng)), first);
    walked("sequence", convolutional(&mut Rng::new(2)), |net, gpu| {
        net.forward(&Tensor::randn(gpu, [2, 2, 5, 5], &mut Rng::new(3))).square().mean_all()
    });
}

/// Running statistics move at every replay of a recorded step, and do not when the batch carries an error.
#[test]
fn running_statistics_follow_batches() {
    let norm = BatchNorm::new(gpu(), 3).momentum(0.25);
    let x = Tensor::randn(gpu(), [6, 3, 2], &mut Rng::new(1)).affine(2.0, 5.0);
    x.evaluate();
    let channel = |c: usize| {
        let all = download(&x);
        let own: Vec<f64> = (0..36).filter(|i| i / 2 % 3 == c).map(|i| all[i]).collect();
        let mean = own.iter().sum::<f64>() / 12.0;
        (mean, own.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 11.0)
    };
    let mut step = tiebeam::Step::record(gpu(), &[&x], |x| Ok(vec![norm.train(&x[0])])).unwrap();
    for _ in 0..3 {
        step.run(&[&x]).unwrap();
    }
    // Recording ran it once as well.
    let kept = 0.75f64.powi(4);
    let [mean, var] = [&norm.running_mean, &norm.running_var].map(|buffer| download(buffer));
    for c in 0..3 {
        let (m, v) = channel(c);
        assert!((mean[c] - m * (1.0 - kept)).abs() < 1e-5, "{} is not {}", mean[c], m * (1.0 - kept));
        let want = kept + v * (1.0 - kept);
        assert!((var[c] - want).abs() < 1e-5 * want, "{} is not {want}", var[c]);
    }
    // In evaluation the running statistics are used.
    let y = download(&norm.forward(&x));
    let want = (download(&x)[0] - mean[0]) / (var[0] + 1e-5).sqrt();
    assert!((y[0] - want).abs() < 1e-5, "{} is not {want}", y[0]);
    let lone = Tensor::ones(gpu(), [1, 3]);
    assert!(catch_unwind(|| norm.train(&lone)).is_err(), "one element has no variance");
}

/// A table of every kind gives the rows of its weight, and gradients of those rows.
#[test]
fn a_table_of_any_kind_is_looked_up() {
    let rng = &mut Rng::new(4);
    let [theta, a, b] = [[6, 5], [2, 5], [6, 2]].map(|shape| Init::Normal(1.0).leaf(gpu(), shape, rng));
    let ids = Tensor::from_slice(gpu(), &[5u32, 0, 5], [3]);
    let sites = [
        tiebeam::share::Tied::new(&theta).shared(),
        LowRank::new(&theta, &a, &b, 0.5).shared(),
        tiebeam::share::Factored::new(&a, &b).shared(),
    ];
    for site in sites {
        let table = SiteEmbedding::new(site.clone());
        let whole = site.expand();
        let want: Vec<f64> =
            [5, 0, 5].iter().flat_map(|&row| download(&whole.slice(0, row..row + 1))).collect();
        assert_eq!(download(&table.forward(&ids)), want, "{}", site.name());
        let grads = table.forward(&ids).sum_all().backward().unwrap();
        assert_eq!(grads.len(), site.leaves().len(), "{}", site.name());
        check_listed(&table, &table.forward(&ids).sum_all()).unwrap();
    }
    let grads = SiteEmbedding::new(LowRank::new(&theta, &a, &b, 0.5).shared())
        .forward(&ids)
        .sum_all()
        .backward()
        .unwrap();
    let rows = download(grads.get(&theta).unwrap());
    assert_eq!((rows[0], rows[5], rows[25]), (1.0, 0.0, 2.0), "row 5 is used twice, row 1 never");
}

/// A file of a model that does not tie what this one ties, and a view that would go on to read an old leaf.
#[test]
fn ties_that_cannot_be_kept_are_refused() {
    let folder = Folder::new("modules-ties");
    let path = folder.join("net.safetensors");
    let apart = Net { layers: (1..4).map(|seed| net(seed).layers.remove(0)).collect(), ..net(1) };
    apart.save(&path).unwrap();
    let tied = net(2);
    let error = tied.load_partly(&path).unwrap_err().to_string();
    assert!(error.contains("`layers.0.weight` and `layers.1.weight` differ"), "{error}");
    let mut turned = net(3);
    let view = turned.layers[0].weight.leaves()[0].t();
    turned.layers.push(Linear::tied(&view));
    let error = turned.map(|_, x| Ok(x.clone())).unwrap_err().to_string();
    assert!(error.contains("`layers.3.weight` is computed from a leaf"), "{error}");
    let refused = catch_unwind(AssertUnwindSafe(|| turned.freeze(|_| true)));
    assert!(refused.is_err());
    let mut other = net(4);
    let error = other.map(|_, x| Ok(x.slice(0, 0..1))).unwrap_err().to_string();
    assert!(error.contains("cannot become"), "{error}");
    let x = Tensor::ones(gpu(), [1, 4]);
    assert_eq!(download(&other.forward(&x)), download(&net(4).forward(&x)), "nothing has changed");
    let unrelated =
        Forgets { layer: Linear::new(gpu(), 2, 2, true, Init::Zeros, &mut Rng::new(1)), scale: x };
    assert!(
        unrelated.load_partly(&path).unwrap_err().to_string().contains("no tensor of this model's names")
    );
}

/// A tied parameter is frozen by any of its names, and statistics of batches stay in f32.
#[test]
fn any_name_freezes_and_buffers_are_not_cast() {
    let mut tied = net(1);
    tied.freeze(|name| name == "layers.1.weight");
    assert!(!tied.layers[0].weight.leaves()[0].is_leaf());
    let mut model = recursive(Sharing::dictionary(2, true));
    let tokens = Tensor::from_slice(gpu(), &[1u32, 2, 3, 4], [1, 4]);
    let want = download(&model.forward(&tokens));
    model.cast(DType::F16);
    for (got, want) in download(&model.forward(&tokens)).iter().zip(&want) {
        assert!((got - want).abs() < 0.05, "{got}, not {want}");
    }
    let mut layers = convolutional(&mut Rng::new(1));
    layers.cast(DType::F16);
    assert!(layers.parameters().buffers().all(|(_, x)| x.dtype() == DType::F32));
    layers.train(&Tensor::ones(gpu(), [2, 2, 5, 5]), &mut Rng::new(2)).sum_all().item().unwrap();
}

#[test]
fn a_sequential_names_the_layer_that_fails() {
    let mut rng = Rng::new(1);
    let linear = |inputs| Linear::new(gpu(), inputs, 4, false, Init::KaimingUniform, &mut Rng::new(2));
    let net = Sequential::new().add(linear(3)).add_fn(Tensor::relu).add(linear(5));
    let x = Tensor::ones(gpu(), [2, 3]);
    for train in [false, true] {
        let run = AssertUnwindSafe(|| if train { net.train(&x, &mut rng) } else { net.forward(&x) });
        let panic = catch_unwind(run).expect_err("the sizes differ");
        let text = panic.downcast_ref::<String>().expect("a message");
        assert!(text.starts_with("layer 2 of a Sequential, which got [2, 4]: linear: "), "{text}");
    }
}

#[test]
fn what_could_not_be_loaded_again_is_not_saved() {
    let folder = Folder::new("kept");
    struct Kept {
        w: Tensor,
        mask: Buffer,
    }
    module!(Kept { w, mask });
    let leaf = Tensor::ones(gpu(), [4, 4]).requires_grad();
    let whole = || Buffer(Tensor::ones(gpu(), [2, 4]));
    let saved = |w: &Tensor, mask: Buffer| {
        let net = Kept { w: w.clone(), mask };
        net.save(folder.join("w.safetensors")).map_err(|error| error.to_string())
    };
    saved(&leaf, whole()).unwrap();
    let view = saved(&leaf, Buffer(Tensor::ones(gpu(), [4, 4]).slice(0, ..2))).unwrap_err();
    assert!(view.contains("`mask` is a view of another tensor"), "{view}");
    let computed = saved(&leaf.scale(0.5), whole()).unwrap_err();
    assert!(computed.contains("`w` is computed from a leaf"), "{computed}");
}

#[test]
fn mapped_leaves_stay_leaves() {
    let mut net = net(4);
    let before =
        (net.parameters().trainable().len(), net.parameters().named().len(), net.parameters().stored());
    let old = net.parameters().named()[0].1.to_vec::<f32>().unwrap();
    net.map(|_, x| Ok(x.scale(0.5))).unwrap();
    let all = net.parameters();
    assert_eq!((all.trainable().len(), all.named().len(), all.stored()), before);
    let halved: Vec<f32> = old.iter().map(|x| 0.5 * x).collect();
    assert_eq!(all.named()[0].1.to_vec::<f32>().unwrap(), halved);
}

#[test]
fn numbers_that_f16_has_not_are_refused() {
    let folder = Folder::new("modules-large");
    let path = folder.join("large.safetensors");
    let linear = |value: f32| Linear::tied(&Tensor::full(gpu(), [2, 2], value).requires_grad());
    let mut half = linear(0.0);
    half.cast(DType::F16);
    linear(65519.0).save(&path).unwrap();
    half.load(&path).unwrap();
    linear(65520.0).save(&path).unwrap();
    let error = half.load(&path).unwrap_err().to_string();
    assert!(error.contains("has 65520 at element 0, too large for the model's f16"), "{error}");
}

/// A batch that overflows leaves the running statistics as they were.
#[test]
fn running_statistics_stay_finite() {
    let norm = BatchNorm::new(gpu(), 2);
    let x = Tensor::from_slice(gpu(), &[1.0, 1.0, f32::INFINITY, 3.0, 2.0, 5.0], [3, 2]);
    norm.train(&x).evaluate();
    let [mean, var] = [&norm.running_mean, &norm.running_var].map(|buffer| download(buffer));
    assert_eq!((mean[0], var[0]), (0.0, 1.0));
    assert!((mean[1] - 0.3).abs() < 1e-6 && (var[1] - (0.9 + 0.1 * 4.0)).abs() < 1e-6, "{mean:?} {var:?}");
}
