//! Linear layers whose weight is any [`Site`].

use super::matmul::product::Product;
use super::matmul::{Activation, Epilogue};
use super::narrow;
use super::site::{LeafGrads, Site};
use super::weight::Weight;
use crate::ops::reduction::reduce::add_sum;
use crate::precision::precision;
use crate::shape::Shape;
use crate::tape::{self, Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};
use std::sync::Arc;

impl Tensor {
    /// Returns `y = act(x W^T + bias) + residual` with `x [.., in]`, and `W [out, in]` from any [`Site`]. Up to 64 rows,
    /// the sharing kind's load is fused into the product. With more rows, `W` is materialised for this product and then
    /// freed.
    ///
    /// Derivatives: `dx = dy W` with the same load, `dbias` is the sum over rows, and the site has its own rule for its
    /// leaves. While the tape records, the activation runs as a separate op, because its derivative needs its input.
    /// The result is f32, or in a scope of 16 bits ([`autocast`](crate::autocast)) of its type, as are then `x` and `W`.
    ///
    /// # Panics
    /// When the sizes do not fit, a type is not a float, or there are both an activation and a residual.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::nn::Epilogue;
    /// use tiebeam::share::{Site, Tied};
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0], [1, 2]);
    /// let w = Tensor::from_slice(&gpu, &[1f32, 0.0, 0.0, 1.0, 1.0, 1.0], [3, 2]); // [out, in]
    /// let bias = Tensor::from_slice(&gpu, &[0f32, 0.0, 10.0], [3]);
    /// let y = x.linear(&Tied::new(&w).shared(), Epilogue::default().bias(Some(&bias)));
    /// assert_eq!(y.to_vec2::<f32>()?, [[1.0, 2.0, 13.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn linear(&self, weight: &Arc<dyn Site>, epilogue: Epilogue) -> Tensor {
        let [n, k] = weight.size();
        let axes = self.shape().len();
        assert!(
            axes >= 1 && self.shape()[axes - 1] == k,
            "linear: input {} for a weight [{n}, {k}]",
            self.shape()
        );
        assert!(
            epilogue.residual.is_none() || epilogue.activation == Activation::None,
            "linear: a residual is added after the layer, an activation comes before it: use one"
        );
        let to = self.shape().with(axes - 1, n);
        if let Some(bias) = epilogue.bias {
            assert!(**bias.shape() == [n], "linear: bias {} for {n} outputs", bias.shape());
        }
        if let Some(residual) = epilogue.residual {
            assert!(*residual.shape() == to, "linear: residual {} for output {to}", residual.shape());
        }
        let leaves = weight.leaves();
        let mut inputs: Vec<&Tensor> = vec![self];
        inputs.extend(epilogue.bias);
        inputs.extend(epilogue.residual);
        inputs.extend(&leaves);
        same_gpu("linear", &inputs);
        let tracked = tape::tracks(&inputs);
        let fused =
            Epilogue { activation: if tracked { Activation::None } else { epilogue.activation }, ..epilogue };
        let rows: usize = self.shape()[..axes - 1].iter().product();
        assert!(self.dtype().is_float(), "linear: needs floats, got {}; cast first", self.dtype());
        let x = narrow::operand(self).reshape([rows, k]);
        // A packed weight is read by a kernel of its own, which adds nothing to the weight.
        if !tracked
            && weight.is_compact()
            && let Some((base, part)) = weight.apart(&x)
        {
            let part = part.reshape(to);
            let part = epilogue.residual.map_or(part.clone(), |residual| part.add(residual));
            let y = self.linear(
                &base,
                Epilogue { bias: epilogue.bias, residual: Some(&part), ..Epilogue::default() },
            );
            return epilogue.activation.apply(&y);
        }
        let y = Tensor::empty(self.gpu(), "linear", [rows, n], precision().dtype());
        let used = Weight::of(weight);
        used.multiply(true, |right| {
            Product { epilogue: fused, ..Product::new("linear", &x, right) }.write(&y);
        });
        let y = y.reshape(to).made_by(&inputs, || {
            Box::new(Linear {
                x: Saved::new(&x),
                shape: *self.shape(),
                leaves: leaves.iter().map(Saved::new).collect(),
                weight: weight.clone(),
                used,
                bias: epilogue.bias.is_some(),
                residual: epilogue.residual.is_some(),
            })
        });
        if tracked { epilogue.activation.apply(&y) } else { y }
    }
}

struct Linear {
    x: Saved,
    shape: Shape,
    leaves: Vec<Saved>,
    weight: Arc<dyn Site>,
    /// As the forward pass read it.
    used: Weight,
    bias: bool,
    residual: bool,
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(full) = &dy[0] else { return };
        let x = self.x.get("linear");
        // The site reads its leaves itself. This only checks that they have not changed.
        for leaf in &self.leaves {
            leaf.get("linear");
        }
        let [n, k] = self.weight.size();
        let dy = full.reshape([x.shape()[0], n]).contiguous();
        if sink.needs(0) {
            let dx = Tensor::empty(dy.gpu(), "linear", [x.shape()[0], k], sink.dtype(0));
            self.used.multiply(false, |right| Product::new("linear", &dy, right).write(&dx));
            sink.add(0, dx.reshape(self.shape));
        }
        let mut next = 1;
        if self.bias {
            if sink.needs(next) {
                add_sum(sink, next, &dy, 0);
            }
            next += 1;
        }
        if self.residual {
            sink.add(next, full.clone());
            next += 1;
        }
        if (0..self.leaves.len()).any(|i| sink.needs(next + i)) {
            self.weight.backward(x, &dy, &mut LeafGrads::new(sink, next));
        }
    }
}
