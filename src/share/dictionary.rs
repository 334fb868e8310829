//! Weights that are linear combinations of atoms: one small dictionary for all layers of a kind.
//!
//! `W_l = sum_s c[l, s] D_s` with atoms `D [S, out, in]` and coefficients `c [L, S]`.
//! Source: MASA, arXiv 2508.04581.

use super::tied::dense;
use super::{LeafGrads, Load, Site, Tied};
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::linalg;
use crate::ops::case::{Array, Case, Input};
use crate::ops::product::matmul::Epilogue;
use crate::ops::product::mixed;
use crate::ops::product::narrow::stored;
use crate::rng::Rng;
use crate::tape;
use crate::tensor::Tensor;
use std::sync::Arc;

/// The atoms and coefficients of one projection over all layers.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::{Dictionary, Site};
/// let atoms = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 1, 2]); // 2 atoms [1, 2]
/// let c = Tensor::from_slice(&gpu, &[1f32, 0.0, 0.0, 1.0, 1.0, 1.0], [3, 2]); // 3 layers
/// let dictionary = Dictionary::new(&atoms, &c);
/// let weights = dictionary.weights();
/// assert_eq!(weights.len(), 3);
/// assert_eq!(weights[2].expand().to_vec::<f32>()?, [4.0, 6.0]); // the sum of both atoms
/// assert_eq!(dictionary.site(1).expand().to_vec::<f32>()?, [3.0, 4.0]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Dictionary {
    /// `[S, out, in]`
    pub atoms: Tensor,
    /// `[L, S]`
    pub coefficients: Tensor,
}

impl Dictionary {
    /// Makes a dictionary of atoms and coefficients.
    ///
    /// # Panics
    /// When the shapes do not fit.
    #[track_caller]
    pub fn new(atoms: &Tensor, coefficients: &Tensor) -> Dictionary {
        let (d, c) = (atoms.shape(), coefficients.shape());
        let fits = d.len() == 3 && c.len() == 2 && c[1] == d[0] && d.count() > 0 && c[0] > 0;
        assert!(fits, "dictionary: atoms {d}, coefficients {c}; they must be [S, out, in] and [L, S]");
        Dictionary { atoms: atoms.clone(), coefficients: coefficients.clone() }
    }

    /// Makes initial leaves. Atoms are normal with variance `scale^2` and rows of coefficients lie on the unit sphere, so
    /// each layer's weight has that variance too.
    ///
    /// # Panics
    /// When `atoms` exceeds `layers`, which would store more than is used, or a size is 0.
    #[track_caller]
    pub fn random(
        gpu: &Gpu,
        layers: usize,
        atoms: usize,
        [out, inner]: [usize; 2],
        scale: f32,
        rng: &mut Rng,
    ) -> Dictionary {
        assert!(
            atoms > 0 && atoms <= layers && out * inner > 0,
            "dictionary: {atoms} atoms of [{out}, {inner}] for {layers} layers; use 1 to {layers}"
        );
        let d = Tensor::randn(gpu, [atoms, out, inner], rng).scale(scale);
        let mut c = vec![0.0f32; layers * atoms];
        rng.fill_normal(&mut c);
        for row in c.chunks_mut(atoms) {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
            row.iter_mut().for_each(|x| *x /= norm);
        }
        let c = Tensor::from_slice(gpu, &c, [layers, atoms]);
        d.evaluate();
        Dictionary { atoms: d.requires_grad(), coefficients: c.requires_grad() }
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.coefficients.shape()[0]
    }

    /// Computes the weights of all layers in one pass: for training, once per step. Their gradients are computed in one
    /// pass too.
    pub fn weights(&self) -> Vec<Arc<dyn Site>> {
        let all = self.atoms.combine(&self.coefficients);
        all.iter().map(|w| Tied::new(w).shared()).collect()
    }

    /// Returns the weight of one layer, which is computed as it is read and never stored. This takes less memory and,
    /// from a few tokens on, more time.
    ///
    /// # Panics
    /// When the layer does not exist.
    #[track_caller]
    pub fn site(&self, layer: usize) -> Arc<dyn Site> {
        assert!(layer < self.layers(), "dictionary: layer {layer} of {}", self.layers());
        Arc::new(Atoms { dictionary: self.clone(), layer })
    }

    /// Returns `y[i] = x[i] W_l^T` with `l = layers[i]`, for rows `x [rows, in]` at different layers; `layers` is
    /// `[rows]` of u32. It is computed as `y = sum_s (c[layers, s] x) D_s^T`, which reads the atoms once, however many
    /// layers there are.
    ///
    /// Without a tape this takes two dispatches: the products with all atoms, and their sum, in which each row has the
    /// coefficients of its layer. A row at a layer that does not exist is zero.
    ///
    /// This costs S times the products of one layer. It pays for few rows, where reading weights dominates.
    ///
    /// # Panics
    /// When the sizes do not fit.
    #[track_caller]
    pub fn mixed(&self, x: &Tensor, layers: &Tensor) -> Tensor {
        let [atoms, _, inner] = [self.atoms.shape()[0], self.atoms.shape()[1], self.atoms.shape()[2]];
        let rows = layers.count();
        assert!(
            **x.shape() == [rows, inner] && layers.shape().len() == 1,
            "dictionary: rows {} at layers {}, atoms {}",
            x.shape(),
            layers.shape(),
            self.atoms.shape()
        );
        if !tape::tracks(&[x, &self.atoms, &self.coefficients]) && layers.dtype() == DType::U32 && rows > 0 {
            let [d, c] = [&self.atoms, &self.coefficients].map(Tensor::detach);
            return stored(&mixed::layers("dictionary", &x.detach(), &d, &c, layers));
        }
        let c = self.coefficients.index_select(0, layers).t().reshape([atoms, rows, 1]);
        let scaled = x.unsqueeze(0).mul(&c);
        stored(&scaled.matmul(&self.atoms.transpose(1, 2)).sum(0))
    }
}

/// Coefficients from a small network: `C = C0 + W3 gelu(W2 gelu(W1 e_l + b1) + b2) + b3`, where `e_l` is the vector of
/// layer l.
///
/// The network is what is trained; afterwards only C is kept. Without `base`, a network with an ordinary initialisation
/// gives coefficients that are far too small (arXiv 2508.04581 does not say how to initialise it). With `C0` on the unit
/// sphere, training starts like that of direct coefficients.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::CoefficientNet;
/// let leaf = |shape: &[usize]| Tensor::zeros(&gpu, shape).requires_grad();
/// let layers = [[4, 2], [4, 4], [3, 4]].map(|[out, inner]| [leaf(&[out, inner]), leaf(&[out])]);
/// let base = Tensor::ones(&gpu, [5, 3]).requires_grad(); // 5 layers, 3 atoms
/// let net = CoefficientNet { embedding: leaf(&[5, 2]), layers, base: Some(base) };
/// assert_eq!(net.forward().to_vec2::<f32>()?, [[1.0; 3]; 5]); // zero matrices add nothing
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct CoefficientNet {
    /// `[L, E]`
    pub embedding: Tensor,
    /// `[hidden, E]`, `[hidden, hidden]`, `[S, hidden]`, each with its bias.
    pub layers: [[Tensor; 2]; 3],
    /// `C0 [L, S]`, trained too.
    pub base: Option<Tensor>,
}

impl CoefficientNet {
    /// Returns `C [L, S]`.
    ///
    /// # Panics
    /// When the shapes do not fit.
    #[track_caller]
    pub fn forward(&self) -> Tensor {
        let through = |x: &Tensor, [w, b]: &[Tensor; 2]| x.matmul(&w.t()).add(b);
        let [first, second, third] = &self.layers;
        let c = through(&self.embedding, first).gelu_tanh();
        let c = through(&through(&c, second).gelu_tanh(), third);
        self.base.as_ref().map_or(c.clone(), |base| base.add(&c))
    }
}

/// Approximates matrices `w [L, out, in]` by combinations of `atoms` orthonormal ones with the least squared error
/// (matrix PCA), from the `L x L` Gram matrix: `G_ij = <W_i, W_j> = U E U^T`, `D_s = sum_l U_ls W_l / sqrt(E_s)`,
/// `c_ls = <W_l, D_s>`.
///
/// Returns the dictionary, and the eigenvalues of G from large to small. The squared error is the sum of the eigenvalues
/// after the first `atoms`. Source: MASA, arXiv 2508.04581, section 3.3. The weights of different layers of a pretrained
/// model are nearly orthogonal, so few atoms keep little of them.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When `w` does not have three axes, or `atoms` is 0 or above L.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::{Site, matrix_pca};
/// // The second matrix is three times the first, so one atom suffices.
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 6.0], [2, 1, 2]);
/// let (dictionary, eigenvalues) = matrix_pca(&w, 1)?;
/// assert!(eigenvalues[1].abs() < 1e-4);
/// let second = dictionary.site(1).expand().to_vec::<f32>()?;
/// assert!((second[0] - 3.0).abs() < 1e-4 && (second[1] - 6.0).abs() < 1e-4);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[track_caller]
pub fn matrix_pca(w: &Tensor, atoms: usize) -> Result<(Dictionary, Vec<f64>)> {
    let shape = *w.shape();
    assert!(shape.len() == 3 && shape.count() > 0, "matrix_pca: needs [layers, out, in], got {shape}");
    let layers = shape[0];
    assert!(atoms > 0 && atoms <= layers, "matrix_pca: {atoms} atoms for {layers} layers; use 1 to {layers}");
    let flat = w.detach().cast(DType::F32).reshape([layers, shape[1] * shape[2]]);
    let gram: Vec<f64> = flat.matmul_f32(&flat.t()).to_vec::<f32>()?.into_iter().map(f64::from).collect();
    let (values, vectors) = linalg::symmetric_eigen(&gram, layers);
    // U over sqrt(E), atom by atom. An atom with a negligible eigenvalue becomes zero.
    let floor = values[0].max(0.0) * 1e-12;
    let to_atoms: Vec<f32> = (0..atoms)
        .flat_map(|s| {
            let scale = if values[s] > floor { values[s].sqrt().recip() } else { 0.0 };
            let vectors = &vectors;
            (0..layers).map(move |l| (vectors[s * layers + l] * scale) as f32)
        })
        .collect();
    let d = Tensor::from_slice(w.gpu(), &to_atoms, [atoms, layers]).matmul_f32(&flat);
    let c = flat.matmul_f32(&d.t());
    let atoms = d.reshape([atoms, shape[1], shape[2]]);
    atoms.evaluate();
    c.evaluate();
    Ok((Dictionary::new(&atoms.requires_grad(), &c.requires_grad()), values))
}

/// One layer of a dictionary, computed as it is read.
struct Atoms {
    dictionary: Dictionary,
    layer: usize,
}

impl Site for Atoms {
    fn name(&self) -> &'static str {
        "atoms"
    }

    fn size(&self) -> [usize; 2] {
        let d = self.dictionary.atoms.shape();
        [d[1], d[2]]
    }

    fn leaves(&self) -> Vec<Tensor> {
        vec![self.dictionary.atoms.clone(), self.dictionary.coefficients.clone()]
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        &["atoms", "coefficients"]
    }

    fn with_tensors(&self, leaves: &[Tensor], _: &[Tensor]) -> Arc<dyn Site> {
        Dictionary::new(&leaves[0], &leaves[1]).site(self.layer)
    }

    fn load(&self) -> Load {
        let ([rows, columns], atoms) = (self.size(), self.dictionary.atoms.shape()[0]);
        let tensors = vec![
            ("theta", dense(&self.dictionary.atoms)),
            ("coefficients", dense(&self.dictionary.coefficients)),
        ];
        let params = [rows, columns, atoms, self.layer].map(|v| v as u32);
        Load { turns: atoms, ..Load::new("site_atoms", tensors, params) }
    }

    /// `dD_s = c[l, s] dW`, `dc[l, s] = <dW, D_s>`.
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        let (atoms, c) = (self.dictionary.atoms.detach(), self.dictionary.coefficients.detach());
        let (count, size) = (atoms.shape()[0], dw.count());
        if grads.needs(0) {
            let row = c.slice(0, self.layer..self.layer + 1).reshape([count, 1, 1]);
            grads.add(0, dw.unsqueeze(0).mul(&row));
        }
        if grads.needs(1) {
            let row = atoms.reshape([count, size]).matmul(&dw.reshape([size, 1])).reshape([1, count]);
            grads.add(1, row.pad(0, self.layer, self.dictionary.layers() - self.layer - 1));
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let weight64 = |d: &Array, c: &Array, layer: usize| {
        let (atoms, size) = (d.shape[0], d.shape[1] * d.shape[2]);
        Array::from_fn([d.shape[1], d.shape[2]], |i| {
            (0..atoms).map(|s| c.data[layer * atoms + s] * d.data[s * size + i]).sum()
        })
    };
    let linear64 = |x: &Array, w: &Array| {
        let (n, k) = (w.shape[0], w.shape[1]);
        Array::from_fn([x.shape[0], n], |i| {
            (0..k).map(|q| x.data[i / n * k + q] * w.data[i % n * k + q]).sum()
        })
    };
    let mut all = Vec::new();
    for (rows, n, k, layers, atoms) in [(1, 1, 1, 1, 1), (5, 7, 3, 4, 2), (9, 8, 12, 3, 3), (67, 5, 6, 2, 2)]
    {
        let inputs =
            vec![Input::normal([rows, k]), Input::normal([atoms, n, k]), Input::normal([layers, atoms])];
        let layer = layers / 2;
        let reference = move |x: &[Array]| linear64(&x[0], &weight64(&x[1], &x[2], layer));
        let name = format!("{rows} {n} {k}, layer {layer} of {layers}");
        let one =
            move |x: &[Tensor]| x[0].linear(&Dictionary::new(&x[1], &x[2]).site(layer), Epilogue::default());
        all.push(Case::new(format!("as read {name}"), inputs.clone(), one, reference).ulps(16.0, 32.0));
        let made = move |x: &[Tensor]| {
            x[0].linear(&Dictionary::new(&x[1], &x[2]).weights()[layer], Epilogue::default())
        };
        all.push(Case::new(format!("made {name}"), inputs, made, reference).ulps(16.0, 32.0));
    }
    let which = [2u32, 0, 2, 1, 0];
    let inputs = vec![Input::normal([5, 6]), Input::normal([2, 4, 6]), Input::normal([3, 2])];
    let mixed = move |x: &[Tensor]| {
        Dictionary::new(&x[1], &x[2]).mixed(&x[0], &Tensor::from_slice(x[0].gpu(), &which, [5]))
    };
    let reference = move |x: &[Array]| {
        let rows: Vec<Array> = (0..3).map(|l| linear64(&x[0], &weight64(&x[1], &x[2], l))).collect();
        Array::from_fn([5, 4], |i| rows[which[i / 4] as usize].data[i])
    };
    let alone = move |x: &[Tensor]| tape::no_grad(|| mixed(x));
    let fixed = inputs.iter().cloned().map(Input::fixed).collect();
    all.push(Case::new("rows of three layers without a tape", fixed, alone, reference).ulps(16.0, 32.0));
    all.push(Case::new("rows of three layers", inputs, mixed, reference).ulps(16.0, 32.0));
    all
}
