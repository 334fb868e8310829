//! Reversible merging: several models are stored as a small basis for each row of their task vectors, from which every model can
//! be reconstructed.
//!
//! For row `r` of `n` models, `X_r [n, d]`, the best basis of `p` vectors belongs to the largest eigenvalues of the Gram matrix
//! `X_r X_r^T = U E U^T`. The basis is `B_r = E^-1/2 U_p^T X_r` and the models' coefficients are `C_r = U_p E^1/2`. The product
//! `C_r B_r` is the projection of `X_r`, and equals `X_r` for `p = n`. Source: arXiv 2510.14163 (low-rank factors); matrix PCA.

use crate::error::Result;
use crate::linalg;
use crate::tensor::Tensor;

/// One tensor of `n` models, stored as `rows (p d + n p)` numbers instead of `rows n d`.
#[derive(Clone, Debug)]
pub struct Reversible {
    /// `[rows, p, d]`
    basis: Tensor,
    /// `[rows, n, p]`
    coefficients: Tensor,
}

impl Reversible {
    /// Computes a basis of `p` vectors for each row of the models' tensors `[rows, d]`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there are no models, they are not matrices of one shape, or `p` is not in `1..=n`.
    #[track_caller]
    pub fn new(models: &[Tensor], p: usize) -> Result<Reversible> {
        let n = models.len();
        assert!((1..=n).contains(&p), "reversible: a basis of {p} for {n} models");
        let shape = *models[0].shape();
        let fits = shape.len() == 2 && models.iter().all(|m| *m.shape() == shape);
        assert!(fits, "reversible: models of {shape}; all must be [rows, d]");
        let rows = shape[0];
        let x = Tensor::stack(&models.iter().collect::<Vec<_>>(), 1).detach();
        let grams = x.matmul_f32(&x.transpose(1, 2)).to_vec::<f32>()?;
        let (mut to_basis, mut coefficients) = (vec![0.0f32; rows * p * n], vec![0.0f32; rows * n * p]);
        for row in 0..rows {
            let gram: Vec<f64> = grams[row * n * n..][..n * n].iter().map(|&g| f64::from(g)).collect();
            let (values, vectors) = linalg::symmetric_eigen(&gram, n);
            for s in 0..p {
                // Rounding may make an eigenvalue of 0 slightly negative. Its basis vector is then 0.
                let length = values[s].max(0.0).sqrt();
                for i in 0..n {
                    let u = vectors[s * n + i];
                    to_basis[(row * p + s) * n + i] = if length > 0.0 { (u / length) as f32 } else { 0.0 };
                    coefficients[(row * n + i) * p + s] = (u * length) as f32;
                }
            }
        }
        let gpu = x.gpu();
        let basis = Tensor::from_slice(gpu, &to_basis, [rows, p, n]).matmul_f32(&x);
        Ok(Reversible { basis, coefficients: Tensor::from_slice(gpu, &coefficients, [rows, n, p]) })
    }

    /// Reconstructs the tensor `[rows, d]` of model `i`.
    ///
    /// # Panics
    /// When `i` is not the number of a model.
    #[track_caller]
    pub fn model(&self, i: usize) -> Tensor {
        let (rows, n) = (self.coefficients.shape()[0], self.coefficients.shape()[1]);
        assert!(i < n, "reversible: model {i} of {n}");
        let y = self.coefficients.slice(1, i..i + 1).matmul_f32(&self.basis);
        y.reshape([rows, self.basis.shape()[2]])
    }

    /// A basis `[rows, p, d]` with coefficients `[rows, n, p]`, if they fit each other.
    pub(super) fn of(basis: Tensor, coefficients: Tensor) -> Option<Reversible> {
        let fits = match (&basis.shape()[..], &coefficients.shape()[..]) {
            (&[rows, p, _], &[own, _, q]) => rows == own && p == q,
            _ => false,
        };
        fits.then_some(Reversible { basis, coefficients })
    }

    /// `[rows, p, d]`
    pub fn basis(&self) -> &Tensor {
        &self.basis
    }

    /// `[rows, n, p]`
    pub fn coefficients(&self) -> &Tensor {
        &self.coefficients
    }

    /// Number of models.
    pub fn models(&self) -> usize {
        self.coefficients.shape()[1]
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.basis.shape()[0]
    }

    /// Number of elements of a model's tensor.
    pub fn count(&self) -> usize {
        self.basis.shape()[0] * self.basis.shape()[2]
    }

    /// How many numbers are stored.
    pub fn stored(&self) -> usize {
        self.basis.count() + self.coefficients.count()
    }
}
