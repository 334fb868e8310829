//! Llama-type language models: RMS norms, rotary positions, grouped-query attention, a gated MLP.
//!
//! `x += attn(norm1(x))`, then `x += down(silu(gate(norm2(x))) * up(norm2(x)))`. Every linear layer is a site, so any
//! kind of sharing can supply its weight. Weights come from llama.cpp's GGUF files or from safetensors with the names of
//! Hugging Face. The two differ in which elements of a head are rotated together.

mod config;

pub use config::LlamaConfig;

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::{Activation, Embedding, Linear, Mask, Module, Norm, Parameters, join};
use crate::ops::product::site::Site;
use crate::ops::sequence::cache::KvCache;
use crate::ops::sequence::rope::{Pairing, Rope};
use crate::share::{Dictionary, LowRank, Tied};
use crate::store::Weights;
use crate::store::gguf::Gguf;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::ops::Range;
use std::sync::Arc;

/// One block.
#[derive(Clone)]
pub struct LlamaLayer {
    /// Before attention.
    pub norm1: Norm,
    /// `q k v o`
    pub attention: [Linear; 4],
    /// Before the MLP.
    pub norm2: Norm,
    /// `gate up down`
    pub mlp: [Linear; 3],
}

/// Names of a block's linear layers, attention's first.
pub const LINEARS: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

impl LlamaLayer {
    /// The linear layer at this position in [`LINEARS`].
    pub fn linear(&self, i: usize) -> &Linear {
        if i < 4 { &self.attention[i] } else { &self.mlp[i - 4] }
    }

    /// The same, mutable, so that its weight can be exchanged.
    pub fn linear_mut(&mut self, i: usize) -> &mut Linear {
        if i < 4 { &mut self.attention[i] } else { &mut self.mlp[i - 4] }
    }

    fn mlp(&self, x: &Tensor) -> Tensor {
        let [gate, up, down] = &self.mlp;
        let normed = self.norm2.forward(x);
        let hidden = gate.forward_with(&normed, Activation::Silu, None).mul(&up.forward(&normed));
        down.forward_with(&hidden, Activation::None, Some(x))
    }
}

/// One linear layer of neighbouring blocks, computed from a dictionary (MASA).
#[derive(Clone)]
#[non_exhaustive]
pub struct Made {
    /// Its position in [`LINEARS`].
    pub linear: usize,
    /// The blocks.
    pub layers: Range<usize>,
    /// The dictionary, which has one layer for each block.
    pub dictionary: Dictionary,
    /// `A [rank, in]` and `B [out, rank]` of each block, whose product is added. Empty if there are none.
    pub own: Vec<[Tensor; 2]>,
}

impl Made {
    /// Returns the weights of all blocks, computed in one pass.
    fn sites(&self) -> Vec<Arc<dyn Site>> {
        if self.own.is_empty() {
            return self.dictionary.weights();
        }
        let all = self.dictionary.atoms.combine(&self.dictionary.coefficients);
        let with =
            |(w, [a, b]): (&Tensor, &[Tensor; 2])| Arc::new(LowRank::new(w, a, b, 1.0)) as Arc<dyn Site>;
        all.iter().zip(&self.own).map(with).collect()
    }
}

/// The model.
#[derive(Clone)]
pub struct Llama {
    /// Layers whose weights are computed in every pass and replace those in `layers`.
    pub made: Vec<Made>,
    /// Sizes and constants.
    pub config: LlamaConfig,
    /// Token vectors, and the output head if `head` is `None`.
    pub embedding: Embedding,
    /// The blocks in order.
    pub layers: Vec<LlamaLayer>,
    /// Before the head.
    pub norm: Norm,
    /// The output head, if it is not the table of token vectors.
    pub head: Option<Linear>,
    rope: Rope,
}

/// The tensors of a block that [`Llama::hidden_with`] shows, each `[batch, tokens, width]`.
#[non_exhaustive]
pub struct BlockOutputs<'a> {
    /// The input of q, k and v.
    pub normed: &'a Tensor,
    /// The input of o.
    pub mixed: &'a Tensor,
    /// The residual stream after the block.
    pub stream: &'a Tensor,
}

/// Reads a tensor by its name in a format, and checks that it has this shape.
type Read<'a> = dyn Fn(&str, &[usize]) -> Result<Tensor> + 'a;

/// The names that a format uses.
struct Names {
    embedding: &'static str,
    norm: &'static str,
    head: &'static str,
    layer: fn(usize) -> String,
    norms: [&'static str; 2],
    linears: [&'static str; 7],
}

const GGUF: Names = Names {
    embedding: "token_embd.weight",
    norm: "output_norm.weight",
    head: "output.weight",
    layer: |l| format!("blk.{l}."),
    norms: ["attn_norm.weight", "ffn_norm.weight"],
    linears: [
        "attn_q.weight",
        "attn_k.weight",
        "attn_v.weight",
        "attn_output.weight",
        "ffn_gate.weight",
        "ffn_up.weight",
        "ffn_down.weight",
    ],
};

const HUGGING_FACE: Names = Names {
    embedding: "model.embed_tokens.weight",
    norm: "model.norm.weight",
    head: "lm_head.weight",
    layer: |l| format!("model.layers.{l}."),
    norms: ["input_layernorm.weight", "post_attention_layernorm.weight"],
    linears: [
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    ],
};

/// `[out, in]` of each linear layer, in the order of [`LINEARS`].
fn sizes(c: &LlamaConfig) -> [[usize; 2]; 7] {
    let kv = c.kv_heads * c.head_dim();
    let (d, f) = (c.width, c.hidden);
    [[d, d], [kv, d], [kv, d], [d, d], [f, d], [f, d], [d, f]]
}

fn fits(name: &str, found: &[usize], shape: &[usize]) -> Result<()> {
    if found == shape {
        return Ok(());
    }
    Err(Error::config(format!("tensor `{name}` is {found:?}, the sizes ask for {shape:?}")))
}

impl Llama {
    /// Reads a GGUF file whose architecture is `llama`, for sequences of up to `context` tokens (or the file's own
    /// number, if that is less). Weights are dequantised to f32 leaves.
    ///
    /// # Errors
    /// [`Error::Config`] when the file has another architecture or its sizes do not fit, [`Error::Format`] when something
    /// is missing; when the device fails.
    pub fn from_gguf(gpu: &Gpu, file: &Gguf, context: usize) -> Result<Llama> {
        let architecture = file.text("general.architecture")?;
        if architecture != "llama" {
            return Err(Error::config(format!(
                "the file's architecture is '{architecture}'; only 'llama' is read"
            )));
        }
        let number = |key: &str| file.number(&format!("llama.{key}"));
        let heads = number("attention.head_count")?;
        let config = LlamaConfig {
            vocab: file.shape(GGUF.embedding)?.first().copied().unwrap_or(0),
            width: number("embedding_length")?,
            heads,
            kv_heads: number("attention.head_count_kv").unwrap_or(heads),
            hidden: number("feed_forward_length")?,
            layers: number("block_count")?,
            context: context.min(number("context_length")?),
            rope_base: file.float("llama.rope.freq_base").unwrap_or(10000.0),
            eps: file.float("llama.attention.layer_norm_rms_epsilon")? as f32,
            pairing: Pairing::Neighbours,
        };
        let read = |name: &str, shape: &[usize]| -> Result<Tensor> {
            fits(name, file.shape(name)?, shape)?;
            Ok(Tensor::from_slice(gpu, &file.tensor_f32(name)?, shape))
        };
        let own_head = file.names().any(|name| name == GGUF.head);
        Llama::read(gpu, config, &GGUF, own_head, &read)
    }

    /// Reads weights with the names of Hugging Face's Llama models, such as [`crate::store::Shards`]. `config` supplies
    /// what they do not contain ([`LlamaConfig::from_json`]).
    ///
    /// # Errors
    /// [`Error::Format`] when a tensor is missing, [`Error::Config`] when it has another shape; when the device fails.
    pub fn from_weights(gpu: &Gpu, weights: &dyn Weights, config: LlamaConfig) -> Result<Llama> {
        let read = |name: &str, shape: &[usize]| -> Result<Tensor> {
            fits(name, &weights.shape(name)?, shape)?;
            weights.read(gpu, name)
        };
        let own_head = weights.names().iter().any(|name| name == HUGGING_FACE.head);
        Llama::read(gpu, config, &HUGGING_FACE, own_head, &read)
    }

    fn read(gpu: &Gpu, c: LlamaConfig, names: &Names, own_head: bool, read: &Read) -> Result<Llama> {
        c.check("llama")?;
        let leaf = |name: &str, shape: &[usize]| -> Result<Tensor> {
            let x = read(name, shape)?;
            x.check()?;
            Ok(x.requires_grad())
        };
        let linear = |name: &str, [out, inner]: [usize; 2]| -> Result<Linear> {
            Ok(Linear::from_site(Arc::new(Tied::new(&leaf(name, &[out, inner])?)), None))
        };
        let norm = |name: &str| -> Result<Norm> {
            Ok(Norm { gain: leaf(name, &[c.width])?, bias: None, eps: c.eps })
        };
        let sizes = sizes(&c);
        let mut layers = Vec::new();
        for l in 0..c.layers {
            let prefix = (names.layer)(l);
            let mut all = Vec::new();
            for (name, size) in names.linears.iter().zip(sizes) {
                all.push(linear(&format!("{prefix}{name}"), size)?);
            }
            let mlp = all.split_off(4);
            let count = |_| Error::config("a block has seven linear layers");
            layers.push(LlamaLayer {
                norm1: norm(&format!("{prefix}{}", names.norms[0]))?,
                attention: all.try_into().map_err(|all: Vec<Linear>| count(all.len()))?,
                norm2: norm(&format!("{prefix}{}", names.norms[1]))?,
                mlp: mlp.try_into().map_err(|all: Vec<Linear>| count(all.len()))?,
            });
            // Uploads leave the host before the next block comes.
            gpu.flush()?;
        }
        let head = if own_head { Some(linear(names.head, [c.vocab, c.width])?) } else { None };
        Ok(Llama {
            made: Vec::new(),
            config: c,
            embedding: Embedding { table: leaf(names.embedding, &[c.vocab, c.width])? },
            layers,
            norm: norm(names.norm)?,
            head,
            rope: Rope::new(gpu, c.context, c.head_dim(), c.rope_base, c.pairing),
        })
    }

    /// Returns a model that computes the same and has no leaf in common with this one. Every weight is stored in the form
    /// in which it is used. Training one model does not change the other.
    pub fn copied(&self) -> Llama {
        let copy = |x: &Tensor| {
            let y = x.detach().affine(1.0, 0.0);
            y.evaluate();
            y.requires_grad()
        };
        let linear = |l: &Linear| {
            Linear::from_site(Arc::new(Tied::new(&copy(&l.weight.expand()))), l.bias.as_ref().map(copy))
        };
        let norm = |n: &Norm| Norm { gain: copy(&n.gain), bias: n.bias.as_ref().map(copy), eps: n.eps };
        let layers = no_grad(|| self.layers_now());
        let layer = |l: &LlamaLayer| LlamaLayer {
            norm1: norm(&l.norm1),
            attention: std::array::from_fn(|i| linear(&l.attention[i])),
            norm2: norm(&l.norm2),
            mlp: std::array::from_fn(|i| linear(&l.mlp[i])),
        };
        Llama {
            made: Vec::new(),
            embedding: Embedding { table: copy(&self.embedding.table) },
            layers: layers.iter().map(layer).collect(),
            norm: norm(&self.norm),
            head: self.head.as_ref().map(linear),
            ..self.clone()
        }
    }

    /// Returns the blocks with weights computed from the dictionaries as they are now, each dictionary in one pass.
    pub fn layers_now(&self) -> Vec<LlamaLayer> {
        let mut layers = self.layers.clone();
        for made in &self.made {
            for (layer, site) in layers[made.layers.clone()].iter_mut().zip(made.sites()) {
                layer.linear_mut(made.linear).weight = site;
            }
        }
        layers
    }

    /// Returns the residual stream before the final norm, for `tokens [batch, tokens]`.
    ///
    /// # Panics
    /// When there are more tokens than the context.
    #[track_caller]
    pub fn hidden(&self, tokens: &Tensor) -> Tensor {
        self.hidden_with(tokens, |_, _| {})
    }

    /// [`Llama::hidden`], which also shows `see` the inner tensors of each block.
    ///
    /// # Panics
    /// As [`Llama::hidden`].
    #[track_caller]
    pub fn hidden_with(&self, tokens: &Tensor, mut see: impl FnMut(usize, BlockOutputs)) -> Tensor {
        let c = &self.config;
        let (batch, length) = (tokens.shape()[0], tokens.shape()[1]);
        assert!(length <= c.context, "llama: {length} tokens, context {}", c.context);
        let mut x = self.embedding.forward(tokens);
        for (l, layer) in self.layers_now().iter().enumerate() {
            let [q, k, v, o] = &layer.attention;
            let normed = layer.norm1.forward(&x);
            let split = |y: Tensor, heads: usize| {
                y.reshape([batch, length, heads, c.head_dim()]).permute(&[0, 2, 1, 3])
            };
            let q = split(q.forward(&normed), c.heads).rope(&self.rope, 0);
            let k = split(k.forward(&normed), c.kv_heads).rope(&self.rope, 0);
            let v = split(v.forward(&normed), c.kv_heads);
            let y =
                q.attention(&k, &v, &Mask::Causal).permute(&[0, 2, 1, 3]).reshape([batch, length, c.width]);
            x = layer.mlp(&o.forward_with(&y, Activation::None, Some(&x)));
            see(l, BlockOutputs { normed: &normed, mixed: &y, stream: &x });
        }
        x
    }

    /// Scores of the next token from the residual stream.
    pub fn logits(&self, x: &Tensor) -> Tensor {
        let x = self.norm.forward(x);
        match &self.head {
            Some(head) => head.forward(&x),
            None => self.embedding.logits(&x),
        }
    }

    /// Scores of the next token at every position: `[batch, tokens, vocab]`.
    #[track_caller]
    pub fn forward(&self, tokens: &Tensor) -> Tensor {
        self.logits(&self.hidden(tokens))
    }

    /// Mean cross-entropy in nats of `targets` given `tokens`, both `[batch, tokens]`.
    #[track_caller]
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Tensor {
        self.forward(tokens).cross_entropy(targets, None)
    }

    /// Starts an empty conversation with this model, of up to `context` tokens. Weights that are not stored in the form
    /// in which they are used are materialised once, for as long as the session lives.
    ///
    /// # Errors
    /// [`Error::Config`] when the context is 0 or above the model's.
    pub fn session(&self, context: usize) -> Result<Session<'_>> {
        let c = &self.config;
        if context == 0 || context > c.context {
            return Err(Error::config(format!(
                "a context of {context} tokens; this model has 1 to {}",
                c.context
            )));
        }
        let gpu = self.embedding.table.gpu();
        let caches = (0..c.layers).map(|_| KvCache::new(gpu, 1, c.kv_heads, context, c.head_dim())).collect();
        // Materialised once: for few rows, computing a weight as it is read costs more than reading a stored one.
        let layers = no_grad(|| {
            let mut layers = self.layers_now();
            for layer in &mut layers {
                for i in 0..LINEARS.len() {
                    let linear = layer.linear_mut(i);
                    if linear.weight.stored().is_none() {
                        linear.weight = Arc::new(Tied::new(&linear.weight.expand()));
                    }
                }
            }
            layers
        });
        Ok(Session { model: self, layers, caches, length: 0 })
    }
}

/// One sequence, with the keys and values of its tokens so far.
pub struct Session<'a> {
    model: &'a Llama,
    layers: Vec<LlamaLayer>,
    caches: Vec<KvCache>,
    length: usize,
}

impl Session<'_> {
    /// Number of tokens so far.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Appends tokens, and returns the scores `[vocab]` of the token after the last one.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no token, one is not in the vocabulary, or the context is full; when the device
    /// fails.
    pub fn push(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let (model, c) = (self.model, &self.model.config);
        let context = self.caches[0].context();
        if let Some(token) = tokens.iter().find(|&&t| t as usize >= c.vocab) {
            return Err(Error::config(format!("token {token} is not in the vocabulary of {}", c.vocab)));
        }
        if tokens.is_empty() || self.length + tokens.len() > context {
            return Err(Error::config(format!(
                "{} tokens after {}: the context holds {context}; start a session with a longer one",
                tokens.len(),
                self.length
            )));
        }
        let (count, start) = (tokens.len(), self.length);
        let gpu = model.embedding.table.gpu();
        let logits = no_grad(|| -> Result<Tensor> {
            let list = |value: usize| Tensor::from_slice(gpu, &[value as u32], [1]);
            let (row, place, length) = (list(0), list(start), list(start + count));
            let mut x = model.embedding.forward(&Tensor::from_slice(gpu, tokens, [1, count]));
            for (layer, cache) in self.layers.iter().zip(&mut self.caches) {
                let [q, k, v, o] = &layer.attention;
                let normed = layer.norm1.forward(&x);
                let split = |y: Tensor, heads: usize| y.reshape([1, count, heads, c.head_dim()]);
                let turned = |y: Tensor| y.permute(&[0, 2, 1, 3]).rope(&model.rope, start);
                let q = turned(split(q.forward(&normed), c.heads));
                let k = turned(split(k.forward(&normed), c.kv_heads)).permute(&[0, 2, 1, 3]);
                let v = split(v.forward(&normed), c.kv_heads);
                cache.append(&k, &v, &row, &place)?;
                let y = cache.attend(&q, &row, &length).permute(&[0, 2, 1, 3]).reshape([1, count, c.width]);
                x = layer.mlp(&o.forward_with(&y, Activation::None, Some(&x)));
            }
            Ok(model.logits(&x.slice(1, count - 1..count)))
        })?;
        let logits = logits.to_vec::<f32>()?;
        self.length += count;
        Ok(logits)
    }
}

impl Module for Llama {
    fn parameters(&self, path: &str, all: &mut Parameters) {
        self.embedding.parameters(&join(path, "embedding"), all);
        for made in &self.made {
            let path = join(path, &format!("made.{}.{}", made.layers.start, LINEARS[made.linear]));
            all.store(join(&path, "atoms"), &made.dictionary.atoms);
            all.store(join(&path, "coefficients"), &made.dictionary.coefficients);
            for (l, [a, b]) in made.own.iter().enumerate() {
                all.store(join(&path, &format!("{l}.a")), a);
                all.store(join(&path, &format!("{l}.b")), b);
            }
        }
        for (l, layer) in self.layers.iter().enumerate() {
            let path = join(path, &format!("layers.{l}"));
            layer.norm1.parameters(&join(&path, "norm1"), all);
            for (i, name) in LINEARS.iter().enumerate() {
                layer.linear(i).parameters(&join(&path, name), all);
            }
            layer.norm2.parameters(&join(&path, "norm2"), all);
        }
        self.norm.parameters(&join(path, "norm"), all);
        if let Some(head) = &self.head {
            head.parameters(&join(path, "head"), all);
        }
    }
}
