//! A weight that is computed, as a tensor in the tape.

use super::site::{LeafGrads, Site};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::Tensor;
use std::sync::Arc;

const OP: &str = "materialise";

/// The whole weight of a site as a tensor `[out, in]` in f32, for ops that take tensors. Its gradient goes to the site's leaves, so that
/// weights of any op can be shared by any kind. A product reads a weight more cheaply by [`Tensor::linear`], which may never store it.
///
/// A convolution whose 144 weights read a store of 36:
///
/// ```
/// # use tiebeam::{Gpu, Tensor, Rng};
/// # let gpu = Gpu::open()?;
/// use tiebeam::nn::{self, Conv2dConfig};
/// use tiebeam::share::{Draw, Hashed, Mapping, Site, hashed::SEEDS};
/// let mut rng = Rng::new(1);
/// let omega = Tensor::randn(&gpu, [36], &mut rng).requires_grad();
/// let draw = Draw { stored: 36, size: [8, 2 * 3 * 3], offset: 0, layer: 0, scale: 0.3, mapping: Mapping::Stable, seeds: SEEDS };
/// let weight = nn::materialise(&Hashed::new(&omega, draw).shared()).reshape([8, 2, 3, 3]);
/// let y = Tensor::randn(&gpu, [1, 2, 6, 6], &mut rng).conv2d(&weight, None, Conv2dConfig::default());
/// let grads = y.square().mean_all().backward()?;
/// assert_eq!(grads.get(&omega).expect("the store was read").shape()[..], [36]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// # Panics
/// When the site makes a weight of another size than it says.
#[track_caller]
pub fn materialise(weight: &Arc<dyn Site>) -> Tensor {
    let leaves = weight.leaves();
    let y = crate::no_grad(|| weight.expand());
    let (name, size) = (weight.name(), weight.size());
    assert!(
        y.shape()[..] == size && y.dtype().is_float(),
        "{name}: its weight is {} {}, and its size is {size:?}",
        y.dtype(),
        y.shape()
    );
    y.made_by(&leaves.iter().collect::<Vec<_>>(), || {
        let leaves = leaves.iter().map(Saved::new).collect();
        Box::new(Materialise { weight: weight.clone(), leaves })
    })
}

struct Materialise {
    weight: Arc<dyn Site>,
    leaves: Vec<Saved>,
}

impl Op for Materialise {
    fn name(&self) -> &'static str {
        OP
    }

    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dw) = &dy[0] else { return };
        // The site reads its leaves itself. This only checks that they have not changed.
        for leaf in &self.leaves {
            leaf.get(OP);
        }
        self.weight.reduce(&dw.contiguous(), &mut LeafGrads::new(sink, 0));
    }
}
