//! PLeaS merges two aligned models. Pairs of units that agree become one, other pairs are both kept, and the merged layers are
//! then fitted to both models' outputs by least squares. Source: Nasery et al., arXiv 2407.02447.
//!
//! The two models must be aligned already: unit `i` of one is matched to unit `i` of the other. Of a pair that is kept apart,
//! both units remain, so a layer of `n` pairs with a fraction `r` kept apart has `n (1 + r)` units.

use crate::error::{Error, Result};
use crate::linalg;
use crate::tensor::Tensor;

/// Which matched pairs of units of a group are merged, and which are kept apart. The merged network has first the merged units,
/// then the first model's units that are kept apart, then the second model's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Pairs that are merged, ascending.
    pub merged: Vec<u32>,
    /// Pairs that are kept apart, ascending.
    pub apart: Vec<u32>,
}

impl Split {
    /// Keeps a fraction `ratio` of the pairs apart, those with the least agreement (the matching's cost `C[i, P_i]`), and merges
    /// the others. Of pairs that agree equally, earlier ones are merged first.
    ///
    /// # Panics
    /// When `ratio` is outside `[0, 1]`.
    #[track_caller]
    pub fn by_agreement(agreement: &[f64], ratio: f64) -> Split {
        assert!((0.0..=1.0).contains(&ratio), "pleas: a share of {ratio} kept apart is outside [0, 1]");
        let mut order: Vec<u32> = (0..agreement.len() as u32).collect();
        order.sort_by(|&a, &b| agreement[b as usize].total_cmp(&agreement[a as usize]));
        let apart = (ratio * agreement.len() as f64).round() as usize;
        let (merged, rest) = order.split_at(agreement.len() - apart);
        let [mut merged, mut apart] = [merged.to_vec(), rest.to_vec()];
        merged.sort_unstable();
        apart.sort_unstable();
        Split { merged, apart }
    }

    /// Returns one split per group, with a fraction `budget` of all pairs kept apart: those with the least agreement relative to
    /// their group's largest. This is a greedy solution of the paper's quadratic program, which ignores that a layer's cost
    /// depends on two groups.
    ///
    /// # Panics
    /// When `budget` is outside `[0, 1]`.
    #[track_caller]
    pub fn within(agreements: &[Vec<f64>], budget: f64) -> Vec<Split> {
        let shares: Vec<Vec<f64>> = agreements
            .iter()
            .map(|all| {
                let most = all.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
                all.iter().map(|x| x / most).collect()
            })
            .collect();
        let joined = Split::by_agreement(&shares.concat(), budget);
        let mut first = 0;
        let mut split = |group: &Vec<f64>| {
            let range = first..first + group.len() as u32;
            first = range.end;
            let own =
                |ids: &[u32]| ids.iter().filter(|i| range.contains(i)).map(|i| i - range.start).collect();
            Split { merged: own(&joined.merged), apart: own(&joined.apart) }
        };
        shares.iter().map(&mut split).collect()
    }

    /// Merges all of `n` units, as for the inputs and outputs of a network.
    pub fn whole(n: usize) -> Split {
        Split { merged: (0..n as u32).collect(), apart: Vec::new() }
    }

    /// The split of an axis on which every unit has so many places, one after the other.
    pub fn repeated(&self, times: usize) -> Split {
        let each = |ids: &[u32]| {
            ids.iter().flat_map(|&id| (0..times as u32).map(move |k| id * times as u32 + k)).collect()
        };
        Split { merged: each(&self.merged), apart: each(&self.apart) }
    }

    /// Number of units in the merged network.
    pub fn width(&self) -> usize {
        self.merged.len() + 2 * self.apart.len()
    }

    fn rows(&self, x: &Tensor, axis: isize) -> [Tensor; 2] {
        [&self.merged, &self.apart].map(|ids| {
            let ids = Tensor::from_slice(x.gpu(), ids, [ids.len()]);
            x.index_select(axis, &ids)
        })
    }
}

/// Returns the matrix `[out.width(), inner.width()]` of a merged layer from the aligned `a, b [out, in]`:
///
/// ```text
///              merged        a's own   b's own
/// merged     (a + b) / 2       a / 2     b / 2
/// a's own         a              a         0
/// b's own         b              0         b
/// ```
///
/// # Panics
/// When the sizes do not fit.
#[track_caller]
pub fn merge_layer(a: &Tensor, b: &Tensor, out: &Split, inner: &Split) -> Tensor {
    let sizes = [out, inner].map(|s| s.merged.len() + s.apart.len());
    let fits = a.shape() == b.shape() && **a.shape() == sizes;
    assert!(fits, "pleas: matrices {} and {} for {} and {} units", a.shape(), b.shape(), sizes[0], sizes[1]);
    let [[amm, ams], [asm, ass]] = out.rows(a, 0).map(|rows| inner.rows(&rows, 1));
    let [[bmm, bms], [bsm, bss]] = out.rows(b, 0).map(|rows| inner.rows(&rows, 1));
    let zeros = Tensor::zeros(a.gpu(), *ass.shape());
    let row = |parts: [&Tensor; 3]| Tensor::concat(&parts, 1);
    let merged = row([&amm.add(&bmm).scale(0.5), &ams.scale(0.5), &bms.scale(0.5)]);
    Tensor::concat(&[&merged, &row([&asm, &ass, &zeros]), &row([&bsm, &zeros, &bss])], 0)
}

/// Returns the bias `[out.width()]` of a merged layer: the mean for merged units, else each model's own.
///
/// # Panics
/// When the sizes do not fit.
#[track_caller]
pub fn merge_bias(a: &Tensor, b: &Tensor, out: &Split) -> Tensor {
    let [[am, aa], [bm, ba]] = [a, b].map(|x| out.rows(x, 0));
    Tensor::concat(&[&am.add(&bm).scale(0.5), &aa, &ba], 0)
}

/// Returns the cost of a layer between two splits relative to one model's layer: `(1 + r1)(1 + r2) - 2 r1 r2`, without the zero
/// blocks.
pub fn flops_factor(out: &Split, inner: &Split) -> f64 {
    let [a, b] = [out, inner].map(|s| s.apart.len() as f64 / (s.merged.len() + s.apart.len()).max(1) as f64);
    (1.0 + a) * (1.0 + b) - 2.0 * a * b
}

/// Returns the activations `[rows, split.width()]` that the merged network should have, from the two models' `[rows, units]`: the
/// mean for merged units, else each model's own, in the order of [`Split`].
///
/// # Panics
/// When the sizes do not fit.
#[track_caller]
pub fn targets(a: &Tensor, b: &Tensor, split: &Split) -> Tensor {
    let [[am, aa], [bm, ba]] = [a, b].map(|x| split.rows(x, 1));
    Tensor::concat(&[&am.add(&bm).scale(0.5), &aa, &ba], 1)
}

/// Solves `argmin_W ||z W^T - y||^2 + ridge ||W||^2` for `W [out, in]`, with inputs `z [rows, in]` and outputs `y [rows, out]`.
///
/// The products are computed on the device in f32, and the normal equations are solved on the host in f64. Two more solves for
/// the residual remove the effect of the products' rounding.
///
/// # Errors
/// When the inputs do not determine the weights (use a larger `ridge` or more rows), or the device fails.
///
/// # Panics
/// When the numbers of rows differ.
#[track_caller]
pub fn least_squares(z: &Tensor, y: &Tensor, ridge: f64) -> Result<Tensor> {
    let (n, out) = (z.shape()[1], y.shape()[1]);
    assert!(z.shape()[0] == y.shape()[0], "least_squares: inputs {} and outputs {}", z.shape(), y.shape());
    let wide =
        |x: Tensor| Ok::<_, Error>(x.to_vec::<f32>()?.into_iter().map(f64::from).collect::<Vec<f64>>());
    let mut gram = wide(z.t().matmul_f32(z))?;
    gram.iter_mut().step_by(n + 1).for_each(|diagonal| *diagonal += ridge);
    let mut w = vec![0.0; n * out];
    for pass in 0..3 {
        let rest = match pass {
            0 => y.clone(),
            _ => y.sub(&z.matmul_f32(&weights(z, &w, [n, out]))),
        };
        let mut right = wide(z.t().matmul_f32(&rest))?;
        right.iter_mut().zip(&w).for_each(|(r, w)| *r -= ridge * w);
        let step = linalg::solve_positive(&gram, n, &right, out).ok_or_else(|| {
            Error::config(
                "least_squares: the inputs do not determine the weights; use more rows or a larger ridge",
            )
        })?;
        w.iter_mut().zip(step).for_each(|(w, s)| *w += s);
    }
    Ok(weights(z, &w, [n, out]).t().contiguous())
}

fn weights(on: &Tensor, w: &[f64], shape: [usize; 2]) -> Tensor {
    let w: Vec<f32> = w.iter().map(|&x| x as f32).collect();
    Tensor::from_slice(on.gpu(), &w, shape)
}
