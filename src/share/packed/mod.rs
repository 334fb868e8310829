//! Packed weights: few bits for each weight and a scale for each group of columns, unpacked as they are read.

pub mod format;
mod parts;

pub use format::{Packing, Scales};
pub use parts::PackedScales;

use super::{LeafGrads, Load, LowRank, Site};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::product::matmul::Epilogue;
use crate::ops::timed::{Want, When};
use crate::tensor::Tensor;
use std::sync::Arc;

/// `W = scale q + offset` with whole numbers `q` of a few bits, and a scale and an offset for each group of columns of a row.
///
/// The levels are frozen: gradients flow to the input of a product and not to `W`. [`Packed::low_rank`] adds a part that is
/// trained, and [`Packed::scales`] makes scales and offsets leaves. Products of up to 8 rows unpack each weight once, in
/// registers. Those of more rows unpack it in the load of their tiles, or write it down for the one product.
///
/// ```
/// use std::sync::Arc;
/// use tiebeam::share::{Packed, Packing, Scales, Site};
/// use tiebeam::{Gpu, Tensor};
///
/// let gpu = Gpu::open()?;
/// let packing = Packing::new(4, 32, Scales::Affine)?;
/// let mut row = vec![0; packing.row_words(64)];
/// packing.write_levels(&[3; 64], &mut row);
/// for group in 0..2 {
///     packing.write_scale(&mut row, 64, group, [0.5, -1.0]);
/// }
/// let weight = Packed::new(&gpu, packing, [1, 64], &row)?.shared();
/// let y = Tensor::ones(&gpu, [1, 64]).linear(&weight, Default::default());
/// assert_eq!(y.to_vec::<f32>()?, [64.0 * 0.5]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Packed {
    words: Tensor,
    packing: Packing,
    columns: usize,
}

impl Packed {
    /// Uploads a matrix `[rows, columns]` that is packed as [`mod@format`] says.
    ///
    /// # Errors
    /// [`Error::Config`] when there are fewer or more words than the matrix needs, a scale in two levels has a last block
    /// that is not whole, or a scale is NaN or infinite.
    pub fn new(gpu: &Gpu, packing: Packing, [rows, columns]: [usize; 2], words: &[u32]) -> Result<Packed> {
        packing.check("packed", words, columns.max(1))?;
        Packed::checked(gpu, packing, [rows, columns], words)
    }

    /// [`Packed::new`] for words whose scales have been checked, as those of files have.
    pub(crate) fn checked(
        gpu: &Gpu,
        packing: Packing,
        [rows, columns]: [usize; 2],
        words: &[u32],
    ) -> Result<Packed> {
        packing.fits("packed", columns)?;
        let row = packing.row_words(columns);
        if rows.checked_mul(row) != Some(words.len()) || columns == 0 {
            return Err(Error::config(format!(
                "packed: [{rows}, {columns}] needs {row} words a row, got {} words",
                words.len()
            )));
        }
        let words = Tensor::resident(gpu, DType::U32, bytemuck::cast_slice(words), [rows, row]);
        Ok(Packed { words, packing, columns })
    }

    /// The same packing of other words, of the same shape.
    pub(crate) fn with_words(&self, words: &Tensor) -> Packed {
        let (own, new) = (self.words.shape(), words.shape());
        assert!(
            own == new && words.dtype() == DType::U32,
            "packed: words {new} of {}, not {own}",
            words.dtype()
        );
        Packed { words: words.clone(), ..self.clone() }
    }

    /// Bits, groups and scales.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// The error that the packed matrix carries, such as that there was no memory for it.
    pub(crate) fn error(&self) -> Result<()> {
        self.words.check()
    }

    /// Bytes of the packed matrix.
    pub fn bytes(&self) -> usize {
        4 * self.words.count()
    }

    /// The rows that u32 or i32 `ids [..]` name, unpacked: `[.., columns]`. Not differentiable. Ids outside are treated as
    /// by [`Tensor::embedding`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::share::{Packed, Packing, Scales};
    /// let packing = Packing::new(4, 16, Scales::Affine)?;
    /// let mut words = vec![0; 2 * packing.row_words(16)];
    /// let (zeros, twos) = words.split_at_mut(packing.row_words(16));
    /// packing.write_scale(zeros, 16, 0, [1.0, 0.0]);
    /// packing.write_levels(&[2; 16], twos);
    /// packing.write_scale(twos, 16, 0, [1.0, 0.0]);
    /// let table = Packed::new(&gpu, packing, [2, 16], &words)?;
    /// let ids = Tensor::from_slice(&gpu, &[1u32, 0], [2]);
    /// assert_eq!(table.rows(&ids).to_vec2::<f32>()?, [[2.0; 16], [0.0; 16]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn rows(&self, ids: &Tensor) -> Tensor {
        let mut shape = ids.shape().to_vec();
        shape.push(self.columns);
        let words = self.words.index_select(0, &ids.detach().reshape([ids.count()]));
        Packed { words, ..self.clone() }.expand().reshape(&shape[..])
    }

    /// Adds a low-rank part that is trained: `W + scale B A` with `A [rank, in]` and `B [out, rank]`. With packed weights this
    /// is QLoRA's layer (arXiv 2305.14314).
    ///
    /// # Panics
    /// When the shapes do not fit.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::share::{Packed, Packing, Scales, Site};
    /// let packing = Packing::new(4, 16, Scales::Affine)?;
    /// let mut row = vec![0; packing.row_words(16)];
    /// packing.write_scale(&mut row, 16, 0, [1.0, 5.0]); // level 0 is 5
    /// let base = Packed::new(&gpu, packing, [1, 16], &row)?;
    /// let [a, b] = [[1usize, 16], [1, 1]].map(|s| Tensor::ones(&gpu, s).requires_grad());
    /// let weight = base.low_rank(&a, &b, 0.5);
    /// assert_eq!(weight.expand().to_vec::<f32>()?, [5.5; 16]);
    /// assert_eq!(weight.leaves().len(), 2); // A and B; the base is frozen
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn low_rank(&self, a: &Tensor, b: &Tensor, scale: f32) -> LowRank {
        LowRank::over(&self.clone().shared(), a, b, scale)
    }

    /// The same weight with its scales and offsets as leaves, to train them. Reads the packed words back.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::share::{Packed, Packing, Scales, Site};
    /// let packing = Packing::new(4, 16, Scales::Affine)?;
    /// let mut row = vec![0; packing.row_words(16)];
    /// packing.write_scale(&mut row, 16, 0, [1.0, 5.0]);
    /// let weight = Packed::new(&gpu, packing, [1, 16], &row)?.scales()?;
    /// assert_eq!(weight.leaves()[1].to_vec::<f32>()?, [5.0]); // the offset, as a leaf
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn scales(&self) -> Result<PackedScales> {
        PackedScales::new(self)
    }
}

impl Site for Packed {
    fn name(&self) -> &'static str {
        "packed"
    }

    fn size(&self) -> [usize; 2] {
        [self.words.shape()[0], self.columns]
    }

    fn leaves(&self) -> Vec<Tensor> {
        Vec::new()
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        &[]
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        vec![("packed", self.words.clone())]
    }

    fn with_tensors(&self, _: &[Tensor], buffers: &[Tensor]) -> Arc<dyn Site> {
        Arc::new(self.with_words(&buffers[0]))
    }

    fn load(&self) -> Load {
        let [low, high] = self.packing.parts().map(|bits| bits as u32);
        let constants = vec![
            ("LOW_BITS", low),
            ("HIGH_BITS", high),
            ("MIDDLE", self.packing.middle() as u32),
            ("GROUP", self.packing.group() as u32),
            ("SCALES", self.packing.scales() as u32),
        ];
        let params = [self.words.shape()[0] as u32, self.columns as u32, 0, 0];
        let load = Load::new("site_packed", vec![("packed", self.words.clone())], params);
        Load { constants, packed: Some(self.packing.bits_a_weight(self.columns)), ..load }
    }

    fn is_compact(&self) -> bool {
        true
    }

    fn reduce(&self, _: &Tensor, _: &mut LeafGrads) {}

    /// There is no leaf, so the gradient of the weight is never computed.
    fn backward(&self, _: &Tensor, _: &Tensor, _: &mut LeafGrads) {}
}

/// Every packing that files have, each with a name, for tests that walk them.
pub fn packings() -> Vec<(&'static str, Packing)> {
    let all = [
        ("Q4_0", 4, 32, Scales::Symmetric),
        ("Q4_1", 4, 32, Scales::Affine),
        ("Q5_0", 5, 32, Scales::Symmetric),
        ("Q5_1", 5, 32, Scales::Affine),
        ("Q8_0", 8, 32, Scales::Symmetric),
        ("Q2_K", 2, 16, Scales::Nibbles),
        ("Q3_K", 3, 16, Scales::Signed),
        ("Q4_K", 4, 32, Scales::Pairs),
        ("Q5_K", 5, 32, Scales::Pairs),
        ("Q6_K", 6, 16, Scales::Signed),
        ("int4 of 16", 4, 16, Scales::Zero),
        ("int4 of 48", 4, 48, Scales::Affine),
        ("int4 of 64", 4, 64, Scales::SymmetricBf16),
        ("int4 of 128", 4, 128, Scales::ZeroBf16),
        ("int8 of 128", 8, 128, Scales::Zero),
        ("int3 of 64", 3, 64, Scales::Float),
        ("int6 of 16", 6, 16, Scales::Affine),
    ];
    let packing = |(name, bits, group, scales)| {
        (name, Packing::new(bits, group, scales).expect("a packing of the list"))
    };
    all.map(packing).into()
}

/// The words of a matrix as the input of a case.
fn words_of(packing: Packing, [rows, columns]: [usize; 2], drawn_rows: usize) -> Input {
    let words = format::drawn(packing, [drawn_rows, columns], 7);
    let values = words.into_iter().map(f64::from).collect();
    Input::integers([rows, packing.row_words(columns)], DType::U32, 0, 1).fill(Fill::Values(values))
}

/// `x[0] W^T` with the packed words `x[1]`.
fn linear(packing: Packing, k: usize) -> impl Fn(&[Tensor]) -> Tensor {
    move |x| {
        let site = Packed { words: x[1].clone(), packing, columns: k };
        x[0].linear(&site.shared(), Epilogue::default())
    }
}

/// Some rows of a case's words, decoded.
fn decoded(packing: Packing, words: &Array, k: usize, rows: std::ops::Range<usize>) -> Array {
    let each = packing.row_words(k);
    let words: Vec<u32> = words.data[rows.start * each..rows.end * each].iter().map(|&w| w as u32).collect();
    let all = packing.decode(&words, k);
    Array::from_fn([rows.len(), k], |i| f64::from(all[i]))
}

/// A product with a packed weight. Its sums are exact, so that a weight that is off by its last bit is found.
fn product(name: &str, packing: Packing, [rows, n, k]: [usize; 3]) -> Case {
    let input = Input::normal([rows, k]).fill(Fill::Integers(-2, 3));
    // The reference is computed again for each element of an input with a gradient.
    let input = if rows * k > 1000 { input.fixed() } else { input };
    let inputs = vec![input, words_of(packing, [n, k], n)];
    let reference = move |x: &[Array]| super::tied::linear64(&x[0], &decoded(packing, &x[1], k, 0..n));
    Case::new(format!("{name} {rows} {n} {k}"), inputs, linear(packing, k), reference).exact()
}

/// A product `[m, n, k]` for the benchmark, whose bytes are those of the packed weight.
fn sized(family: &'static str, packing: Packing, [m, n, k]: [usize; 3]) -> Case {
    let inputs = vec![Input::normal([m, k]).fixed(), words_of(packing, [n, k], 16.min(n))];
    let elements = [(0, 0), (m / 2, n / 3), (m - 1, n - 1)].map(|(row, column)| row * n + column);
    let reference = move |x: &[Array]| super::tied::linear64(&x[0], &decoded(packing, &x[1], k, 0..n));
    Case::new(format!("{m}x{k}x{n}"), inputs, linear(packing, k), reference).timed(
        family,
        elements,
        move |x, at| {
            let (row, w) = (x[0].part([1, k], at / n * k), decoded(packing, &x[1], k, at % n..at % n + 1));
            let norm = row.data.iter().zip(&w.data).map(|(a, b)| (a * b).powi(2)).sum::<f64>().sqrt();
            let bound = 4.0 * DType::F32.roundoff() * (k as f64).sqrt() * norm;
            Want { value: super::tied::linear64(&row, &w).data[0], bound }
        },
    )
}

/// The rows of the benchmark: one row as in decoding, eight, and a small one for tests.
fn timed() -> Vec<Case> {
    let packing = |bits, group, scales| Packing::new(bits, group, scales).expect("a packing of the list");
    let (four, eight) = (packing(4, 32, Scales::Affine), packing(8, 32, Scales::Symmetric));
    let six = packing(6, 16, Scales::Signed);
    let of = |family, packing, size, cpu, gpu| sized(family, packing, size).when(cpu, gpu);
    vec![
        of("packed 4 bits", four, [1, 2048, 2048], When::Quick, When::Never),
        of("packed 4 bits", four, [1, 16384, 8192], When::Never, When::Quick),
        of("packed 4 bits", four, [8, 16384, 8192], When::Never, When::Full),
        of("packed 8 bits", eight, [1, 2048, 2048], When::Full, When::Never),
        of("packed 8 bits", eight, [1, 16384, 8192], When::Never, When::Full),
        of("packed 6 bits", six, [1, 16384, 8192], When::Never, When::Full),
        sized("packed 4 bits", four, [2, 20, 96]),
    ]
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = timed();
    for (name, packing) in packings() {
        let block = packing.scales().block().unwrap_or(1);
        for sizes in [[1, 5, 36], [3, 12, 100], [7, 9, 52], [20, 7, 37], [70, 8, 64]] {
            let [rows, n, k] = sizes;
            all.push(product(name, packing, [rows, n, k.next_multiple_of(block)]));
        }
    }
    // One group for each row, and an inner axis that GPUs cut into parts.
    let whole = Packing::rows(8, 69, Scales::Symmetric).expect("a packing");
    all.extend([1, 9].map(|rows| product("a scale a row", whole, [rows, 6, 69])));
    let long = Packing::new(4, 32, Scales::Affine).expect("a packing");
    all.extend([[1, 8, 4096], [5, 12, 1540]].map(|sizes| product("long", long, sizes)));
    all.extend(parts::cases());
    all
}
