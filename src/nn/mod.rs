//! Layers. Each is generic over the source of its weight: any [`Site`] can take the place of a matrix.
//!
//! A layer is a struct of tensors and sites with a `forward`, which says in one line what it holds: [`module!`](crate::module).
//! [`Parameters`] lists the stored tensors once each, however many sites use them, and counts both stored and used elements.

mod batch_norm;
mod conv;
mod distill;
mod file;
mod functional;
mod init;
mod kinds;
mod module;
mod parameters;
mod sequential;

pub use crate::module;
pub use crate::ops::product::conv::Conv2dConfig;
pub use crate::ops::product::conv_transpose::ConvTranspose2dConfig;
pub use crate::ops::product::conv1d::Conv1dConfig;
pub use crate::ops::product::lookup::lookup;
pub use crate::ops::product::materialise::materialise;
pub use crate::ops::product::matmul::{Activation, Epilogue};
pub use crate::ops::product::narrow::stored;
pub use crate::ops::reduction::cross_entropy_with::CrossEntropy;
pub use crate::ops::sequence::attention::Mask;
pub use batch_norm::{BatchNorm, GroupNorm};
pub use conv::{Conv1d, Conv2d, ConvTranspose2d};
pub use distill::distillation;
pub use file::{Loaded, ModuleFile};
pub use functional::functional;
pub use init::Init;
pub use module::{Buffer, Module, Visit, VisitMut, check_listed, join};
pub use parameters::Parameters;
pub use sequential::{Dropout, Layer, Sequential};

use crate::gpu::Gpu;
use crate::ops::product::site::Site;
use crate::rng::Rng;
use crate::share::Tied;
use crate::tensor::Tensor;
use std::sync::Arc;

/// `y = x W^T + b`, `W [out, in]` from any site.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::Rng;
/// use tiebeam::nn::{Init, Linear};
/// let layer = Linear::new(&gpu, 3, 2, true, Init::KaimingUniform, &mut Rng::new(1));
/// let y = layer.forward(&Tensor::ones(&gpu, [5, 7, 3])); // all axes but the last are kept
/// assert_eq!(y.shape()[..], [5, 7, 2]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
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
        Linear::from_site(Tied::new(&weight).shared(), bias.then(|| Init::Zeros.leaf(gpu, [out], rng)))
    }

    /// Makes a layer without a bias that uses a stored matrix `[out, in]`, which other layers may use too.
    ///
    /// # Panics
    /// When `theta` is not a matrix of floats.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::nn::Linear;
    /// let theta = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]).requires_grad();
    /// let [first, second] = [Linear::tied(&theta), Linear::tied(&theta)]; // two layers, one matrix
    /// let x = Tensor::ones(&gpu, [1, 2]);
    /// let y = second.forward(&first.forward(&x));
    /// assert_eq!(y.to_vec::<f32>()?, [17.0, 37.0]);
    /// assert_eq!(y.sum_all().backward()?.len(), 1); // one gradient for both uses
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn tied(theta: &Tensor) -> Linear {
        Linear::from_site(Tied::new(theta).shared(), None)
    }

    /// Makes a layer whose weight is a site.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::nn::Linear;
    /// use tiebeam::share::{Factored, Site};
    /// let a = Tensor::from_slice(&gpu, &[1f32, 1.0, 1.0], [1, 3]);
    /// let b = Tensor::from_slice(&gpu, &[1f32, 10.0], [2, 1]);
    /// let layer = Linear::from_site(Factored::new(&a, &b).shared(), None); // W = B A, of rank 1
    /// assert_eq!(layer.forward(&Tensor::ones(&gpu, [1, 3])).to_vec::<f32>()?, [3.0, 30.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
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
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::nn::{Activation, Linear};
    /// let layer = Linear::tied(&Tensor::from_slice(&gpu, &[1f32, -1.0], [2, 1]));
    /// let x = Tensor::from_slice(&gpu, &[3f32], [1, 1]);
    /// let y = layer.forward_with(&x, Activation::Relu, None);
    /// assert_eq!(y.to_vec::<f32>()?, [3.0, 0.0]);
    /// let y = layer.forward_with(&x, Activation::None, Some(&y));
    /// assert_eq!(y.to_vec::<f32>()?, [6.0, -3.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn forward_with(&self, x: &Tensor, activation: Activation, residual: Option<&Tensor>) -> Tensor {
        x.linear(&self.weight, Epilogue { bias: self.bias.as_ref(), activation, residual })
    }
}

module!(Linear { weight => "", bias });

/// A table of vectors, looked up by index.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::Rng;
/// use tiebeam::nn::{Embedding, Init};
/// let tokens = Embedding::new(&gpu, 256, 8, Init::Normal(0.02), &mut Rng::new(1));
/// let ids = Tensor::from_slice(&gpu, &[72u32, 105, 33], [1, 3]);
/// let x = tokens.forward(&ids); // `[.., width]`
/// assert_eq!(x.shape()[..], [1, 3, 8]);
/// assert_eq!(tokens.logits(&x).shape()[..], [1, 3, 256]); // the same table as output head
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
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
        x.linear(&Tied::new(&self.table).shared(), Epilogue::default())
    }
}

module!(Embedding { table });

/// A table of vectors whose rows are those of a weight of any kind, looked up by index. Only the rows that are asked for are computed.
///
/// ```
/// # use tiebeam::nn::{Module, SiteEmbedding};
/// # use tiebeam::share::{Draw, Hashed, Mapping, Site, hashed};
/// # use tiebeam::{Gpu, Rng, Tensor};
/// # let gpu = Gpu::open()?;
/// // 1000 vectors of 16 numbers from 500 stored ones.
/// let omega = Tensor::randn(&gpu, [500], &mut Rng::new(1)).requires_grad();
/// let (mapping, seeds) = (Mapping::Stable, hashed::SEEDS);
/// let draw = Draw { stored: 500, size: [1000, 16], offset: 0, layer: 0, scale: 1.0, mapping, seeds };
/// let table = SiteEmbedding::new(Hashed::new(&omega, draw).shared());
/// let ids = Tensor::from_slice(&gpu, &[7u32, 999, 7], [3]);
/// let x = table.forward(&ids);
/// assert_eq!((&x.shape()[..], &table.logits(&x).shape()[..]), (&[3, 16][..], &[3, 1000][..]));
/// assert_eq!((table.parameters().stored(), table.parameters().used()), (500, 16_000));
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SiteEmbedding {
    /// `[rows, width]`
    pub weight: Arc<dyn Site>,
}

impl SiteEmbedding {
    /// A table with these rows.
    pub fn new(weight: Arc<dyn Site>) -> SiteEmbedding {
        SiteEmbedding { weight }
    }

    /// `ids [..] -> [.., width]`
    ///
    /// # Panics
    /// As [`lookup`].
    #[track_caller]
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        lookup(&self.weight, ids)
    }

    /// Scores against every row, `x [.., width] -> [.., rows]`: the table as output head.
    #[track_caller]
    pub fn logits(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Epilogue::default())
    }
}

module!(SiteEmbedding { weight => "" });

/// Layer norm or RMS norm over the last axis.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::nn::Norm;
/// let x = Tensor::from_slice(&gpu, &[1f32, 3.0], [1, 2]);
/// let y = Norm::layer(&gpu, 2, 0.0).forward(&x).to_vec::<f32>()?; // mean 0, variance 1
/// assert!((y[0] + 1.0).abs() < 1e-5 && (y[1] - 1.0).abs() < 1e-5);
/// let y = Norm::rms(&gpu, 2, 0.0).forward(&x).to_vec::<f32>()?; // mean square 1
/// assert!((y[0].powi(2) + y[1].powi(2) - 2.0).abs() < 1e-5);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
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

module!(Norm { gain, bias, eps: _ });

/// Multi-head attention with output projection; grouped-query when `kv_heads < heads`.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::Rng;
/// use tiebeam::nn::{Attention, Init, Linear, Mask};
/// let mut rng = Rng::new(1);
/// let mut layer = |inner, out| Linear::new(&gpu, inner, out, false, Init::XavierUniform, &mut rng);
/// // 4 query heads of 2 elements share 2 heads of keys and values.
/// let [q, k, v, o] = [layer(8, 8), layer(8, 4), layer(8, 4), layer(8, 8)];
/// let attention = Attention { q, k, v, o, heads: 4, kv_heads: 2 };
/// let x = Tensor::ones(&gpu, [1, 3, 8]); // [batch, tokens, width]
/// let y = attention.forward(&x, &Mask::Causal, None);
/// assert_eq!(y.shape(), x.shape());
/// // The same in parts, with room for rotary angles and caches between.
/// let [q, k, v] = attention.project(&x);
/// let mixed = Attention::merge(&q.attention(&k, &v, &Mask::Causal));
/// assert_eq!(attention.o.forward(&mixed).to_vec::<f32>()?, y.to_vec::<f32>()?);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
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
        let [q, k, v] = self.project(x);
        let y = Attention::merge(&q.attention(&k, &v, mask));
        self.o.forward_with(&y, Activation::None, residual)
    }

    /// Queries, keys and values of `x [batch, tokens, width]`, each `[batch, heads, tokens, head_dim]`.
    #[track_caller]
    pub fn project(&self, x: &Tensor) -> [Tensor; 3] {
        let [batch, tokens] = [x.shape()[0], x.shape()[1]];
        [(&self.q, self.heads), (&self.k, self.kv_heads), (&self.v, self.kv_heads)].map(|(layer, heads)| {
            let y = layer.forward(x);
            let width = y.shape()[2];
            y.reshape([batch, tokens, heads, width / heads]).permute([0, 2, 1, 3])
        })
    }

    /// The heads' results `[batch, heads, tokens, head_dim]`, side by side: `[batch, tokens, heads * head_dim]`, the input of `o`.
    #[track_caller]
    pub fn merge(y: &Tensor) -> Tensor {
        let [batch, heads, tokens, dim] = [0, 1, 2, 3].map(|axis| y.shape()[axis]);
        y.permute([0, 2, 1, 3]).reshape([batch, tokens, heads * dim])
    }
}

module!(Attention { q, k, v, o, heads: _, kv_heads: _ });

/// `W2 act(W1 x + b1) + b2`, or with a gate `W2 (act(G x + g) * (W1 x + b1)) + b2`, which with SiLU is SwiGLU.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::Rng;
/// use tiebeam::nn::{Activation, Init, Linear, Mlp};
/// let mut rng = Rng::new(1);
/// let mut layer = |inner, out| Linear::new(&gpu, inner, out, true, Init::KaimingUniform, &mut rng);
/// let mlp = Mlp { gate: None, up: layer(8, 32), down: layer(32, 8), activation: Activation::Gelu };
/// let x = Tensor::ones(&gpu, [2, 3, 8]);
/// assert_eq!(mlp.forward(&x, Some(&x)).shape(), x.shape()); // `x` is added to the result
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[hidden, width]`, multiplied with what `up` gives. The activation is the gate's if there is one.
    pub gate: Option<Linear>,
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
        let hidden = match &self.gate {
            Some(gate) => gate.forward_with(x, self.activation, None).mul(&self.up.forward(x)),
            None => self.up.forward_with(x, self.activation, None),
        };
        self.down.forward_with(&hidden, Activation::None, residual)
    }
}

module!(Mlp { gate, up, down, activation: _ });

/// A pre-norm transformer block: `x + attn(norm1(x))`, then `x + mlp(norm2(x))`.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::Rng;
/// use tiebeam::nn::{Activation, Attention, Block, Init, Linear, Mask, Mlp, Norm};
/// let mut rng = Rng::new(1);
/// let mut layer = |inner, out| Linear::new(&gpu, inner, out, false, Init::XavierUniform, &mut rng);
/// let [q, k, v, o] = [(); 4].map(|()| layer(8, 8));
/// let [gate, up, down] = [layer(8, 32), layer(8, 32), layer(32, 8)];
/// let mlp = Mlp { gate: Some(gate), up, down, activation: Activation::Silu };
/// let attention = Attention { q, k, v, o, heads: 2, kv_heads: 2 };
/// let [norm1, norm2] = [(); 2].map(|()| Norm::rms(&gpu, 8, 1e-5));
/// let block = Block { norm1, attention, norm2, mlp };
/// let x = Tensor::ones(&gpu, [1, 3, 8]); // [batch, tokens, width]
/// assert_eq!(block.forward(&x, &Mask::Causal).shape(), x.shape());
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
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

module!(Block { norm1, attention, norm2, mlp });
