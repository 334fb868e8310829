//! The settings of a network, as JSON in a file's metadata.

use crate::error::{Error, Result};
use crate::geometry::space::invariants::polynomial_size;
use crate::setters::setters;
use serde_json::{Value, json};

/// The sizes and choices of a [`crate::geometry::Ponita`]. Its grid is kept separately.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct PonitaConfig {
    /// Input scalars per node.
    pub in_scalars: usize,
    /// Input vectors per node.
    pub in_vectors: usize,
    /// Output scalars per node or graph.
    pub out_scalars: usize,
    /// Output vectors per node or graph.
    pub out_vectors: usize,
    /// Features per node and orientation.
    pub channels: usize,
    /// Hidden width of the networks that compute the kernels' bases.
    pub hidden: usize,
    /// Number of functions in each basis of kernels.
    pub basis: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Hidden width of a block's MLP, as a multiple of `channels`.
    pub widening: usize,
    /// Degree of the polynomial features.
    pub degree: usize,
    /// Radius at which the envelope ends. `None` for graphs in which all pairs are joined.
    pub radius: Option<f32>,
    /// Initial value of the factor on each residual branch. `None` if branches have no factor.
    pub layer_scale: Option<f32>,
    /// Whether the outputs are the mean over all blocks' readouts, or the readout of the last block.
    pub every_readout: bool,
    /// Whether outputs are summed over the nodes of a graph.
    pub pool: bool,
}

setters!(PonitaConfig {
    in_scalars: usize,
    in_vectors: usize,
    out_scalars: usize,
    out_vectors: usize,
    channels: usize,
    hidden: usize,
    basis: usize,
    layers: usize,
    widening: usize,
    degree: usize,
    radius: Option<f32>,
    layer_scale: Option<f32>,
    every_readout: bool,
    pool: bool,
});

impl Default for PonitaConfig {
    /// One scalar in and out, 128 channels, 256 basis functions, 5 layers, pooled: the published networks' sizes.
    fn default() -> PonitaConfig {
        PonitaConfig {
            in_scalars: 1,
            in_vectors: 0,
            out_scalars: 1,
            out_vectors: 0,
            channels: 128,
            hidden: 128,
            basis: 256,
            layers: 5,
            widening: 4,
            degree: 3,
            radius: None,
            layer_scale: None,
            every_readout: true,
            pool: true,
        }
    }
}

impl PonitaConfig {
    /// Checks the settings against each other.
    ///
    /// # Errors
    /// When a size cannot work. The message names the setting.
    pub fn check(&self, oriented: bool) -> Result<()> {
        const MOST: usize = 1 << 20;
        let sizes = [
            ("channels", self.channels),
            ("hidden", self.hidden),
            ("basis_dim", self.basis),
            ("layers", self.layers),
            ("widening", self.widening),
            ("degree", self.degree),
            ("in_scalar + in_vec", self.in_scalars.saturating_add(self.in_vectors)),
            ("out_scalar + out_vec", self.out_scalars.saturating_add(self.out_vectors)),
        ];
        if let Some((name, size)) = sizes.iter().find(|(_, size)| !(1..=MOST).contains(size)) {
            return Err(Error::config(format!("ponita: `{name}` is {size}; it must be 1 to {MOST}")));
        }
        if self.degree > 6 {
            return Err(Error::config(format!("ponita: `degree` is {}; 6 is the most", self.degree)));
        }
        if self.radius.is_some_and(|r| !(r.is_finite() && r > 0.0)) {
            return Err(Error::config(format!(
                "ponita: `radius` is {:?}; it must be above 0, or null",
                self.radius
            )));
        }
        if !oriented && self.in_vectors + self.out_vectors > 0 {
            return Err(Error::config(
                "ponita: vectors go in and out through orientations; this grid has none",
            ));
        }
        Ok(())
    }

    /// Returns every parameter with its name, shape and fan-in, which is the number of inputs that one of its outputs
    /// sums. It is 0 for the bias of a convolution, for norms and for scales.
    pub(in crate::geometry) fn parameters(&self, oriented: bool) -> Vec<(String, Vec<usize>, usize)> {
        let (c, h, k) = (self.channels, self.hidden, self.basis);
        let mut all = vec![];
        let mut add = |name: String, shape: &[usize], fan: usize| all.push((name, shape.to_vec(), fan));
        let ins = self.in_scalars + self.in_vectors;
        add("embed.weight".into(), &[c, ins], ins);
        for (name, attributes) in [("basis", 1 + oriented as usize), ("fiber_basis", 1)] {
            let f = polynomial_size(attributes, self.degree);
            if name == "basis" || oriented {
                add(format!("{name}.w1"), &[h, f], f);
                add(format!("{name}.b1"), &[h], f);
                add(format!("{name}.w2"), &[k, h], h);
                add(format!("{name}.b2"), &[k], h);
            }
        }
        let outs = self.out_scalars + self.out_vectors;
        for l in 0..self.layers {
            let wide = self.widening * c;
            add(format!("layer{l}.conv.kernel"), &[c, k], k);
            if oriented {
                add(format!("layer{l}.conv.fiber_kernel"), &[c, k], k);
            }
            add(format!("layer{l}.conv.bias"), &[c], 0);
            add(format!("layer{l}.norm.weight"), &[c], 0);
            add(format!("layer{l}.norm.bias"), &[c], 0);
            add(format!("layer{l}.linear1.weight"), &[wide, c], c);
            add(format!("layer{l}.linear1.bias"), &[wide], c);
            add(format!("layer{l}.linear2.weight"), &[c, wide], wide);
            add(format!("layer{l}.linear2.bias"), &[c], wide);
            if self.layer_scale.is_some() {
                add(format!("layer{l}.layer_scale"), &[c], 0);
            }
            if self.every_readout || l + 1 == self.layers {
                add(format!("readout{l}.weight"), &[outs, c], c);
                add(format!("readout{l}.bias"), &[outs], c);
            }
        }
        all
    }

    /// Returns the settings as JSON, with the names that the reference vectors use.
    pub fn to_json(&self) -> String {
        json!({
            "in_scalar": self.in_scalars, "in_vec": self.in_vectors,
            "out_scalar": self.out_scalars, "out_vec": self.out_vectors,
            "channels": self.channels, "hidden": self.hidden, "basis_dim": self.basis,
            "layers": self.layers, "widening": self.widening, "degree": self.degree,
            "radius": self.radius, "layer_scale": self.layer_scale,
            "multiple_readouts": self.every_readout, "pool": self.pool,
        })
        .to_string()
    }

    /// Reads settings from JSON as [`PonitaConfig::to_json`] writes it. `layer_scale` may also be true or false. Other
    /// keys are ignored.
    ///
    /// # Errors
    /// When the text is not a JSON object, or a setting is missing or of another kind. The message names the setting.
    pub fn from_json(text: &str) -> Result<PonitaConfig> {
        let all: Value =
            serde_json::from_str(text).map_err(|e| Error::config(format!("ponita: config: {e}")))?;
        let wrong = |name: &str, want: &str| {
            Error::config(format!("ponita: config: `{name}` is {}, not {want}", all[name]))
        };
        let size = |name: &str| {
            all[name].as_u64().and_then(|n| usize::try_from(n).ok()).ok_or_else(|| wrong(name, "a size"))
        };
        let flag = |name: &str| all[name].as_bool().ok_or_else(|| wrong(name, "true or false"));
        let number = |name: &str| match &all[name] {
            Value::Null | Value::Bool(false) => Ok(None),
            Value::Bool(true) => Ok(Some(1.0)),
            value => value.as_f64().map(|x| Some(x as f32)).ok_or_else(|| wrong(name, "a number or null")),
        };
        Ok(PonitaConfig {
            in_scalars: size("in_scalar")?,
            in_vectors: size("in_vec")?,
            out_scalars: size("out_scalar")?,
            out_vectors: size("out_vec")?,
            channels: size("channels")?,
            hidden: size("hidden")?,
            basis: size("basis_dim")?,
            layers: size("layers")?,
            widening: size("widening")?,
            degree: size("degree")?,
            radius: number("radius")?,
            layer_scale: number("layer_scale")?,
            every_readout: flag("multiple_readouts")?,
            pool: flag("pool")?,
        })
    }
}
