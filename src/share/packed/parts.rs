//! Packed weights whose scales are trained.

use super::format::drawn;
use super::{Packed, Packing, Scales};
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::case::{Array, Case, Input};
use crate::ops::product::matmul::Epilogue;
use crate::share::tied::{dense, linear64};
use crate::share::{LeafGrads, Load, Site};
use crate::tensor::Tensor;
use std::sync::Arc;

/// `W = scale q + offset` with packed levels `q [out, in]` that are frozen, and leaves `scale` and `offset [out, groups]`.
///
/// In a product the weight is written down, since its gradient `dW` takes as much memory anyway.
#[derive(Clone)]
pub struct PackedScales {
    packed: Packed,
    scale: Tensor,
    offset: Tensor,
}

impl PackedScales {
    pub(super) fn new(packed: &Packed) -> Result<PackedScales> {
        let ([out, columns], packing) = (packed.size(), packed.packing);
        let words = packed.words.to_vec::<u32>()?;
        let rows = words.chunks_exact(packing.row_words(columns));
        let pairs: Vec<[f32; 2]> = rows
            .flat_map(|row| {
                (0..columns).step_by(packing.group()).map(move |c| packing.scale(row, columns, c))
            })
            .collect();
        let leaf = |which: usize| {
            let all: Vec<f32> = pairs.iter().map(|pair| pair[which]).collect();
            Tensor::from_slice(packed.words.gpu(), &all, [out, packing.groups(columns)]).requires_grad()
        };
        let [scale, offset] = [leaf(0), leaf(1)];
        Ok(PackedScales { packed: packed.clone(), scale, offset })
    }

    /// The same levels with these scales and offsets.
    ///
    /// # Panics
    /// When a shape is not `[out, groups]`.
    #[track_caller]
    pub fn with(&self, scale: &Tensor, offset: &Tensor) -> PackedScales {
        let fits = [scale, offset].iter().all(|x| x.shape() == self.scale.shape());
        let want = self.scale.shape();
        assert!(fits, "packed_scales: scale {}, offset {} for {want}", scale.shape(), offset.shape());
        PackedScales { packed: self.packed.clone(), scale: scale.clone(), offset: offset.clone() }
    }

    /// The levels as floats `[out, in]`.
    fn levels(&self) -> Tensor {
        let load = self.packed.load();
        let load = Load { constants: [load.constants, vec![("LEVELS", 1)]].concat(), ..load };
        load.expand("packed_scales", self.size(), DType::F32)
    }

    /// Every column's number of its group.
    fn spread(&self, x: &Tensor) -> Tensor {
        let ([out, columns], group) = (self.size(), self.packed.packing.group());
        let groups = x.shape()[1];
        let wide = dense(x).reshape([out, groups, 1]).expand([out, groups, group]);
        wide.reshape([out, groups * group]).slice(1, 0..columns)
    }

    /// The sum over the columns of each group.
    fn sums(&self, x: &Tensor) -> Tensor {
        let ([out, columns], group) = (self.size(), self.packed.packing.group());
        let groups = columns.div_ceil(group);
        x.pad(1, 0, groups * group - columns).reshape([out, groups, group]).sum(-1)
    }
}

impl Site for PackedScales {
    fn name(&self) -> &'static str {
        "packed_scales"
    }

    fn size(&self) -> [usize; 2] {
        self.packed.size()
    }

    fn leaves(&self) -> Vec<Tensor> {
        vec![self.scale.clone(), self.offset.clone()]
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        &["scale", "offset"]
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.packed.buffers()
    }

    fn with_tensors(&self, leaves: &[Tensor], buffers: &[Tensor]) -> Arc<dyn Site> {
        let packed = self.packed.with_words(&buffers[0]);
        Arc::new(PackedScales { packed, ..self.clone() }.with(&leaves[0], &leaves[1]))
    }

    fn load(&self) -> Load {
        Load::stored(self.expand())
    }

    fn expand_as(&self, dtype: DType) -> Tensor {
        self.levels().mul(&self.spread(&self.scale)).add(&self.spread(&self.offset)).cast(dtype)
    }

    /// `dscale[r, g] = sum over the group's columns of dW q`, `doffset[r, g] = sum of dW`.
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        if grads.needs(0) {
            grads.add(0, self.sums(&dw.mul(&self.levels())));
        }
        if grads.needs(1) {
            grads.add(1, self.sums(dw));
        }
    }
}

/// A packed matrix of 4 bits in groups of 16, and its levels and weights.
fn sample([n, k]: [usize; 2]) -> (Packing, Vec<u32>, Array, Array) {
    let packing = Packing::new(4, 16, Scales::Affine).expect("a packing");
    let words = drawn(packing, [n, k], 11);
    let weights = packing.decode(&words, k);
    let row = packing.row_words(k);
    let level = |i: usize| f64::from(packing.level(&words[i / k * row..][..row], k, i % k));
    (packing, words.clone(), Array::from_fn([n, k], level), Array::from_fn([n, k], |i| f64::from(weights[i])))
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for [rows, n, k] in [[1, 5, 20], [4, 8, 36], [70, 5, 16]] {
        let (packing, words, levels, weights) = sample([n, k]);
        let packed = words.clone();
        let low = move |x: &[Tensor]| {
            let site = Packed::new(x[0].gpu(), packing, [n, k], &packed).expect("a packed matrix");
            let site = site.low_rank(&x[1], &x[2], 0.5).shared();
            x[0].linear(&site, Epilogue::default())
        };
        let reference = move |x: &[Array]| {
            let own = |i: usize| -> f64 {
                (0..2).map(|r| x[2].data[i / k * 2 + r] * x[1].data[r * k + i % k]).sum()
            };
            linear64(&x[0], &Array::from_fn([n, k], |i| weights.data[i] + 0.5 * own(i)))
        };
        let inputs = vec![Input::normal([rows, k]), Input::normal([2, k]), Input::normal([n, 2])];
        all.push(Case::new(format!("low rank {rows} {n} {k}"), inputs, low, reference).ulps(16.0, 32.0));
        let scaled = move |x: &[Tensor]| {
            let site = Packed::new(x[0].gpu(), packing, [n, k], &words).expect("a packed matrix");
            let site = site.scales().expect("the device works").with(&x[1], &x[2]);
            x[0].linear(&site.shared(), Epilogue::default())
        };
        let groups = k.div_ceil(16);
        let reference = move |x: &[Array]| {
            let group = |i: usize| i / k * groups + i % k / 16;
            let weight = |i: usize| x[1].data[group(i)] * levels.data[i] + x[2].data[group(i)];
            linear64(&x[0], &Array::from_fn([n, k], weight))
        };
        let inputs = vec![Input::normal([rows, k]), Input::normal([n, groups]), Input::normal([n, groups])];
        all.push(Case::new(format!("scales {rows} {n} {k}"), inputs, scaled, reference).ulps(16.0, 32.0));
    }
    all
}
