//! Linear layers on some rows only, as routed models need them. Rows are gathered as the product reads its left side, or
//! results are scattered as they are stored, each times its gate.

use super::matmul::product::{Product, Rows};
use super::narrow;
use super::site::{LeafGrads, Site};
use super::weight::Weight;
use crate::dtype::DType;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::precision::precision;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};
use std::sync::Arc;

#[track_caller]
fn check(op: &str, x: &Tensor, list: &Tensor, sizes: [usize; 2]) {
    let x_fits = x.shape().len() == 2 && x.shape()[1] == sizes[1];
    assert!(x_fits, "{op}: input {} for a weight [{}, {}]", x.shape(), sizes[0], sizes[1]);
    assert!(x.dtype().is_float(), "{op}: needs floats, got {}; cast first", x.dtype());
    let list_fits = list.shape().len() == 1 && list.dtype() == DType::U32;
    assert!(list_fits, "{op}: rows must be a list of u32, got {} of {}", list.shape(), list.dtype());
}

impl Tensor {
    /// Returns `y[i] = x[rows[i]] W^T`, where `self` is `x [all, in]`, `rows` is `[some]` of u32 and `W` is `[out, in]`.
    /// The rows are gathered as the product reads them.
    ///
    /// Derivatives: `dx[rows[i]] = dy[i] W`, zero elsewhere, and the site's own rule. The listed rows must all differ: of
    /// equal ones, only one would reach `dx`. A listed row that `x` does not have counts as zero and gets no gradient.
    ///
    /// # Panics
    /// When the sizes or types do not fit.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::share::{Site, Tied};
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0], [3, 1]);
    /// let w = Tied::new(&Tensor::from_slice(&gpu, &[1f32, 10.0], [2, 1])).shared();
    /// let rows = Tensor::from_slice(&gpu, &[2u32, 0], [2]);
    /// assert_eq!(x.linear_gathered(&rows, &w).to_vec2::<f32>()?, [[3.0, 30.0], [1.0, 10.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn linear_gathered(&self, rows: &Tensor, weight: &Arc<dyn Site>) -> Tensor {
        let op = "linear_gathered";
        let [n, k] = weight.size();
        check(op, self, rows, [n, k]);
        let leaves = weight.leaves();
        let mut inputs = vec![self];
        inputs.extend(&leaves);
        same_gpu(op, &inputs);
        same_gpu(op, &[self, rows]);
        let (x, rows) = (narrow::operand(self).contiguous(), rows.contiguous());
        let y = Tensor::empty(x.gpu(), op, [rows.count(), n], precision().dtype());
        // Rows that are not whole vectors are gathered by a separate pass.
        let whole = k.is_multiple_of(4) && x.offset.is_multiple_of(4) && x.shape()[0] > 0;
        let listed = if whole { x.clone() } else { x.index_select_padded(0, &rows) };
        let which = if whole { Rows::Gathered(&rows) } else { Rows::All };
        let used = Weight::of(weight);
        used.multiply(true, |right| {
            Product { rows: which, ..Product::new(op, &listed, right) }.write(&y);
        });
        y.made_by(&inputs, || {
            Box::new(Gathered {
                x: Saved::new(&x),
                used,
                rows: Saved::new(&rows),
                leaves: leaves.iter().map(Saved::new).collect(),
                weight: weight.clone(),
            })
        })
    }

    /// Returns `y = base` with `y[rows[i]] += gate[i] x[i] W^T`, where `self` is `base [all, out]`, `x` is `[some, in]`,
    /// `rows` is `[some]` of u32 and `gate` is `[some]`. The results are scattered as the product stores them.
    ///
    /// Derivatives: `dbase = dy`, `t = dy[rows] W`, `dx = gate t`, `dgate[i] = <t[i], x[i]>`, and the site's own rule on
    /// `gate dy[rows]`. The listed rows must all differ: of equal ones, only one would be added. A listed row that `base`
    /// does not have is left out.
    ///
    /// # Panics
    /// When the sizes or types do not fit.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::share::{Site, Tied};
    /// let base = Tensor::zeros(&gpu, [3, 1]);
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// let w = Tied::new(&Tensor::ones(&gpu, [1, 2])).shared();
    /// let rows = Tensor::from_slice(&gpu, &[2u32, 0], [2]);
    /// let gate = Tensor::from_slice(&gpu, &[1f32, 0.5], [2]);
    /// let y = base.add_linear_scattered(&x, &rows, &gate, &w);
    /// assert_eq!(y.to_vec::<f32>()?, [3.5, 0.0, 3.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn add_linear_scattered(
        &self,
        x: &Tensor,
        rows: &Tensor,
        gate: &Tensor,
        weight: &Arc<dyn Site>,
    ) -> Tensor {
        let op = "add_linear_scattered";
        let [n, k] = weight.size();
        check(op, x, rows, [n, k]);
        assert!(
            self.shape().len() == 2 && self.shape()[1] == n && self.dtype().is_float(),
            "{op}: base {} of {} for {n} outputs",
            self.shape(),
            self.dtype()
        );
        let some = rows.count();
        assert!(
            **gate.shape() == [some] && x.shape()[0] == some && gate.dtype() == DType::F32,
            "{op}: {some} rows, gate {} of {}, input {}",
            gate.shape(),
            gate.dtype(),
            x.shape()
        );
        let leaves = weight.leaves();
        let mut inputs = vec![self, x, gate];
        inputs.extend(&leaves);
        same_gpu(op, &inputs);
        same_gpu(op, &[self, rows]);
        let (list, scale) = (rows.contiguous(), gate.detach().contiguous());
        let x = narrow::operand(x);
        let y = Tensor::empty(self.gpu(), op, *self.shape(), precision().dtype());
        // The base is written to the tensor to which the products are then added. If it is still lazy, it is computed
        // there.
        self.detach().write_to(op, &y, false);
        let rows = Rows::Scattered { list: &list, gate: &scale };
        let used = Weight::of(weight);
        used.multiply(true, |right| {
            Product { rows, accumulate: true, ..Product::new(op, &x, right) }.write(&y);
        });
        y.made_by(&inputs, || {
            Box::new(Scattered {
                x: Saved::new(&x),
                used,
                rows: Saved::new(&list),
                gate: Saved::new(gate),
                leaves: leaves.iter().map(Saved::new).collect(),
                weight: weight.clone(),
            })
        })
    }
}

struct Gathered {
    x: Saved,
    rows: Saved,
    leaves: Vec<Saved>,
    weight: Arc<dyn Site>,
    /// As the forward pass read it.
    used: Weight,
}

impl Op for Gathered {
    fn name(&self) -> &'static str {
        "linear_gathered"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let [x, rows] = [&self.x, &self.rows].map(|saved| saved.get(self.name()));
        // The site reads its leaves itself. This only checks that they have not changed.
        for leaf in &self.leaves {
            leaf.get(self.name());
        }
        let dy = dy.contiguous();
        if sink.needs(0) {
            let dx = Tensor::zeros(dy.gpu(), *x.shape()).cast(sink.dtype(0));
            let ones = Tensor::ones(dy.gpu(), *rows.shape()).contiguous();
            dx.compute();
            let rows = Rows::Scattered { list: rows, gate: &ones };
            self.used.multiply(false, |right| {
                Product { rows, accumulate: true, ..Product::new(self.name(), &dy, right) }.write(&dx);
            });
            sink.add(0, dx);
        }
        if (0..self.leaves.len()).any(|i| sink.needs(1 + i)) {
            let x = crate::ops::float(self.name(), &x.detach()).index_select_padded(0, rows);
            self.weight.backward(&x, &dy, &mut LeafGrads::new(sink, 1));
        }
    }
}

struct Scattered {
    x: Saved,
    rows: Saved,
    gate: Saved,
    leaves: Vec<Saved>,
    weight: Arc<dyn Site>,
    /// As the forward pass read it.
    used: Weight,
}

impl Op for Scattered {
    fn name(&self) -> &'static str {
        "add_linear_scattered"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let op = self.name();
        let [x, rows, gate] = [&self.x, &self.rows, &self.gate].map(|saved| saved.get(op));
        for leaf in &self.leaves {
            leaf.get(op);
        }
        let (x, gate) = (crate::ops::float(op, &x.detach()), gate.detach().reshape([rows.count(), 1]));
        let own = dy.contiguous().index_select_padded(0, rows);
        if sink.needs(1) || sink.needs(2) {
            let through = Tensor::empty(dy.gpu(), op, *x.shape(), sink.dtype(1));
            self.used.multiply(false, |right| Product::new(op, &own, right).write(&through));
            if sink.needs(1) {
                sink.add(1, through.mul(&gate));
            }
            if sink.needs(2) {
                sink.add(2, through.mul(&x).sum(1));
            }
        }
        if (0..self.leaves.len()).any(|i| sink.needs(3 + i)) {
            self.weight.backward(&x, &own.mul(&gate), &mut LeafGrads::new(sink, 3));
        }
        sink.add(0, dy.clone());
    }
}

fn routed64(x: &Array, rows: &Array, w: &Array) -> Array {
    let (n, k) = (w.shape[0], w.shape[1]);
    Array::from_fn([rows.data.len(), n], |i| {
        let (from, col) = (rows.data[i / n] as usize, i % n);
        let x = (from < x.shape[0]).then(|| &x.data[from * k..][..k]);
        x.map_or(0.0, |x| x.iter().zip(&w.data[col * k..]).map(|(a, b)| a * b).sum())
    })
}

fn gathered([count, n, k]: [usize; 3], inputs: Vec<Input>, weight: fn(&Tensor) -> Arc<dyn Site>) -> Case {
    Case::new(
        format!("gathered {count} {n} {k}"),
        inputs,
        move |x| x[0].linear_gathered(&x[1], &weight(&x[2])),
        |x| routed64(&x[0], &x[1], &x[2]),
    )
}

fn scattered([count, n, k]: [usize; 3], inputs: Vec<Input>, weight: fn(&Tensor) -> Arc<dyn Site>) -> Case {
    Case::new(
        format!("scattered {count} {n} {k}"),
        inputs,
        move |x| x[0].add_linear_scattered(&x[1], &x[2], &x[3], &weight(&x[4])),
        move |x| {
            let mut y = x[0].clone();
            for i in 0..x[2].data.len() * n {
                let (row, col, to) = (i / n, i % n, x[2].data[i / n] as usize);
                let dot: f64 = (0..k).map(|q| x[1].data[row * k + q] * x[4].data[col * k + q]).sum();
                if to < count {
                    y.data[to * n + col] += x[3].data[row] * dot;
                }
            }
            y
        },
    )
}

/// Cases for weights that `weight` makes of a stored matrix. The sharing kinds are on a floor above, so the caller passes
/// one.
pub(crate) fn cases(weight: fn(&Tensor) -> Arc<dyn Site>) -> Vec<Case> {
    let list = |values: &[f64]| {
        Input::integers([values.len()], DType::U32, 0, 1).fill(Fill::Values(values.to_vec()))
    };
    let mut all = Vec::new();
    // The last list names a row that does not exist.
    for (count, n, k, rows) in
        [(5, 8, 12, vec![3., 0., 4.]), (7, 3, 5, vec![6.]), (40, 9, 16, vec![39., 3., 17., 99., 0., 1.])]
    {
        let inputs = vec![Input::normal([count, k]), list(&rows), Input::normal([n, k])];
        all.push(gathered([count, n, k], inputs, weight));
        let some = rows.len();
        let inputs = vec![
            Input::normal([count, n]),
            Input::normal([some, k]),
            list(&rows),
            Input::normal([some]),
            Input::normal([n, k]),
        ];
        all.push(scattered([count, n, k], inputs, weight));
    }
    // A long inner axis, which GPUs cut into parts, of whole numbers whose sums are exact.
    let whole = |shape: &[usize]| Input::integers(shape, DType::F32, -30, 31);
    let (count, n, k, some) = (40, 12, 516, 11);
    let rows: Vec<f64> = (0..some).map(|i| (i * 7 % count) as f64).collect();
    let inputs = vec![whole(&[count, k]), list(&rows), whole(&[n, k])];
    all.push(gathered([count, n, k], inputs, weight).exact());
    let inputs = vec![whole(&[count, n]), whole(&[some, k]), list(&rows), whole(&[some]), whole(&[n, k])];
    all.push(scattered([count, n, k], inputs, weight).exact());
    all
}
