//! Convolutional and residual networks: channels move with their norms, and as blocks behind a flatten.

use super::*;
use tiebeam::ops::product::conv::Conv2dConfig;

/// In conv - conv (depthwise) - pool - flatten - dense - dense, channels move as blocks behind the flatten.
#[test]
fn flattened_channels_move_as_blocks() {
    let model = drawn(
        &shapes(&[
            ("c0.weight", &[12, 2, 3, 3]),
            ("c0.bias", &[12]),
            ("n0.weight", &[12]),
            ("n0.bias", &[12]),
            ("n0.running_mean", &[12]),
            ("n0.running_var", &[12]),
            ("n0.num_batches_tracked", &[1]),
            ("depth.weight", &[12, 1, 3, 3]),
            ("c1.weight", &[9, 12, 3, 3]),
            ("f0.weight", &[15, 36]),
            ("f0.bias", &[15]),
            ("f1.weight", &[5, 15]),
        ]),
        3,
    );
    let layers = [
        LayerNames::normed("c0", "n0"),
        LayerNames::plain("depth"),
        LayerNames::plain("c1"),
        LayerNames::plain("f0"),
        LayerNames::plain("f1"),
    ];
    // The engine has no depthwise convolution, so a full one with zeros elsewhere is used.
    let forward = |w: &dyn Weights, x: &Tensor| {
        let read = |name: &str| w.read(gpu(), name).unwrap();
        let same = Conv2dConfig::default().padding([1, 1]);
        let column = |name: &str| read(name).reshape([12, 1, 1]);
        let h = x.conv2d(&read("c0.weight"), Some(&read("c0.bias")), same).sub(&column("n0.running_mean"));
        let h =
            h.div(&column("n0.running_var").sqrt()).mul(&column("n0.weight")).add(&column("n0.bias")).relu();
        let eye: Vec<f32> = (0..144).map(|i| if i % 13 == 0 { 1.0 } else { 0.0 }).collect();
        let full = read("depth.weight").mul(&Tensor::from_slice(gpu(), &eye, [12, 12, 1, 1]));
        let h = h.conv2d(&full, None, same).relu().conv2d(&read("c1.weight"), None, same).relu();
        let h = h.max_pool2d([2, 2], [2, 2], [0, 0]).reshape([x.shape()[0], 36]);
        let h = h.matmul(&read("f0.weight").t()).add(&read("f0.bias")).relu();
        h.matmul(&read("f1.weight").t())
    };
    let mut model = model;
    let positive = model["n0.running_var"].square().affine(1.0, 0.5);
    model.insert("n0.running_var".into(), positive);
    let spec = Spec::cnn(&model, &layers).unwrap();
    recovers(&spec, &model, 0.3);
    let x = Tensor::randn(gpu(), [3, 2, 4, 4], &mut Rng::new(4));
    let permuted = planted(&spec, &model, 1);
    let apart = most_apart(&forward(&model, &x), &forward(&permuted.permuted(&model), &x));
    assert!(apart <= 1e-5, "{apart}");
}

/// Two stages with a projection between them and a bottleneck block, with the names of torchvision.
#[test]
fn residual_networks_by_their_names() {
    let norm = |name: &str, n: usize| -> Vec<(String, Vec<usize>)> {
        ["weight", "bias", "running_mean", "running_var"]
            .iter()
            .map(|part| (format!("{name}.{part}"), vec![n]))
            .collect()
    };
    let mut all = shapes(&[
        ("conv1.weight", &[8, 3, 3, 3]),
        ("layer1.0.conv1.weight", &[6, 8, 3, 3]),
        ("layer1.0.conv2.weight", &[8, 6, 3, 3]),
        ("layer2.0.conv1.weight", &[5, 8, 1, 1]),
        ("layer2.0.conv2.weight", &[7, 5, 3, 3]),
        ("layer2.0.conv3.weight", &[11, 7, 1, 1]),
        ("layer2.0.downsample.0.weight", &[11, 8, 1, 1]),
        ("fc.weight", &[4, 11]),
        ("fc.bias", &[4]),
    ]);
    for (name, n) in [
        ("bn1", 8),
        ("layer1.0.bn1", 6),
        ("layer1.0.bn2", 8),
        ("layer2.0.bn1", 5),
        ("layer2.0.bn2", 7),
        ("layer2.0.bn3", 11),
        ("layer2.0.downsample.1", 11),
    ] {
        all.extend(norm(name, n));
    }
    let model = drawn(&all, 6);
    let spec = Spec::resnet(&model).unwrap();
    let names: Vec<&str> = spec.groups.iter().map(|group| group.name.as_str()).collect();
    assert_eq!(names, ["stem", "layer1.0.inner1", "layer2.0.inner1", "layer2.0.inner2", "layer2.0.stream"]);
    recovers(&spec, &model, 0.2);
    let forward = |w: &dyn Weights, x: &Tensor| {
        let read = |name: &str| w.read(gpu(), &format!("{name}.weight")).unwrap();
        let norm = |x: &Tensor, name: &str| {
            let part =
                |part: &str| w.read(gpu(), &format!("{name}.{part}")).unwrap().unsqueeze(1).unsqueeze(2);
            let x = x.sub(&part("running_mean")).div(&part("running_var").square().affine(1.0, 1.0));
            x.mul(&part("weight")).add(&part("bias"))
        };
        let conv = |x: &Tensor, name: &str| {
            let weight = read(name);
            let padding = [weight.shape()[2] / 2; 2];
            x.conv2d(&weight, None, Conv2dConfig::default().padding(padding))
        };
        let x = norm(&conv(x, "conv1"), "bn1").relu();
        let h = norm(&conv(&x, "layer1.0.conv1"), "layer1.0.bn1").relu();
        let x = x.add(&norm(&conv(&h, "layer1.0.conv2"), "layer1.0.bn2")).relu();
        let h = norm(&conv(&x, "layer2.0.conv1"), "layer2.0.bn1").relu();
        let h = norm(&conv(&h, "layer2.0.conv2"), "layer2.0.bn2").relu();
        let h = norm(&conv(&h, "layer2.0.conv3"), "layer2.0.bn3");
        let x = norm(&conv(&x, "layer2.0.downsample.0"), "layer2.0.downsample.1").add(&h).relu();
        x.global_avg_pool2d().matmul(&read("fc").t())
    };
    let x = Tensor::randn(gpu(), [2, 3, 5, 5], &mut Rng::new(4));
    let want = forward(&model, &x);
    let scale = download(&want).iter().fold(1.0f64, |most, x| most.max(x.abs()));
    let apart = most_apart(&want, &forward(&planted(&spec, &model, 1).permuted(&model), &x));
    assert!(apart <= 1e-5 * scale, "{apart} of {scale}");
}
