//! Builds specs of common architectures from a model's tensor names and shapes.

use super::spec::{Axis, Group, GroupKind, Heads, Spec};
use crate::error::{Error, Result};
use crate::merge::Shards;
use crate::models::network::{NETWORK, Network};
use crate::store::Weights;
use std::collections::BTreeMap;
use std::path::Path;

/// Builds a spec layer by layer. A layer `fc` has `fc.weight` `[out, in, ..]` and may have `fc.bias`; a norm may have a gain, a
/// bias and running statistics. Tensors that the model does not have are left out of the spec.
pub struct Builder<'a> {
    shapes: BTreeMap<String, Vec<usize>>,
    spec: Spec,
    /// Each group's index in the spec.
    groups: BTreeMap<String, usize>,
    weights: &'a dyn Weights,
}

impl<'a> Builder<'a> {
    /// Starts an empty spec for a model with these tensors.
    ///
    /// # Errors
    /// When a shape cannot be read.
    pub fn new(weights: &'a dyn Weights) -> Result<Builder<'a>> {
        let shapes = weights.names().into_iter().map(|name| Ok((name.clone(), weights.shape(&name)?)));
        let shapes = shapes.collect::<Result<_>>()?;
        Ok(Builder { shapes, spec: Spec::default(), groups: BTreeMap::new(), weights })
    }

    /// The shape of a layer's weight.
    ///
    /// # Errors
    /// When the model has no `layer.weight`; the message lists the first tensors that it has.
    pub fn weight(&self, layer: &str) -> Result<&[usize]> {
        let name = format!("{layer}.weight");
        self.shapes.get(&name).map(|shape| &shape[..]).ok_or_else(|| {
            let names: Vec<String> = self.weights.names().into_iter().take(8).collect();
            Error::config(format!("the model has no tensor `{name}`; its first are {}", names.join(", ")))
        })
    }

    /// Whether the model has this tensor.
    pub fn has(&self, tensor: &str) -> bool {
        self.shapes.contains_key(tensor)
    }

    /// Number of axes of a tensor that belong to groups.
    pub(super) fn axes(&self, tensor: &str) -> usize {
        let of = |group: &Group| match &group.kind {
            GroupKind::Units(axes) => axes.iter().filter(|axis| axis.tensor == tensor).count(),
            GroupKind::Heads(_) => 0,
        };
        self.spec.groups.iter().map(of).sum()
    }

    /// Names of the model's tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shapes.keys().map(String::as_str)
    }

    /// Adds an axis to a group, if the model has the tensor.
    pub fn axis(&mut self, group: &str, tensor: &str, axis: usize, repeat: usize) -> &mut Self {
        if !self.has(tensor) {
            return self;
        }
        let place = *self.groups.entry(group.to_string()).or_insert(self.spec.groups.len());
        if place == self.spec.groups.len() {
            self.spec.groups.push(Group { name: group.to_string(), kind: GroupKind::Units(Vec::new()) });
        }
        if let GroupKind::Units(axes) = &mut self.spec.groups[place].kind {
            axes.push(Axis { repeat, ..Axis::new(tensor, axis) });
        }
        self
    }

    /// Adds the rows of a layer's weight and its bias: the layer's outputs are the group's units.
    pub fn writes(&mut self, group: &str, layer: &str) -> &mut Self {
        self.axis(group, &format!("{layer}.weight"), 0, 1).axis(group, &format!("{layer}.bias"), 0, 1)
    }

    /// Adds the second axis of a layer's weight: the layer's inputs are the group's units. Behind a flatten, `repeat` is the
    /// number of columns per unit.
    pub fn reads(&mut self, group: &str, layer: &str, repeat: usize) -> &mut Self {
        self.axis(group, &format!("{layer}.weight"), 1, repeat)
    }

    /// Adds a norm over this group: its gain, bias and running statistics. Its counter of batches becomes `ignored`.
    pub fn norm(&mut self, group: &str, norm: &str) -> &mut Self {
        for part in ["weight", "bias"] {
            self.axis(group, &format!("{norm}.{part}"), 0, 1);
        }
        for part in ["running_mean", "running_var"] {
            let name = format!("{norm}.{part}");
            if self.has(&name) {
                self.axis(group, &name, 0, 1);
                self.spec.statistics.push(name);
            }
        }
        let counter = format!("{norm}.num_batches_tracked");
        if self.has(&counter) {
            self.spec.ignored.push(counter);
        }
        self
    }

    /// Adds attention heads: `q`, `k` and `v` are the layers that compute queries, keys and values, `o` is the output layer.
    /// `sizes` are the numbers of query heads and of key and value heads.
    pub fn heads(
        &mut self,
        group: &str,
        [q, k, v, o]: [&str; 4],
        sizes: [usize; 2],
        rotary: bool,
    ) -> &mut Self {
        let rows = |layer: &str| -> Vec<Axis> {
            let names = ["weight", "bias"].map(|part| format!("{layer}.{part}"));
            names.into_iter().filter(|name| self.has(name)).map(|name| Axis::new(name, 0)).collect()
        };
        let [heads, kv_heads] = sizes;
        let o = vec![Axis::new(format!("{o}.weight"), 1)];
        let heads = Heads { heads, kv_heads, rotary, q: rows(q), k: rows(k), v: rows(v), o };
        self.spec.groups.push(Group { name: group.to_string(), kind: GroupKind::Heads(heads) });
        self
    }

    /// Adds a tensor that does not move, if the model has it.
    pub fn fixed(&mut self, tensor: &str) -> &mut Self {
        if self.has(tensor) {
            self.spec.fixed.push(tensor.to_string());
        }
        self
    }

    /// The spec.
    pub fn build(self) -> Spec {
        self.spec
    }
}

/// A layer of a network without branches, and the norm after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerNames {
    /// Dense `[out, in]` or convolution `[out, in, height, width]`.
    pub name: String,
    /// The norm over its output, if any.
    pub norm: Option<String>,
}

impl LayerNames {
    /// A layer without a norm.
    pub fn plain(name: impl Into<String>) -> LayerNames {
        LayerNames { name: name.into(), norm: None }
    }

    /// A layer with a norm after it.
    pub fn normed(name: impl Into<String>, norm: impl Into<String>) -> LayerNames {
        LayerNames { name: name.into(), norm: Some(norm.into()) }
    }
}

/// Names of a pre-norm transformer's parts. Names within a block are given without the prefix `block` and the block's number.
#[derive(Clone, Copy, Debug)]
pub struct TransformerNames<'a> {
    /// Tables and layers `[.., width]` whose second axis is the residual stream: token and position embeddings, the output head.
    pub tables: &'a [&'a str],
    /// The prefix before a block's number, such as `model.layers.`. If no tensor's name has it, the model is one block whose
    /// names have neither prefix nor number.
    pub block: &'a str,
    /// Norms of a block over the residual stream.
    pub norms: &'a [&'a str],
    /// The attention layers `q k v o`.
    pub attention: [&'a str; 4],
    /// The layers of the MLP that read the residual stream: `up`, and `gate` if there is one.
    pub ups: &'a [&'a str],
    /// The layer of the MLP that writes the residual stream.
    pub down: &'a str,
    /// The norm before the head.
    pub norm: &'a str,
    /// Per-head norms of queries and keys. A model with these needs `rotary`, which keeps elements in place inside a head.
    pub head_norms: &'a [&'a str],
}

impl Spec {
    /// Returns the spec that a user names: `mlp`, `resnet`, `network` for one that its `network.json` describes, `llama:HEADS:KV_HEADS`, `llama` for a model with a `config.json`
    /// beside it, or the path of a spec file.
    ///
    /// # Errors
    /// When the model is not of that kind, numbers of heads are not those of its `config.json`, or a file cannot be read.
    pub fn named(name: &str, model: &Shards) -> Result<Spec> {
        let mut parts = name.split(':');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("mlp"), None, ..) => Spec::mlp(model, &Network::mlp(model)?.layers()),
            (Some("resnet"), None, ..) => Spec::resnet(model),
            (Some("network"), None, ..) => {
                let described = model.path().with_file_name(NETWORK);
                let network =
                    if described.is_file() { Network::read(described)? } else { Network::of(model)? };
                Spec::network(model, &network)
            }
            (Some("llama"), None, ..) => {
                let [heads, kv_heads] = config_heads(&model.path().with_file_name("config.json"))?;
                Spec::llama(model, heads, kv_heads)
            }
            (Some("llama"), Some(heads), Some(kv_heads), None) => match (heads.parse(), kv_heads.parse()) {
                (Ok(heads), Ok(kv_heads)) => {
                    check_heads(model, [heads, kv_heads])?;
                    Spec::llama(model, heads, kv_heads)
                }
                _ => Err(Error::config(format!(
                    "spec `{name}`: write llama:HEADS:KV_HEADS, such as llama:9:3"
                ))),
            },
            _ => Spec::read(name),
        }
    }

    /// A chain of dense layers. Each hidden layer is one group (`P0`, `P1`, ..): its rows, its bias and the next layer's columns.
    ///
    /// # Errors
    /// When a layer is missing or does not fit the one before.
    pub fn mlp(weights: &dyn Weights, layers: &[&str]) -> Result<Spec> {
        let layers: Vec<LayerNames> = layers.iter().map(|name| LayerNames::plain(*name)).collect();
        Spec::cnn(weights, &layers)
    }

    /// A chain of convolutions and dense layers with norms. A depthwise convolution belongs to the group of the layer before it.
    /// A dense layer behind a flattened image has a block of columns per channel, which moves as one.
    ///
    /// # Errors
    /// As [`Spec::mlp`].
    pub fn cnn(weights: &dyn Weights, layers: &[LayerNames]) -> Result<Spec> {
        let mut spec = Builder::new(weights)?;
        let mut group: Option<(String, usize)> = None;
        let mut made = 0;
        for (i, layer) in layers.iter().enumerate() {
            let shape = spec.weight(&layer.name)?.to_vec();
            let [out, inner] = [0, 1].map(|axis| shape.get(axis).copied().unwrap_or(0));
            let depthwise = shape.len() > 2
                && inner == 1
                && group.as_ref().is_some_and(|(_, units)| *units == out && out > 1);
            if let Some((before, units)) = group.as_ref().filter(|_| !depthwise) {
                if inner == 0 || *units == 0 || inner % units != 0 || shape.len() > 2 && inner != *units {
                    return Err(Error::config(format!(
                        "layer `{}` {shape:?} does not read the {units} units of the layer before it",
                        layer.name
                    )));
                }
                spec.reads(before, &layer.name, inner / units);
            }
            let last = i + 1 == layers.len();
            if last {
                spec.fixed(&format!("{}.bias", layer.name));
                if group.is_none() {
                    spec.fixed(&format!("{}.weight", layer.name));
                }
            } else {
                if !depthwise {
                    group = Some((format!("P{made}"), out));
                    made += 1;
                }
                let Some((name, _)) = &group else { continue };
                spec.writes(name, &layer.name);
                if let Some(norm) = &layer.norm {
                    spec.norm(name, norm);
                }
            }
        }
        Ok(spec.build())
    }

    /// A ResNet with the names of torchvision: `conv1`, `bn1`, `layerL.B.convN`, `layerL.B.bnN`, `layerL.B.downsample.{0,1}` (or
    /// `shortcut`), `fc` (or `linear`). There is one group per residual stream (every projection shortcut begins a new one) and
    /// one per inner layer of a block.
    ///
    /// # Errors
    /// When a layer is missing.
    pub fn resnet(weights: &dyn Weights) -> Result<Spec> {
        let mut spec = Builder::new(weights)?;
        spec.weight("conv1")?;
        spec.writes("stem", "conv1").norm("stem", "bn1");
        let mut stage = "stem".to_string();
        let mut blocks: Vec<(usize, usize)> = spec.names().filter_map(block_of).collect();
        blocks.sort_unstable();
        blocks.dedup();
        for (l, b) in blocks {
            let block = format!("layer{l}.{b}");
            let convs: Vec<usize> =
                (1..=3).filter(|c| spec.has(&format!("{block}.conv{c}.weight"))).collect();
            let mut input = stage.clone();
            for &c in &convs {
                let (conv, norm) = (format!("{block}.conv{c}"), format!("{block}.bn{c}"));
                spec.reads(&input, &conv, 1);
                if Some(&c) != convs.last() {
                    input = format!("{block}.inner{c}");
                    spec.writes(&input, &conv).norm(&input, &norm);
                    continue;
                }
                for shortcut in ["downsample", "shortcut"].map(|name| format!("{block}.{name}")) {
                    if spec.has(&format!("{shortcut}.0.weight")) {
                        spec.reads(&stage, &format!("{shortcut}.0"), 1);
                        // The sum behind a projection is a new residual stream.
                        stage = format!("{block}.stream");
                        spec.writes(&stage, &format!("{shortcut}.0")).norm(&stage, &format!("{shortcut}.1"));
                    }
                }
                spec.writes(&stage, &conv).norm(&stage, &norm);
            }
        }
        let head = if spec.has("fc.weight") { "fc" } else { "linear" };
        spec.weight(head)?;
        spec.reads(&stage, head, 1).fixed(&format!("{head}.bias"));
        Ok(spec.build())
    }

    /// A pre-norm transformer: group `res` is the residual stream; each block adds `ffN` and `headsN`. `sizes` are the numbers of
    /// query heads and of key and value heads.
    ///
    /// # Errors
    /// When a block's layers are missing.
    pub fn transformer(
        weights: &dyn Weights,
        names: &TransformerNames,
        sizes: [usize; 2],
        rotary: bool,
    ) -> Result<Spec> {
        let mut spec = Builder::new(weights)?;
        for table in names.tables {
            spec.axis("res", &format!("{table}.weight"), 1, 1).fixed(&format!("{table}.bias"));
        }
        let number = |name: &str| name.strip_prefix(names.block)?.split_once('.')?.0.parse::<usize>().ok();
        let mut numbers: Vec<usize> = spec.names().filter_map(number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let blocks: Vec<(String, String)> = match numbers.is_empty() {
            true => vec![(String::new(), String::new())],
            false => numbers.iter().map(|n| (n.to_string(), format!("{}{n}.", names.block))).collect(),
        };
        for (n, block) in &blocks {
            let of = |part: &str| format!("{block}{part}");
            for part in names.attention.iter().chain(names.ups).chain([&names.down]) {
                spec.weight(&of(part))?;
            }
            for norm in names.norms {
                spec.norm("res", &of(norm));
            }
            for part in names.attention[..3].iter().chain(names.ups) {
                spec.reads("res", &of(part), 1);
            }
            spec.writes("res", &of(names.attention[3])).writes("res", &of(names.down));
            let ff = format!("ff{n}");
            for up in names.ups {
                spec.writes(&ff, &of(up));
            }
            spec.reads(&ff, &of(names.down), 1);
            let [q, k, v, o] = names.attention.map(of);
            spec.heads(&format!("heads{n}"), [&q, &k, &v, &o], sizes, rotary);
            for norm in names.head_norms {
                spec.fixed(&format!("{}.weight", of(norm))).fixed(&format!("{}.bias", of(norm)));
            }
        }
        spec.norm("res", names.norm);
        Ok(spec.build())
    }

    /// A model of the Llama type with Hugging Face's names (`model.layers.N.self_attn.q_proj`): Llama, Mistral, Qwen, SmolLM.
    ///
    /// # Errors
    /// As [`Spec::transformer`].
    pub fn llama(weights: &dyn Weights, heads: usize, kv_heads: usize) -> Result<Spec> {
        let names = TransformerNames {
            tables: &["model.embed_tokens", "lm_head"],
            block: "model.layers.",
            norms: &["input_layernorm", "post_attention_layernorm"],
            attention: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
            ups: &["mlp.gate_proj", "mlp.up_proj"],
            down: "mlp.down_proj",
            norm: "model.norm",
            head_norms: &["self_attn.q_norm", "self_attn.k_norm"],
        };
        let mut spec = Spec::transformer(weights, &names, [heads, kv_heads], true)?;
        // Older files carry the rotary frequencies.
        spec.ignored.push("*rotary_emb.inv_freq".into());
        Ok(spec)
    }
}

/// Refuses numbers of heads other than those of the `config.json` beside the model, if there is one. Other numbers that divide the
/// rows would make a permutation that changes what the model computes.
fn check_heads(model: &Shards, given: [usize; 2]) -> Result<()> {
    let path = model.path().with_file_name("config.json");
    if !path.is_file() {
        return Ok(());
    }
    let found = config_heads(&path)?;
    match found == given {
        true => Ok(()),
        false => Err(Error::config(format!(
            "spec: {} heads and {} key and value heads were given, and {} says {} and {}; `llama` takes these",
            given[0],
            given[1],
            path.display(),
            found[0],
            found[1]
        ))),
    }
}

/// Reads the numbers of query heads and of key heads from a `config.json` of Hugging Face.
fn config_heads(path: &Path) -> Result<[usize; 2]> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let config: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| Error::format(path, e.to_string()).because_of(e))?;
    let whole = |key: &str| config[key].as_u64().filter(|&n| n > 0).map(|n| n as usize);
    let heads = whole("num_attention_heads")
        .ok_or_else(|| Error::format(path, "`num_attention_heads` is no number above 0"))?;
    Ok([heads, whole("num_key_value_heads").unwrap_or(heads)])
}

/// Returns stage and block of a name such as `layer2.0.conv1.weight`.
fn block_of(name: &str) -> Option<(usize, usize)> {
    let mut parts = name.strip_prefix("layer")?.split('.');
    let stage = parts.next()?.parse().ok()?;
    Some((stage, parts.next()?.parse().ok()?))
}
