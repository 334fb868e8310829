//! Llama-type language models: RMS norms, rotary positions, grouped-query attention, a gated MLP.
//!
//! `x += attn(norm1(x))`, then `x += down(silu(gate(norm2(x))) * up(norm2(x)))`; every linear layer is a site, so that any kind of
//! sharing can stand in for its weight. Weights come from llama.cpp's GGUF files or from safetensors with the names of Hugging
//! Face; the two differ in which elements of a head turn together.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::{Activation, Embedding, Linear, Mask, Module, Norm, Parameters, join};
use crate::ops::cache::KvCache;
use crate::ops::rope::{Pairing, Rope};
use crate::share::Tied;
use crate::store::File;
use crate::store::gguf::Gguf;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::sync::Arc;

/// Sizes and constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Distinct tokens.
    pub vocab: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; must divide `heads`.
    pub kv_heads: usize,
    /// Width of the MLP.
    pub hidden: usize,
    /// Blocks.
    pub layers: usize,
    /// Most tokens in a sequence.
    pub context: usize,
    /// Base of the rotary angles.
    pub rope_base: f64,
    /// Added to the variance in norms.
    pub eps: f32,
    /// Which elements of a head turn together.
    pub pairing: Pairing,
}

impl Config {
    fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// Sizes that no model has are refused before anything is made of them.
    fn check(&self, name: &str) -> Result<()> {
        let sizes =
            [self.vocab, self.width, self.heads, self.kv_heads, self.hidden, self.layers, self.context];
        let fits = !sizes.contains(&0)
            && self.width.is_multiple_of(self.heads)
            && self.heads.is_multiple_of(self.kv_heads)
            && self.head_dim().is_multiple_of(2)
            && self.head_dim() <= 256
            && self.rope_base > 0.0;
        if fits {
            Ok(())
        } else {
            Err(Error::config(format!("{name}: these sizes make no Llama model: {self:?}")))
        }
    }
}

/// One block.
#[derive(Clone)]
pub struct Layer {
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

impl Layer {
    /// The linear layer of this place in [`LINEARS`].
    pub fn linear(&self, i: usize) -> &Linear {
        if i < 4 { &self.attention[i] } else { &self.mlp[i - 4] }
    }

    /// The same, to exchange its weight.
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

/// The model.
#[derive(Clone)]
pub struct Llama {
    /// Sizes and constants.
    pub config: Config,
    /// Token vectors; the output head too where there is no other.
    pub embedding: Embedding,
    /// In order.
    pub layers: Vec<Layer>,
    /// Before the head.
    pub norm: Norm,
    /// The output head where it is not the table of token vectors.
    pub head: Option<Linear>,
    rope: Rope,
}

/// Where weights come from: a tensor by the names of either format, with the shape it must have.
type Read<'a> = dyn Fn(&str, &[usize]) -> Result<Tensor> + 'a;

/// How a format calls things.
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
fn sizes(c: &Config) -> [[usize; 2]; 7] {
    let kv = c.kv_heads * c.head_dim();
    let (d, f) = (c.width, c.hidden);
    [[d, d], [kv, d], [kv, d], [d, d], [f, d], [f, d], [d, f]]
}

impl Llama {
    /// Reads a GGUF file whose architecture is `llama`, for sequences of up to `context` tokens (its own number where that is
    /// less). Weights are dequantised to f32 leaves.
    ///
    /// # Errors
    /// [`Error::Format`] when the file has another architecture or lacks something; the device's fault.
    pub fn from_gguf(gpu: &Gpu, file: &Gguf, context: usize) -> Result<Llama> {
        let architecture = file.text("general.architecture")?;
        if architecture != "llama" {
            return Err(Error::config(format!(
                "the file's architecture is '{architecture}'; only 'llama' is read"
            )));
        }
        let number = |key: &str| file.number(&format!("llama.{key}"));
        let heads = number("attention.head_count")?;
        let config = Config {
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
            let found = file.shape(name)?;
            if found != shape {
                return Err(Error::config(format!(
                    "tensor `{name}` is {found:?}, the sizes ask for {shape:?}"
                )));
            }
            Ok(Tensor::from_slice(gpu, &file.tensor_f32(name)?, shape))
        };
        let own_head = file.names().any(|name| name == GGUF.head);
        Llama::read(gpu, config, &GGUF, own_head, &read)
    }

    /// Reads safetensors with the names of Hugging Face's Llama models; `config` says what the file does not.
    ///
    /// # Errors
    /// [`Error::Format`] when a tensor is missing or has another shape; the device's fault.
    pub fn from_safetensors(gpu: &Gpu, file: &File, config: Config) -> Result<Llama> {
        let read = |name: &str, shape: &[usize]| -> Result<Tensor> {
            file.expect(name, shape)?;
            Ok(Tensor::from_slice(gpu, &file.tensor_f32(name)?, shape))
        };
        Llama::read(gpu, config, &HUGGING_FACE, file.contains(HUGGING_FACE.head), &read)
    }

    fn read(gpu: &Gpu, c: Config, names: &Names, own_head: bool, read: &Read) -> Result<Llama> {
        c.check("llama")?;
        let leaf = |name: &str, shape: &[usize]| read(name, shape).map(|x| x.requires_grad());
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
            layers.push(Layer {
                norm1: norm(&format!("{prefix}{}", names.norms[0]))?,
                attention: all.try_into().map_err(|all: Vec<Linear>| count(all.len()))?,
                norm2: norm(&format!("{prefix}{}", names.norms[1]))?,
                mlp: mlp.try_into().map_err(|all: Vec<Linear>| count(all.len()))?,
            });
            // What was uploaded leaves the host before the next block comes.
            gpu.flush()?;
        }
        let head = if own_head { Some(linear(names.head, [c.vocab, c.width])?) } else { None };
        Ok(Llama {
            config: c,
            embedding: Embedding { table: leaf(names.embedding, &[c.vocab, c.width])? },
            layers,
            norm: norm(names.norm)?,
            head,
            rope: Rope::new(gpu, c.context, c.head_dim(), c.rope_base, c.pairing),
        })
    }

    /// The residual stream before the final norm, for `tokens [batch, tokens]`.
    ///
    /// # Panics
    /// When there are more tokens than the context.
    #[track_caller]
    pub fn hidden(&self, tokens: &Tensor) -> Tensor {
        let c = &self.config;
        let (batch, length) = (tokens.shape()[0], tokens.shape()[1]);
        assert!(length <= c.context, "llama: {length} tokens, context {}", c.context);
        let mut x = self.embedding.forward(tokens);
        for layer in &self.layers {
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

    /// An empty conversation with this model, of up to `context` tokens.
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
        Ok(Session { model: self, caches, length: 0 })
    }
}

/// One sequence and the keys and values of what it has so far.
pub struct Session<'a> {
    model: &'a Llama,
    caches: Vec<KvCache>,
    length: usize,
}

impl Session<'_> {
    /// Tokens so far.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Appends tokens; the scores `[vocab]` of what follows the last one.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no token, one is not in the vocabulary, or the context is full; the device's fault.
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
        let logits = no_grad(|| {
            let list = |value: usize| Tensor::from_slice(gpu, &[value as u32], [1]);
            let (row, place, length) = (list(0), list(start), list(start + count));
            let mut x = model.embedding.forward(&Tensor::from_slice(gpu, tokens, [1, count]));
            for (layer, cache) in model.layers.iter().zip(&mut self.caches) {
                let [q, k, v, o] = &layer.attention;
                let normed = layer.norm1.forward(&x);
                let split = |y: Tensor, heads: usize| y.reshape([1, count, heads, c.head_dim()]);
                let turned = |y: Tensor| y.permute(&[0, 2, 1, 3]).rope(&model.rope, start);
                let q = turned(split(q.forward(&normed), c.heads));
                let k = turned(split(k.forward(&normed), c.kv_heads)).permute(&[0, 2, 1, 3]);
                let v = split(v.forward(&normed), c.kv_heads);
                cache.append(&k, &v, &row, &place);
                let y = cache.attend(&q, &row, &length).permute(&[0, 2, 1, 3]).reshape([1, count, c.width]);
                x = layer.mlp(&o.forward_with(&y, Activation::None, Some(&x)));
            }
            model.logits(&x.slice(1, count - 1..count))
        });
        let logits = logits.to_vec::<f32>()?;
        self.length += count;
        Ok(logits)
    }
}

impl Module for Llama {
    fn parameters(&self, path: &str, all: &mut Parameters) {
        self.embedding.parameters(&join(path, "embedding"), all);
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
