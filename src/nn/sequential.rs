//! Layers one after the other.

use super::{
    BatchNorm, Conv1d, Conv2d, ConvTranspose2d, Embedding, GroupNorm, Linear, Module, Norm, SiteEmbedding,
    Visit, VisitMut, module,
};
use crate::error::panic_text;
use crate::rng::Rng;
use crate::tensor::Tensor;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// A module that maps one tensor to one tensor.
///
/// Implement it for a module of your own to put it into a [`Sequential`]. A layer that behaves otherwise in training, as dropout and
/// batch norm do, overrides [`Layer::train`]. A model that has such layers needs one body for both: it overrides [`Layer::run`], and
/// the other two call that.
///
/// ```
/// # use tiebeam::nn::{Dropout, Init, Layer, Linear, module};
/// # use tiebeam::{Gpu, Rng, Tensor};
/// # let gpu = Gpu::open()?;
/// struct Net {
///     first: Linear,
///     drop: Dropout,
///     second: Linear,
/// }
/// module!(Net { first, drop, second });
///
/// impl Layer for Net {
///     fn forward(&self, x: &Tensor) -> Tensor {
///         self.run(x, None)
///     }
///     fn train(&self, x: &Tensor, rng: &mut Rng) -> Tensor {
///         self.run(x, Some(rng))
///     }
///     fn run(&self, x: &Tensor, rng: Option<&mut Rng>) -> Tensor {
///         let x = self.first.forward(x).relu();
///         self.second.forward(&self.drop.run(&x, rng)) // rng.as_deref_mut() if it is needed again
///     }
/// }
///
/// let mut rng = Rng::new(1);
/// let linear = |[a, b]: [usize; 2], rng: &mut Rng| Linear::new(&gpu, a, b, true, Init::KaimingUniform, rng);
/// let net = Net { first: linear([4, 8], &mut rng), drop: Dropout::new(0.5), second: linear([8, 2], &mut rng) };
/// let x = Tensor::ones(&gpu, [3, 4]);
/// assert_eq!(net.forward(&x).to_vec::<f32>()?, net.forward(&x).to_vec::<f32>()?);
/// assert_ne!(net.train(&x, &mut rng).to_vec::<f32>()?, net.train(&x, &mut rng).to_vec::<f32>()?);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub trait Layer: Module + Send + Sync {
    /// The layer's value in evaluation.
    fn forward(&self, x: &Tensor) -> Tensor;

    /// Its value in training, with the random numbers that it needs from `rng`.
    fn train(&self, x: &Tensor, rng: &mut Rng) -> Tensor {
        let _ = rng;
        self.forward(x)
    }

    /// Its value in training if there is an `rng`, else in evaluation.
    fn run(&self, x: &Tensor, rng: Option<&mut Rng>) -> Tensor {
        match rng {
            Some(rng) => self.train(x, rng),
            None => self.forward(x),
        }
    }
}

macro_rules! layers {
    ($($layer:ty),* $(,)?) => {
        $(impl Layer for $layer {
            #[track_caller]
            fn forward(&self, x: &Tensor) -> Tensor {
                <$layer>::forward(self, x)
            }
        })*
    };
}

layers!(Linear, Norm, Embedding, SiteEmbedding, Conv1d, Conv2d, ConvTranspose2d, GroupNorm);

impl Layer for BatchNorm {
    #[track_caller]
    fn forward(&self, x: &Tensor) -> Tensor {
        BatchNorm::forward(self, x)
    }
    #[track_caller]
    fn train(&self, x: &Tensor, _: &mut Rng) -> Tensor {
        BatchNorm::train(self, x)
    }
}

/// Sets elements to 0 with probability `p` in training, and divides the others by `1 - p`: [`Tensor::dropout`]. In evaluation it
/// does nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The probability of 0.
    pub p: f32,
}

impl Dropout {
    /// A layer with this probability.
    ///
    /// # Panics
    /// If `p` is outside `[0, 1]`.
    #[track_caller]
    pub fn new(p: f32) -> Dropout {
        assert!((0.0..=1.0).contains(&p), "dropout: probability {p} is outside [0, 1]");
        Dropout { p }
    }
}

impl Module for Dropout {
    fn visit(&self, _: &mut Visit) {}
    fn visit_mut(&mut self, _: &mut VisitMut) {}
}

impl Layer for Dropout {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.clone()
    }
    #[track_caller]
    fn train(&self, x: &Tensor, rng: &mut Rng) -> Tensor {
        x.dropout(self.p, rng)
    }
}

/// A function without parameters, such as `Tensor::relu`.
struct Function<F>(F);

impl<F> Module for Function<F> {
    fn visit(&self, _: &mut Visit) {}
    fn visit_mut(&mut self, _: &mut VisitMut) {}
}

impl<F: Fn(&Tensor) -> Tensor + Send + Sync> Layer for Function<F> {
    #[track_caller]
    fn forward(&self, x: &Tensor) -> Tensor {
        (self.0)(x)
    }
}

/// Layers one after the other. Their parameters are named by their places, as in PyTorch: `0.weight`, `0.bias`, `2.weight`.
///
/// ```
/// # use tiebeam::nn::{Dropout, Init, Linear, Module, Sequential};
/// # use tiebeam::{Gpu, Rng, Tensor};
/// # let gpu = Gpu::open()?;
/// let mut rng = Rng::new(1);
/// let net = Sequential::new()
///     .add(Linear::new(&gpu, 4, 8, true, Init::KaimingUniform, &mut rng))
///     .add_fn(Tensor::relu)
///     .add(Dropout::new(0.1))
///     .add(Linear::new(&gpu, 8, 2, true, Init::KaimingUniform, &mut rng));
/// let x = Tensor::ones(&gpu, [3, 4]);
/// assert_eq!(net.train(&x, &mut rng).shape()[..], [3, 2]);
/// assert_eq!(net.forward(&x).to_vec::<f32>()?, net.forward(&x).to_vec::<f32>()?);
/// assert_eq!(net.parameters().named()[2].0, "3.weight");
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Default)]
pub struct Sequential {
    /// The layers, in order.
    pub layers: Vec<Box<dyn Layer>>,
}

impl Sequential {
    /// No layers: the identity.
    pub fn new() -> Sequential {
        Sequential::default()
    }

    /// Adds a layer at the end.
    #[allow(clippy::should_implement_trait)]
    pub fn add(mut self, layer: impl Layer + 'static) -> Sequential {
        self.layers.push(Box::new(layer));
        self
    }

    /// Adds a function without parameters at the end, such as `Tensor::relu` or `|x| x.flatten(1, -1)`.
    pub fn add_fn(self, function: impl Fn(&Tensor) -> Tensor + Send + Sync + 'static) -> Sequential {
        self.add(Function(function))
    }

    #[track_caller]
    fn each(&self, x: &Tensor, mut run: impl FnMut(&dyn Layer, &Tensor) -> Tensor) -> Tensor {
        let mut x = x.clone();
        for (i, layer) in self.layers.iter().enumerate() {
            x = match catch_unwind(AssertUnwindSafe(|| run(&**layer, &x))) {
                Ok(y) => y,
                // The layer's own panic names a line of this file. This one names the layer, at the caller's line.
                Err(panic) if panic.is::<String>() || panic.is::<&str>() => {
                    panic!("layer {i} of a Sequential, which got {}: {}", x.shape(), panic_text(&*panic))
                }
                Err(panic) => resume_unwind(panic),
            };
        }
        x
    }

    /// The layers' value in evaluation.
    ///
    /// # Panics
    /// When one of the layers does, with its number.
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.each(x, |layer, x| layer.forward(x))
    }

    /// The layers' value in training: dropout drops, and batch norms use the batch and move their running statistics.
    ///
    /// # Panics
    /// As [`Sequential::forward`].
    #[track_caller]
    pub fn train(&self, x: &Tensor, rng: &mut Rng) -> Tensor {
        self.each(x, |layer, x| layer.train(x, rng))
    }
}

/// The number of layers, and the table of their [`Parameters`](super::Parameters).
impl fmt::Debug for Sequential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sequential of {} layers\n{}", self.layers.len(), self.parameters())
    }
}

module!(Sequential { layers => "" });

impl Layer for Sequential {
    #[track_caller]
    fn forward(&self, x: &Tensor) -> Tensor {
        Sequential::forward(self, x)
    }
    #[track_caller]
    fn train(&self, x: &Tensor, rng: &mut Rng) -> Tensor {
        Sequential::train(self, x, rng)
    }
}
