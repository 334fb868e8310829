//! Tensors made from the positions of their elements: ranges, the identity, one-hot vectors, triangles and constants like
//! another tensor. They are pending expressions, so nothing is uploaded.

use super::check_ids::check_ids;
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::gpu::value::Value;
use crate::gpu::value::fuse::{Expr, Scalar};
use crate::ops::case::{Array, Case, Fill, Input};
use crate::shape::{self, Shape};
use crate::tensor::Tensor;

/// Where the column is at most the row plus `diagonal`, as a mask `[rows, columns]`.
fn lower(gpu: &Gpu, [rows, columns]: [usize; 2], diagonal: isize) -> Tensor {
    let diagonal = diagonal.clamp(-(rows as isize), columns as isize);
    // Both sides of `column + down <= row + right` are unsigned.
    let (right, down) = (diagonal.max(0) as usize, (-diagonal).max(0) as usize);
    let starting = |at: usize, n: usize| Tensor::positions(gpu, at + n).slice(0, at..at + n);
    starting(down, columns).le(&starting(right, rows).reshape([rows, 1]))
}

impl Tensor {
    /// `0, 1, 2, ..., n - 1` as u32. Nothing is stored until needed.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let ids = Tensor::positions(&gpu, 4);
    /// assert_eq!(ids.to_vec::<u32>()?, [0, 1, 2, 3]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn positions(gpu: &Gpu, n: usize) -> Tensor {
        // `i` is the place of a thread's four elements, in vectors of four.
        let four = "(i * 4u + vec4<u32>(0u, 1u, 2u, 3u))";
        let shape = Shape::new(&[n]);
        let expr = Expr::new(gpu, "positions", four, shape, Vec::new());
        Tensor::from_value(Value::later(gpu, DType::U32, expr), shape)
    }

    /// `start, start + step, start + 2 step, ...` up to but without `end`, as f32: `ceil((end - start) / step)` elements.
    /// The numbers count as the decimals that they are written as, so `0.0, 0.3, 0.1` gives three, where f32's 0.3 is a
    /// little more than three of its 0.1. Element `i` is computed as `start + i step`, so roundings do not add up. Whole
    /// numbers are exact up to 2^24. For ids, [`Tensor::positions`] has u32.
    ///
    /// # Panics
    /// If `step` is 0 or leads away from `end`, or a number is not finite.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 1.0, 2.0, 0.25);
    /// assert_eq!(x.to_vec::<f32>()?, [1.0, 1.25, 1.5, 1.75]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn arange(gpu: &Gpu, start: f32, end: f32, step: f32) -> Tensor {
        let finite = [start, end, step].iter().all(|x| x.is_finite());
        assert!(finite, "arange: {start}, {end} and {step} must be finite");
        // The shortest decimal of a fraction is what was written. Whole numbers are what they are.
        let decimal = |x: f32| match x.fract() == 0.0 {
            true => f64::from(x),
            false => x.to_string().parse().unwrap_or(f64::from(x)),
        };
        let exact = (decimal(end) - decimal(start)) / decimal(step);
        // 2.1 / 0.7 is a little more than 3 in f64.
        let count = if (exact - exact.round()).abs() < 1e-9 * exact.abs() { exact.round() } else { exact };
        assert!(step != 0.0 && count >= 0.0, "arange: a step of {step} does not lead from {start} to {end}");
        let positions = Tensor::positions(gpu, count.ceil() as usize);
        let numbers = [start, step].map(Scalar::F32);
        let template = "$1 + $2 * vec4<f32>($0)";
        Tensor::lazy_with("arange", template, DType::F32, *positions.shape(), &[&positions], &numbers)
    }

    /// `steps` numbers at equal distances from `start` to `end`, both included, as f32. The first half is counted from
    /// `start` and the second from `end`, so both ends are exact. One step gives `start`.
    ///
    /// # Panics
    /// If an end is not finite.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::linspace(&gpu, -1.0, 1.0, 5);
    /// assert_eq!(x.to_vec::<f32>()?, [-1.0, -0.5, 0.0, 0.5, 1.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn linspace(gpu: &Gpu, start: f32, end: f32, steps: usize) -> Tensor {
        assert!(start.is_finite() && end.is_finite(), "linspace: {start} and {end} must be finite");
        let last = steps.saturating_sub(1);
        // A step that overflows is between two elements, and only ever times 0.
        let step = (end as f64 - start as f64) / last.max(1) as f64;
        let step = (step as f32).clamp(f32::MIN, f32::MAX);
        let positions = Tensor::positions(gpu, steps);
        // Positions from the end, without rounding of large ones.
        let left = positions.flip(0);
        let template = "select($3 - $4 * vec4<f32>($1), $2 + $4 * vec4<f32>($0), $0 <= $1)";
        let numbers = [start, if steps == 1 { start } else { end }, step].map(Scalar::F32);
        Tensor::lazy_with(
            "linspace",
            template,
            DType::F32,
            *positions.shape(),
            &[&positions, &left],
            &numbers,
        )
    }

    /// The identity matrix `[n, n]`, as f32.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// assert_eq!(Tensor::eye(&gpu, 2).to_vec::<f32>()?, [1.0, 0.0, 0.0, 1.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn eye(gpu: &Gpu, n: usize) -> Tensor {
        let positions = Tensor::positions(gpu, n);
        positions.reshape([n, 1]).eq(&positions).cast(DType::F32)
    }

    /// A tensor of this shape, dtype and device with all elements `value`, which is rounded to the dtype. For integers it is
    /// truncated towards zero, whole numbers above 2^24 are rounded, and what the type does not have becomes its nearest: -1
    /// as u32 is 0. Nothing is stored until needed.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let ids = Tensor::from_slice(&gpu, &[4u32, 7], [2]);
    /// assert_eq!(ids.full_like(3.0).to_vec::<u32>()?, [3, 3]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn full_like(&self, value: f32) -> Tensor {
        Tensor::full(self.gpu(), *self.shape(), value).cast(self.dtype())
    }

    /// Zeros in this tensor's shape and dtype.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[4i32, -7], [2]);
    /// assert_eq!(x.zeros_like().to_vec::<i32>()?, [0, 0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn zeros_like(&self) -> Tensor {
        self.full_like(0.0)
    }

    /// Ones in this tensor's shape and dtype.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[4i32, -7], [2]);
    /// assert_eq!(x.ones_like().to_vec::<i32>()?, [1, 1]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn ones_like(&self) -> Tensor {
        self.full_like(1.0)
    }

    /// `y[.., c] = 1` where the id is `c`, else 0, as f32: the shape of these ids, followed by `classes`.
    ///
    /// An id outside `0..classes` gives zeros, and a checked device reports it at the next readback
    /// ([`Error::Outside`](crate::Error::Outside)).
    ///
    /// # Panics
    /// If the ids are not u32 or i32.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let ids = Tensor::from_slice(&gpu, &[2u32, 0], [2]);
    /// assert_eq!(ids.one_hot(3).to_vec::<f32>()?, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn one_hot(&self, classes: usize) -> Tensor {
        assert!(!self.dtype().is_float(), "one_hot: ids must be u32 or i32, got {}", self.dtype());
        check_ids("one_hot", self, classes, None);
        let classes = Tensor::positions(self.gpu(), classes).cast(self.dtype());
        self.unsqueeze(-1).eq(&classes).cast(DType::F32)
    }

    /// `value` where `mask` is not 0, else this tensor's element. The mask broadcasts to this tensor. The gradient of what is
    /// filled is 0.
    ///
    /// # Panics
    /// If the mask does not broadcast to this shape or is not u32 or i32.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// let mask = Tensor::from_slice(&gpu, &[0u32, 1], [2]);
    /// assert_eq!(x.masked_fill(&mask, -1.0).to_vec::<f32>()?, [1.0, -1.0, 3.0, -1.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn masked_fill(&self, mask: &Tensor, value: f32) -> Tensor {
        let is_mask = !mask.dtype().is_float();
        assert!(is_mask, "masked_fill: the mask must be u32 or i32, got {}", mask.dtype());
        shape::expand_strides("masked_fill", mask.shape(), &mask.shape().strides(), self.shape());
        self.full_like(value).where_mask(mask, self)
    }

    #[track_caller]
    fn matrix_axes(&self, op: &str) -> [usize; 2] {
        let axes = self.shape().len();
        assert!(axes >= 2, "{op}: needs at least two axes, got {}", self.shape());
        [self.shape()[axes - 2], self.shape()[axes - 1]]
    }

    /// The lower triangle of each matrix in the last two axes, with zeros above it: elements whose column is at most their
    /// row plus `diagonal`. 0 keeps the main diagonal, -1 leaves it out. Any dtype. The gradient of zeros is 0.
    ///
    /// # Panics
    /// With fewer than two axes.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(x.tril(0).to_vec::<f32>()?, [1.0, 0.0, 3.0, 4.0]);
    /// assert_eq!(x.tril(-1).to_vec::<f32>()?, [0.0, 0.0, 3.0, 0.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn tril(&self, diagonal: isize) -> Tensor {
        let mask = lower(self.gpu(), self.matrix_axes("tril"), diagonal);
        self.where_mask(&mask, &self.zeros_like())
    }

    /// The upper triangle of each matrix in the last two axes, with zeros below it: elements whose column is at least their
    /// row plus `diagonal`. 0 keeps the main diagonal, 1 leaves it out. Any dtype. The gradient of zeros is 0.
    ///
    /// # Panics
    /// With fewer than two axes.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(x.triu(0).to_vec::<f32>()?, [1.0, 2.0, 0.0, 4.0]);
    /// assert_eq!(x.triu(1).to_vec::<f32>()?, [0.0, 2.0, 0.0, 0.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn triu(&self, diagonal: isize) -> Tensor {
        let mask = lower(self.gpu(), self.matrix_axes("triu"), diagonal.saturating_sub(1));
        self.zeros_like().where_mask(&mask, self)
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = ranges();
    let triangles: [(&[usize], isize); 8] = [
        (&[1, 1], 0),
        (&[5, 7], 0),
        (&[7, 5], 2),
        (&[2, 7, 5], -3),
        (&[3, 8, 8], 1),
        (&[4, 4], -9),
        (&[4, 4], 9),
        (&[67, 5], -60),
    ];
    for (shape, diagonal) in triangles {
        for is_lower in [true, false] {
            let input = Input::normal(shape);
            let [rows, columns] = [shape[shape.len() - 2], shape[shape.len() - 1]];
            let is_kept = move |i: usize| {
                let (row, column) = ((i / columns % rows) as isize, (i % columns) as isize);
                if is_lower { column - row <= diagonal } else { column - row >= diagonal }
            };
            let call = move |x: &[Tensor]| if is_lower { x[0].tril(diagonal) } else { x[0].triu(diagonal) };
            let want = move |x: &[Array]| {
                Array::from_fn(x[0].shape, |i| if is_kept(i) { x[0].data[i] } else { 0.0 })
            };
            let name = if is_lower { "tril" } else { "triu" };
            all.push(Case::new(format!("{name} {shape:?} {diagonal}"), vec![input], call, want));
        }
    }
    all.push(
        Case::new(
            "tril of integers",
            vec![Input::integers([3, 5], DType::I32, -9, 9)],
            |x| x[0].tril(0),
            |x| Array::from_fn([3, 5], |i| if i % 5 <= i / 5 { x[0].data[i] } else { 0.0 }),
        )
        .exact(),
    );
    for dtype in [DType::F32, DType::F16, DType::U32] {
        let input = Input::integers([3, 7], dtype, 0, 99);
        let input = if dtype == DType::F32 { Input::normal([3, 7]) } else { input };
        let mask = Input::integers([3, 1], DType::I32, -1, 2).fill(Fill::Values(vec![0.0, -1.0, 0.0]));
        let want = |x: &[Array]| {
            Array::from_fn([3, 7], |i| if x[1].data[i / 7] != 0.0 { 2.0 } else { x[0].data[i] })
        };
        let call = |x: &[Tensor]| x[0].masked_fill(&x[1], 2.0);
        all.push(Case::new(format!("masked_fill of {dtype}"), vec![input, mask], call, want));
    }
    for dtype in [DType::U32, DType::I32] {
        let ids = Input::integers([2, 3], dtype, 0, 5);
        let want =
            |x: &[Array]| Array::from_fn([2, 3, 5], |i| (x[0].data[i / 5] == (i % 5) as f64) as u8 as f64);
        all.push(Case::new(format!("one_hot of {dtype}"), vec![ids], |x| x[0].one_hot(5), want).exact());
    }
    let ids =
        Input::integers([7], DType::I32, 0, 1).fill(Fill::Values((0..7).map(|i| i as f64 - 1.0).collect()));
    let want = |x: &[Array]| Array::from_fn([7, 4], |i| (x[0].data[i / 4] == (i % 4) as f64) as u8 as f64);
    all.push(Case::new("one_hot of ids outside", vec![ids], |x| x[0].one_hot(4), want).exact().outside());
    for dtype in [DType::F32, DType::Bf16, DType::U32, DType::I32] {
        let input = vec![Input::integers([3, 7], dtype, 0, 5)];
        let call = |x: &[Tensor]| {
            let all = [x[0].zeros_like(), x[0].ones_like(), x[0].full_like(7.0)];
            Tensor::concat(&[&all[0], &all[1], &all[2]], 0)
        };
        let want = |_: &[Array]| Array::from_fn([9, 7], |i| [0.0, 1.0, 7.0][i / 21]);
        all.push(Case::new(format!("like {dtype}"), input, call, want).exact());
    }
    all
}

/// Ranges, and what is made of them.
fn ranges() -> Vec<Case> {
    // The input only says on which device.
    let case = |name: String,
                call: Box<dyn Fn(&Gpu) -> Tensor + Send + Sync>,
                shape: Shape,
                want: fn(usize) -> f64| {
        let input = vec![Input::integers([1], DType::U32, 0, 1)];
        Case::new(name, input, move |x| call(x[0].gpu()), move |_| Array::from_fn(shape, want))
    };
    let mut all: Vec<Case> = [0, 1, 7, 64, 259]
        .map(|n| {
            case(format!("positions {n}"), Box::new(move |gpu| Tensor::positions(gpu, n)), [n].into(), |i| {
                i as f64
            })
        })
        .into();
    // Positions in a chain that is walked in another order, and in one with others.
    all.push(case(
        "positions transposed".into(),
        Box::new(|gpu| Tensor::positions(gpu, 35).reshape([5, 7]).t().add(&Tensor::positions(gpu, 5))),
        [7, 5].into(),
        |i| (i % 5 * 7 + i / 5 + i % 5) as f64,
    ));
    all.push(case("eye 1".into(), Box::new(|gpu| Tensor::eye(gpu, 1)), [1, 1].into(), |_| 1.0));
    all.push(case("eye 7".into(), Box::new(|gpu| Tensor::eye(gpu, 7)), [7, 7].into(), |i| {
        (i / 7 == i % 7) as u8 as f64
    }));
    all.push(case(
        "arange of nothing".into(),
        Box::new(|gpu| Tensor::arange(gpu, 2.0, 2.0, 1.0)),
        [0].into(),
        |_| 0.0,
    ));
    all.push(case(
        "arange down".into(),
        Box::new(|gpu| Tensor::arange(gpu, 3.0, -1.25, -0.5)),
        [9].into(),
        |i| 3.0 - 0.5 * i as f64,
    ));
    all.push(case(
        "linspace of one".into(),
        Box::new(|gpu| Tensor::linspace(gpu, 2.0, 9.0, 1)),
        [1].into(),
        |_| 2.0,
    ));
    all.push(case(
        "linspace of none".into(),
        Box::new(|gpu| Tensor::linspace(gpu, 2.0, 9.0, 0)),
        [0].into(),
        |_| 2.0,
    ));
    all.push(case(
        "linspace in quarters".into(),
        Box::new(|gpu| Tensor::linspace(gpu, 3.0, -1.0, 17)),
        [17].into(),
        |i| 3.0 - 0.25 * i as f64,
    ));
    all = all.into_iter().map(Case::exact).collect();
    // A step that f32 rounds: the element before the end is there, and roundings do not add up.
    all.push(case(
        "arange in tenths".into(),
        Box::new(|gpu| Tensor::arange(gpu, 0.5, 100.5, 0.1)),
        [1000].into(),
        |i| 0.5 + i as f64 * 0.1f32 as f64,
    ));
    all.push(case(
        "linspace in sevenths".into(),
        Box::new(|gpu| Tensor::linspace(gpu, 1.0, 3.0, 8)),
        [8].into(),
        |i| 1.0 + i as f64 * 2.0 / 7.0,
    ));
    all
}
