//! Layers. Each is generic over the source of its weight: any [`Site`] can take the place of a matrix.
//!
//! A layer is a struct of tensors and sites with a `forward`. [`Parameters`] lists the stored leaves once each, however
//! many sites use them, and counts both stored and used elements.

mod distill;
mod init;

pub use crate::ops::product::conv::Conv2d;
pub use crate::ops::product::conv_transpose::ConvTranspose2d;
pub use crate::ops::product::conv1d::Conv1d;
pub use crate::ops::product::matmul::{Activation, Epilogue};
pub use crate::ops::product::narrow::stored;
pub use crate::ops::reduction::cross_entropy_with::CrossEntropy;
pub use crate::ops::sequence::attention::Mask;
pub use distill::distillation;
pub use init::Init;

use crate::gpu::Gpu;
use crate::ops::product::site::Site;
use crate::rng::Rng;
use crate::share::Tied;
use crate::tensor::Tensor;
use std::collections::HashSet;
use std::sync::Arc;

/// The leaves of a model, each once and with a name, and the number of weight elements that its sites use.
#[derive(Default)]
pub struct Parameters {
    named: Vec<(String, Tensor)>,
    seen: HashSet<u64>,
    used: usize,
}

impl Parameters {
    /// The parameters that `module` lists.
    pub fn of(module: &impl Module) -> Parameters {
        let mut all = Parameters::default();
        module.parameters("", &mut all);
        all
    }

    /// Adds a leaf under `name`, unless it is listed already. Its elements count as used each time.
    pub fn add(&mut self, name: impl Into<String>, leaf: &Tensor) {
        self.used += leaf.count();
        self.store(name, leaf);
    }

    /// Adds a site's leaves. The elements of the matrix that it makes count as used.
    pub fn add_site(&mut self, path: &str, site: &dyn Site) {
        let [out, inner] = site.size();
        self.used += out * inner;
        for (name, leaf) in site.leaf_names().iter().zip(site.leaves()) {
            self.store(join(path, name), &leaf);
        }
    }

    /// Adds a leaf of which sites make weights. It counts as stored but not as used.
    pub fn store(&mut self, name: impl Into<String>, leaf: &Tensor) {
        let Some(id) = leaf.leaf_id() else { return };
        if self.seen.insert(id) {
            self.named.push((name.into(), leaf.clone()));
        }
    }

    /// Names and leaves, in the order they were added.
    pub fn named(&self) -> &[(String, Tensor)] {
        &self.named
    }

    /// Number of elements stored: every leaf once.
    pub fn stored(&self) -> usize {
        self.named.iter().map(|(_, leaf)| leaf.count()).sum()
    }

    /// Number of elements used: every site's weight, however it is stored.
    pub fn used(&self) -> usize {
        self.used
    }
}

/// `path.name`, or `name` at the root.
pub fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_string() } else { format!("{path}.{name}") }
}

/// Something with parameters.
pub trait Module {
    /// Adds every leaf to `all`, under names that begin with `path`.
    fn parameters(&self, path: &str, all: &mut Parameters);
}

/// `y = x W^T + b`, `W [out, in]` from any site.
#[derive(Clone)]
pub struct Linear {
    /// The source of the weight.
    pub weight: Arc<dyn Site>,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Makes a layer with a stored weight of its own, drawn by `init`, and a zero bias if `bias`.
    pub fn new(gpu: &Gpu, inner: usize, out: usize, bias: bool, init: Init, rng: &mut Rng) -> Linear {
        let weight = init.leaf(gpu, [out, inner], rng);
        Linear::from_site(Arc::new(Tied::new(&weight)), bias.then(|| Init::Zeros.leaf(gpu, [out], rng)))
    }

    /// Makes a layer whose weight is a site.
    pub fn from_site(weight: Arc<dyn Site>, bias: Option<Tensor>) -> Linear {
        Linear { weight, bias }
    }

    /// `x [.., in] -> [.., out]`
    ///
    /// # Panics
    /// When the last axis of `x` is not the layer's input.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.forward_with(x, Activation::None, None)
    }

    /// `act(x W^T + b) + residual` in one kernel.
    ///
    /// # Panics
    /// As [`Tensor::linear`].
    #[track_caller]
    pub fn forward_with(&self, x: &Tensor, activation: Activation, residual: Option<&Tensor>) -> Tensor {
        x.linear(&self.weight, Epilogue { bias: self.bias.as_ref(), activation, residual })
    }
}

impl Module for Linear {
    fn parameters(&self, path: &str, all: &mut Parameters) {
        all.add_site(path, &*self.weight);
        if let Some(bias) = &self.bias {
            all.add(join(path, "bias"), bias);
        }
    }
}

/// A table of vectors, looked up by index.
#[derive(Clone)]
pub struct Embedding {
    /// `[rows, width]`
    pub table: Tensor,
}

impl Embedding {
    /// A table drawn by `init`.
    pub fn new(gpu: &Gpu, rows: usize, width: usize, init: Init, rng: &mut Rng) -> Embedding {
        Embedding { table: init.leaf(gpu, [rows, width], rng) }
    }

    /// `ids [..] -> [.., width]`
    #[track_caller]
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        self.table.embedding(ids)
    }

    /// Scores against every row, `x [.., width] -> [.., rows]`: the table as output head.
    #[track_caller]
    pub fn logits(&self, x: &Tensor) -> Tensor {
        let site: Arc<dyn Site> = Arc::new(Tied::new(&self.table));
        x.linear(&site, Epilogue::default())
    }
}

impl Module for Embedding {
    fn parameters(&self, path: &str, all: &mut Parameters) {
        all.add(join(path, "table"), &self.table);
    }
}

/// Layer norm or RMS norm over the last axis.
#[derive(Clone)]
pub struct Norm {
    /// `[width]`
    pub gain: Tensor,
    /// `[width]`; with it this is a layer norm, without it an RMS norm.
    pub bias: Option<Tensor>,
    /// Added to the variance.
    pub eps: f32,
}

impl Norm {
    /// An RMS norm with gain 1: `x / sqrt(mean(x^2) + eps) * gain`.
    pub fn rms(gpu: &Gpu, width: usize, eps: f32) -> Norm {
        Norm { gain: Tensor::ones(gpu, [width]).requires_grad(), bias: None, eps }
    }

    /// A layer norm with gain 1 and bias 0: `(x - mean) / sqrt(var + eps) * gain + bias`.
    pub fn layer(gpu: &Gpu, width: usize, eps: f32) -> Norm {
        Norm { bias: Some(Tensor::zeros(gpu, [width]).requires_grad()), ..Norm::rms(gpu, width, eps) }
    }

    /// The normalised `x [.., width]`.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        match &self.bias {
            Some(bias) => x.layer_norm(Some(&self.gain), Some(bias), self.eps),
            None => x.rms_norm(Some(&self.gain), self.eps),
        }
    }
}

impl Module for Norm {
    fn parameters(&self, path: &str, all: &mut Parameters) {
        all.add(join(path, "gain"), &self.gain);
        if let Some(bias) = &self.bias {
            all.add(join(path, "bias"), bias);
        }
    }
}

/// Multi-head attention with output projection; grouped-query when `kv_heads < heads`.
#[derive(Clone)]
pub struct Attention {
    /// `[heads * head_dim, width]`
    pub q: Linear,
    /// `[kv_heads * head_dim, width]`
    pub k: Linear,
    /// `[kv_heads * head_dim, width]`
    pub v: Linear,
    /// `[width, heads * head_dim]`
    pub o: Linear,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head j uses `j / (heads / kv_heads)`.
    pub kv_heads: usize,
}

impl Attention {
    /// `x [batch, tokens, width]`, plus `residual` of that shape if given.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, mask: &Mask, residual: Option<&Tensor>) -> Tensor {
        let [batch, tokens] = [x.shape()[0], x.shape()[1]];
        let split = |y: Tensor, heads: usize| {
            let width = y.shape()[2];
            y.reshape([batch, tokens, heads, width / heads]).permute(&[0, 2, 1, 3])
        };
        let q = split(self.q.forward(x), self.heads);
        let k = split(self.k.forward(x), self.kv_heads);
        let v = split(self.v.forward(x), self.kv_heads);
        let y = q.attention(&k, &v, mask).permute(&[0, 2, 1, 3]);
        let y = y.reshape([batch, tokens, y.shape()[2] * y.shape()[3]]);
        self.o.forward_with(&y, Activation::None, residual)
    }
}

impl Module for Attention {
    fn parameters(&self, path: &str, all: &mut Parameters) {
        for (name, layer) in [("q", &self.q), ("k", &self.k), ("v", &self.v), ("o", &self.o)] {
            layer.parameters(&join(path, name), all);
        }
    }
}

/// `W2 act(W1 x + b1) + b2`
#[derive(Clone)]
pub struct Mlp {
    /// `[hidden, width]`
    pub up: Linear,
    /// `[width, hidden]`
    pub down: Linear,
    /// Applied between the two.
    pub activation: Activation,
}

impl Mlp {
    /// `x [.., width]`, plus `residual` of that shape if given.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, residual: Option<&Tensor>) -> Tensor {
        let hidden = self.up.forward_with(x, self.activation, None);
        self.down.forward_with(&hidden, Activation::None, residual)
    }
}

impl Module for Mlp {
    fn parameters(&self, path: &str, all: &mut Parameters) {
        self.up.parameters(&join(path, "up"), all);
        self.down.parameters(&join(path, "down"), all);
    }
}

/// A pre-norm transformer block: `x + attn(norm1(x))`, then `x + mlp(norm2(x))`.
#[derive(Clone)]
pub struct Block {
    /// Before attention.
    pub norm1: Norm,
    /// Attention.
    pub attention: Attention,
    /// Before the MLP.
    pub norm2: Norm,
    /// The MLP.
    pub mlp: Mlp,
}

impl Block {
    /// `x [batch, tokens, width]` to the same shape.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, mask: &Mask) -> Tensor {
        let x = self.attention.forward(&self.norm1.forward(x), mask, Some(x));
        self.mlp.forward(&self.norm2.forward(&x), Some(&x))
    }
}

impl Module for Block {
    fn parameters(&self, path: &str, all: &mut Parameters) {
        self.norm1.parameters(&join(path, "norm1"), all);
        self.attention.parameters(&join(path, "attention"), all);
        self.norm2.parameters(&join(path, "norm2"), all);
        self.mlp.parameters(&join(path, "mlp"), all);
    }
}
