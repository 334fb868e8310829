//! Multilayer perceptrons as named weights. The command line can evaluate these without a description of the network.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::Linear;
use crate::share::{Site, Tied};
use crate::store::Weights;
use crate::tensor::Tensor;

/// The layers of a ReLU network, each `h = relu(h W^T + b)`. The last layer has no ReLU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MlpModel {
    layers: Vec<String>,
    /// Inputs of the network, then outputs of each layer.
    sizes: Vec<usize>,
}

impl MlpModel {
    /// Finds the layers. Every tensor must be `NAME.weight` `[out, in]` or `NAME.bias` `[out]`. Layers are sorted by name, with
    /// numbers in names by value, and each must have as many inputs as the one before has outputs.
    ///
    /// # Errors
    /// When the weights are not such a network; the message names what does not fit.
    pub fn of(weights: &dyn Weights) -> Result<MlpModel> {
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
        let Some(first) = layers.first() else { return Err(no("there is no tensor".into())) };
        let mut sizes = vec![first.2];
        for (layer, out, inner) in &layers {
            let have = sizes[sizes.len() - 1];
            if have != *inner {
                return Err(no(format!(
                    "`{layer}.weight` [{out}, {inner}] follows a layer of {have} outputs"
                )));
            }
            sizes.push(*out);
        }
        Ok(MlpModel { layers: layers.into_iter().map(|(layer, ..)| layer).collect(), sizes })
    }

    /// Names of the layers, in order.
    pub fn layers(&self) -> Vec<&str> {
        self.layers.iter().map(String::as_str).collect()
    }

    /// Inputs of the network, then outputs of each layer.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// Computes the outputs of every layer for `x [batch, inputs]`: those of hidden layers after their ReLU, then the logits.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    ///
    /// # Panics
    /// When `x` has another number of inputs than the network.
    #[track_caller]
    pub fn outputs(&self, gpu: &Gpu, weights: &dyn Weights, x: &Tensor) -> Result<Vec<Tensor>> {
        let mut all: Vec<Tensor> = Vec::with_capacity(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            let weight = weights.read(gpu, &format!("{layer}.weight"))?;
            let bias = format!("{layer}.bias");
            let bias = match weights.shape(&bias) {
                Ok(_) => Some(weights.read(gpu, &bias)?),
                Err(_) => None,
            };
            let linear = Linear::from_site(Tied::new(&weight).shared(), bias);
            let h = linear.forward(all.last().unwrap_or(x));
            all.push(if i + 1 < self.layers.len() { h.relu() } else { h });
        }
        Ok(all)
    }

    /// Computes the logits for `x [batch, inputs]`.
    ///
    /// # Errors
    /// As [`MlpModel::outputs`].
    ///
    /// # Panics
    /// As [`MlpModel::outputs`].
    #[track_caller]
    pub fn logits(&self, gpu: &Gpu, weights: &dyn Weights, x: &Tensor) -> Result<Tensor> {
        Ok(self.outputs(gpu, weights, x)?.pop().expect("a network has a layer"))
    }
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
    use std::collections::BTreeMap;

    /// Weights that have shapes but no elements.
    struct Shapes(BTreeMap<&'static str, Vec<usize>>);

    impl Weights for Shapes {
        fn names(&self) -> Vec<String> {
            self.0.keys().map(|name| name.to_string()).collect()
        }
        fn shape(&self, name: &str) -> Result<Vec<usize>> {
            self.0.get(name).cloned().ok_or_else(|| Error::config("missing"))
        }
        fn read(&self, _: &Gpu, _: &str) -> Result<Tensor> {
            Err(Error::config("shapes only"))
        }
    }

    fn of(shapes: &[(&'static str, &[usize])]) -> Result<MlpModel> {
        MlpModel::of(&Shapes(shapes.iter().map(|(name, shape)| (*name, shape.to_vec())).collect()))
    }

    #[test]
    fn layers_follow_their_numbers() {
        let net = of(&[("fc10.weight", &[2, 5]), ("fc9.weight", &[5, 3]), ("fc9.bias", &[5])]).unwrap();
        assert_eq!(net.layers(), ["fc9", "fc10"]);
        assert_eq!(net.sizes(), [3, 5, 2]);
    }

    #[test]
    fn other_networks_are_refused() {
        type Shapes<'a> = &'a [(&'static str, &'a [usize])];
        let cases: [(Shapes, &str); 5] = [
            (&[], "there is no tensor"),
            (
                &[("a.weight", &[2, 3]), ("b.weight", &[4, 3])],
                "`b.weight` [4, 3] follows a layer of 2 outputs",
            ),
            (&[("a.weight", &[2, 3, 3, 3])], "`a.weight` [2, 3, 3, 3] is neither"),
            (&[("a.weight", &[2, 3]), ("a.bias", &[3])], "`a.bias` [3] has no `a.weight` of as many rows"),
            (&[("a.weight", &[2, 3]), ("norm.gain", &[3])], "`norm.gain` [3] is neither"),
        ];
        for (shapes, words) in cases {
            let message = of(shapes).expect_err(words).to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
