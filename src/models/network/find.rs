//! Networks that are known by the names and shapes of their weights.

use super::{Conv, Network, NormStep, Pool, Step, eps};
use crate::error::{Error, Result};
use crate::store::Weights;
use std::collections::BTreeMap;

impl Network {
    /// Finds a network by its weights: [`Network::resnet`] if there is a `layer1.0.conv1.weight`, else [`Network::mlp`].
    ///
    /// # Errors
    /// When the weights are neither; the message names what does not fit.
    pub fn of(weights: &dyn Weights) -> Result<Network> {
        match weights.shape("layer1.0.conv1.weight") {
            Ok(_) => Network::resnet(weights),
            Err(_) => Network::mlp(weights).map_err(|error| {
                Error::config(format!("{error}; other networks need a description, {}", super::NETWORK))
            }),
        }
    }

    /// A multilayer perceptron: layers `h = relu(h W^T + b)`, of which the last has no ReLU. Every tensor must be `NAME.weight`
    /// `[out, in]` or `NAME.bias` `[out]`. Layers are sorted by name, with numbers in names by value, and each must have as many
    /// inputs as the one before has outputs.
    ///
    /// # Errors
    /// When the weights are not such a network; the message names what does not fit.
    pub fn mlp(weights: &dyn Weights) -> Result<Network> {
        let no = |message: String| Error::config(format!("not a plain multilayer perceptron: {message}"));
        let mut layers = Vec::new();
        for name in weights.names() {
            let shape = weights.shape(&name)?;
            match (name.rsplit_once('.'), &shape[..]) {
                (Some((layer, "weight")), &[out, inner]) => layers.push((layer.to_string(), out, inner)),
                (Some((layer, "bias")), &[out]) => {
                    let weight = format!("{layer}.weight");
                    if weights.shape(&weight).ok().and_then(|shape| shape.first().copied()) != Some(out) {
                        return Err(no(format!("`{name}` [{out}] has no `{weight}` of as many rows")));
                    }
                }
                _ => return Err(no(format!("`{name}` {shape:?} is neither NAME.weight nor NAME.bias"))),
            }
        }
        layers.sort_by_key(|(layer, ..)| natural(layer));
        let Some((_, _, mut have)) = layers.first().cloned() else {
            return Err(no("there is no tensor".into()));
        };
        let mut steps = Vec::new();
        for (layer, out, inner) in layers {
            if have != inner {
                return Err(no(format!(
                    "`{layer}.weight` [{out}, {inner}] follows a layer of {have} outputs"
                )));
            }
            have = out;
            steps.extend([Step::Linear(layer), Step::Relu]);
        }
        steps.pop();
        Ok(Network { input: None, steps })
    }

    /// A ResNet with the names of torchvision: `conv1`, `bn1`, `layerL.B.convN`, `layerL.B.bnN`, `layerL.B.downsample.{0,1}` (or
    /// `shortcut`), `fc` (or `linear`), with batch norms. A stem with windows of 7 has stride 2 and a max pool, as on ImageNet; one
    /// with windows of 3 has neither, as on CIFAR. The first block of each stage but the first has stride 2, in its convolution with
    /// windows of 3 (torchvision's version 1.5).
    ///
    /// # Errors
    /// When a layer is missing.
    pub fn resnet(weights: &dyn Weights) -> Result<Network> {
        let names = weights.names();
        let stem = weights.shape("conv1.weight")?;
        let large = stem.get(2).is_some_and(|&size| size > 3);
        let conv = |name: String, stride: usize| -> Result<Step> {
            let size = weights.shape(&format!("{name}.weight"))?.get(2).copied().unwrap_or(1);
            Ok(Step::Conv(Conv { name, stride, padding: size / 2, groups: 1 }))
        };
        let norm = |name: String| Step::BatchNorm(NormStep { name, eps: eps(), groups: 1 });
        let mut steps =
            vec![conv("conv1".into(), if large { 2 } else { 1 })?, norm("bn1".into()), Step::Relu];
        if large {
            steps.push(Step::MaxPool(Pool { size: 3, stride: Some(2), padding: 1 }));
        }
        for ((stage, number), convs) in blocks(&names) {
            let block = format!("layer{stage}.{number}");
            let has = |layer: &str| names.iter().any(|name| name == &format!("{block}.{layer}.weight"));
            let stride = if stage > 1 && number == 0 { 2 } else { 1 };
            // The convolution that takes the stride: the first with windows of more than one element.
            let strided = if convs == 3 { 2 } else { 1 };
            let mut body = Vec::new();
            for i in 1..=convs {
                let own = if i == strided { stride } else { 1 };
                body.extend([
                    conv(format!("{block}.conv{i}"), own)?,
                    norm(format!("{block}.bn{i}")),
                    Step::Relu,
                ]);
            }
            // The last one is added before its nonlinearity.
            body.pop();
            let beside = ["downsample", "shortcut"].into_iter().find(|name| has(&format!("{name}.0")));
            let shortcut = match beside.map(|name| format!("{block}.{name}")) {
                Some(name) => vec![conv(format!("{name}.0"), stride)?, norm(format!("{name}.1"))],
                None => Vec::new(),
            };
            steps.extend([Step::Residual { body, shortcut }, Step::Relu]);
        }
        let head = if names.iter().any(|name| name == "fc.weight") { "fc" } else { "linear" };
        weights.shape(&format!("{head}.weight"))?;
        steps.extend([Step::GlobalPool, Step::Linear(head.into())]);
        Ok(Network { input: None, steps })
    }
}

/// Stage, number and count of convolutions of every block of a ResNet, in order.
fn blocks(names: &[String]) -> BTreeMap<(usize, usize), usize> {
    let mut all: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    for name in names {
        let mut parts = name.strip_prefix("layer").unwrap_or("").split('.');
        let mut number = || parts.next()?.parse().ok();
        let (Some(stage), Some(block)) = (number(), number()) else { continue };
        let conv = parts.next().and_then(|part| part.strip_prefix("conv")?.parse().ok()).unwrap_or(0);
        let most = all.entry((stage, block)).or_default();
        *most = (*most).max(conv);
    }
    all
}

/// Splits a name into words and numbers. Sorted by these, `fc10` follows `fc9`.
fn natural(name: &str) -> Vec<(u64, String)> {
    let mut parts: Vec<(u64, String)> = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let word = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let (text, tail) = rest.split_at(word);
        parts.push((0, text.to_string()));
        let digits = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
        let (number, tail) = tail.split_at(digits);
        if !number.is_empty() {
            parts.push((number.parse().unwrap_or(u64::MAX), String::new()));
        }
        rest = tail;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Gpu;
    use crate::tensor::Tensor;

    /// Weights that have shapes but no elements.
    struct Shapes(BTreeMap<String, Vec<usize>>);

    impl Weights for Shapes {
        fn names(&self) -> Vec<String> {
            self.0.keys().cloned().collect()
        }
        fn shape(&self, name: &str) -> Result<Vec<usize>> {
            self.0.get(name).cloned().ok_or_else(|| Error::config(format!("no `{name}`")))
        }
        fn read(&self, _: &Gpu, _: &str) -> Result<Tensor> {
            Err(Error::config("shapes only"))
        }
    }

    fn shapes(all: &[(&str, &[usize])]) -> Shapes {
        Shapes(all.iter().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect())
    }

    #[test]
    fn layers_follow_their_numbers() {
        let weights = shapes(&[("fc10.weight", &[2, 5]), ("fc9.weight", &[5, 3]), ("fc9.bias", &[5])]);
        let net = Network::of(&weights).unwrap();
        assert_eq!(net.layers(), ["fc9", "fc10"]);
        assert_eq!(net.output(&weights, &[7, 3]).unwrap(), [7, 2]);
        assert!(net.check(&weights, &[7, 3], &[0, 1]).is_ok());
        for (input, labels, words) in [
            (&[7, 4][..], &[0][..], "`fc9` reads 3 inputs, and gets [7, 4]"),
            (&[7, 3], &[0, 2], "label 2 of row 1 is none of the network's 2"),
        ] {
            let message = net.check(&weights, input, labels).expect_err(words).to_string();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn other_networks_are_refused() {
        type All<'a> = &'a [(&'a str, &'a [usize])];
        let cases: [(All, &str); 5] = [
            (&[], "there is no tensor"),
            (
                &[("a.weight", &[2, 3]), ("b.weight", &[4, 3])],
                "`b.weight` [4, 3] follows a layer of 2 outputs",
            ),
            (&[("a.weight", &[2, 3, 3, 3])], "`a.weight` [2, 3, 3, 3] is neither"),
            (&[("a.weight", &[2, 3]), ("a.bias", &[3])], "`a.bias` [3] has no `a.weight` of as many rows"),
            (&[("a.weight", &[2, 3]), ("norm.gain", &[3])], "`norm.gain` [3] is neither"),
        ];
        for (all, words) in cases {
            let message = Network::of(&shapes(all)).expect_err(words).to_string();
            assert!(message.contains(words), "{message}");
        }
    }

    /// The tensors of torchvision's ResNet-18 and of the first bottleneck blocks of its ResNet-50, with narrow layers.
    fn resnet(bottleneck: bool) -> Shapes {
        let mut all = BTreeMap::new();
        let mut layer = |conv: String, norm: String, shape: [usize; 4]| {
            for part in ["weight", "bias", "running_mean", "running_var"] {
                all.insert(format!("{norm}.{part}"), vec![shape[0]]);
            }
            all.insert(format!("{conv}.weight"), shape.to_vec());
        };
        layer("conv1".into(), "bn1".into(), [8, 3, 7, 7]);
        let mut inner = 8;
        for stage in 1..=2 {
            for block in 0..2 {
                let (name, width) = (format!("layer{stage}.{block}"), 8 * stage);
                let out = if bottleneck { 4 * width } else { width };
                let convs: &[[usize; 3]] = match bottleneck {
                    true => &[[width, inner, 1], [width, width, 3], [out, width, 1]],
                    false => &[[width, inner, 3], [width, width, 3]],
                };
                for (i, &[to, from, k]) in convs.iter().enumerate() {
                    let i = i + 1;
                    layer(format!("{name}.conv{i}"), format!("{name}.bn{i}"), [to, from, k, k]);
                }
                if inner != out {
                    let beside = format!("{name}.downsample");
                    layer(format!("{beside}.0"), format!("{beside}.1"), [out, inner, 1, 1]);
                }
                inner = out;
            }
        }
        all.insert("fc.weight".into(), vec![10, inner]);
        all.insert("fc.bias".into(), vec![10]);
        Shapes(all)
    }

    #[test]
    fn resnets_are_known_by_their_names() {
        for bottleneck in [false, true] {
            let weights = resnet(bottleneck);
            let network = Network::of(&weights).unwrap();
            // 64 pixels become 32 in the stem, 16 in the pool and 8 in the second stage.
            assert_eq!(network.output(&weights, &[5, 3, 64, 64]).unwrap(), [5, 10]);
            let convs = weights.0.keys().filter(|name| name.ends_with("running_mean")).count();
            assert_eq!(network.batch_norms().len(), convs, "every norm is used");
            assert_eq!(network.layers().len(), convs + 1);
            let text = network.to_json();
            assert_eq!(Network::from_json(&text).unwrap(), network);
        }
        // In a bottleneck, the convolution with windows of 3 has the stride.
        let text = Network::of(&resnet(true)).unwrap().to_json().replace(char::is_whitespace, "");
        assert!(text.contains(r#"{"name":"layer2.0.conv2","stride":2,"padding":1,"groups":1}"#), "{text}");
        assert!(text.contains(r#"{"name":"layer2.0.conv1","stride":1,"padding":0,"groups":1}"#), "{text}");
    }

    #[test]
    fn descriptions_that_do_not_fit_are_errors() {
        let weights = shapes(&[
            ("c.weight", &[4, 2, 3, 3]),
            ("n.weight", &[4]),
            ("n.bias", &[4]),
            ("f.weight", &[3, 4]),
            ("f.bias", &[2]),
        ]);
        for (steps, words) in [
            (r#"{"conv": {"name": "c"}}"#, "`c`: 1 groups of 2 channels to 4, stride 1, on 1 channels"),
            (r#"{"conv": {"name": "c", "stride": 0}}"#, "stride 0"),
            (r#"{"conv": {"name": "none"}}"#, "no `none.weight`"),
            (r#""flatten", {"linear": "f"}"#, "`f` reads 4 inputs, and gets [2, 64]"),
            (r#""global_pool", {"linear": "c"}"#, "`c.weight` is [4, 2, 3, 3]; a linear layer has [out, in]"),
            (r#"{"max_pool": {"size": 9}}"#, "a pool of windows of 9 does not fit [2, 1, 8, 8]"),
            (r#"{"group_norm": {"name": "n", "groups": 0}}"#, "`n`: 0 groups do not divide 1 channels"),
            (r#"{"layer_norm": {"name": "n"}}"#, "`n.weight` is [4], on [2, 1, 8, 8]"),
            (
                r#"{"residual": {"body": ["flatten"]}}"#,
                "a branch gives [2, 64], and the steps beside it [2, 1, 8, 8]",
            ),
        ] {
            let network =
                Network::from_json(&format!(r#"{{"input": [1, 8, 8], "steps": [{steps}]}}"#)).unwrap();
            let message = network.output(&weights, &[2, 64]).expect_err(words).to_string();
            assert!(message.contains(words), "{message}");
        }
        for (text, words) in [
            (r#"{"steps": []}"#, "needs steps"),
            (r#"{"steps": ["tanh"]}"#, "unknown variant `tanh`"),
            (r#"{"steps": [{"conv": {"name": "c", "strid": 2}}]}"#, "unknown field `strid`"),
            ("[", "line 1"),
        ] {
            let message = Network::from_json(text).expect_err(words).to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
