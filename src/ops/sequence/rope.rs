//! Rotary position embedding: pairs of a head's elements are rotated by angles that grow with the position.

use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::moves::check_ids::check_ids;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

/// Which elements of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pairing {
    /// Element `i` with `i + head_dim / 2`: GPT-NeoX, Llama.
    Halves,
    /// Element `2 i` with `2 i + 1`: the paper, GPT-J.
    Neighbours,
}

/// The cosines and sines of all positions, which are computed once for a model and passed to [`Tensor::rope`].
///
/// Angles are computed on the host in f64 and only their cosine and sine are rounded, so position 100000 is as exact as
/// position 1. The table takes `4 * positions * head_dim` bytes.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::ops::sequence::rope::{Pairing, Rope};
/// let rope = Rope::new(&gpu, 16, 4, 10000.0, Pairing::Halves);
/// let q = Tensor::ones(&gpu, [1, 2, 3, 4]); // [batch, heads, tokens, head_dim]
/// let prompt = q.rope(&rope, 0);
/// let next = q.rope(&rope, 3); // the tokens after these three
/// assert_eq!(next.shape(), prompt.shape());
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rope {
    pub(crate) table: Tensor,
    pairing: Pairing,
}

/// `position / base^(2 i / head_dim)`
fn angle(position: usize, i: usize, head_dim: usize, base: f64) -> f64 {
    position as f64 * base.powf(-2.0 * i as f64 / head_dim as f64)
}

impl Rope {
    /// Makes a table for `positions` positions and heads of `head_dim` elements. `base` is 10000 in the paper.
    ///
    /// # Panics
    /// If `head_dim` is odd or 0, or `base` is not positive.
    #[track_caller]
    pub fn new(gpu: &Gpu, positions: usize, head_dim: usize, base: f64, pairing: Pairing) -> Rope {
        assert!(head_dim > 0 && head_dim.is_multiple_of(2), "rope: head_dim {head_dim} must be even");
        assert!(base > 0.0, "rope: base {base} must be positive");
        let frequencies: Vec<f64> = (0..head_dim / 2).map(|i| angle(1, i, head_dim, base)).collect();
        Rope::with_frequencies(gpu, positions, &frequencies, 1.0, pairing)
    }

    /// A table for heads of `2 * frequencies.len()` elements whose pair `i` is rotated by `position * frequencies[i]`.
    /// Cosines and sines are multiplied by `factor`, which is 1 in a rotation. Models scale frequencies for long contexts.
    ///
    /// # Panics
    /// If there is no frequency.
    #[track_caller]
    pub fn with_frequencies(
        gpu: &Gpu,
        positions: usize,
        frequencies: &[f64],
        factor: f64,
        pairing: Pairing,
    ) -> Rope {
        assert!(!frequencies.is_empty(), "rope: there are no frequencies");
        let head_dim = 2 * frequencies.len();
        let mut table = Vec::with_capacity(positions * head_dim);
        for position in 0..positions {
            let angles = || frequencies.iter().map(|f| position as f64 * f);
            table.extend(angles().map(|angle| (factor * angle.cos()) as f32));
            table.extend(angles().map(|angle| (factor * angle.sin()) as f32));
        }
        Rope { table: Tensor::from_slice(gpu, &table, [positions, head_dim]), pairing }
    }

    /// Number of positions in the table.
    pub fn positions(&self) -> usize {
        self.table.shape()[0]
    }

    /// Returns `x` rotated, or rotated back, in the order of tokens and heads that `x` has in memory.
    fn turned(&self, x: &Tensor, places: &Places, back: bool) -> Tensor {
        let gpu = x.gpu();
        let [heads, tokens, head_dim] = [x.shape()[1], x.shape()[2], x.shape()[3]];
        let turned = x.strides[1] < x.strides[2];
        let x = &if turned { x.transpose(1, 2).contiguous() } else { x.contiguous() };
        let y = Tensor::empty(gpu, "rope", *x.shape(), DType::F32);
        let wide = self.pairing == Pairing::Halves && head_dim.is_multiple_of(8);
        let half = if wide { head_dim / 8 } else { head_dim / 2 };
        let pairs = x.count() / head_dim * half;
        let (offset, step, given) = match places {
            Places::From(offset) => (*offset, 0, None),
            Places::Given(all) => (0, if all.shape().len() == 2 { tokens } else { 0 }, Some(all)),
        };
        let grid = grid(pairs.div_ceil(64));
        let entry = if self.pairing == Pairing::Halves { "halves" } else { "neighbours" };
        gpu.launch(
            Launch::new("rope", &source(wide, given.is_some()), entry, grid)
                .bind("x", x)
                .bind("table", &self.table)
                .bind_some("given", given)
                .bind_mut("y", &y)
                .set("pairs", pairs)
                .set("half", half)
                .set("tokens", tokens)
                .set("inner", if turned { heads } else { 1 })
                .set("batch_rows", heads * tokens)
                .set("batch_step", step)
                .set("offset", offset)
                .set("positions", self.positions())
                .set("turn", if back { -1.0f32 } else { 1.0 })
                .turns(0),
        );
        if turned { y.transpose(1, 2) } else { y }
    }
}

/// The positions of the tokens.
#[derive(Clone)]
enum Places {
    /// Consecutive positions from this one on.
    From(usize),
    /// These positions, as u32 `[tokens]` or `[batch, tokens]`, contiguous.
    Given(Tensor),
}

fn source(wide: bool, given: bool) -> Source {
    let source = Source::file("rope").alias("Elem", if wide { "vec4<f32>" } else { "f32" });
    source.slot("position", if given { "position_given" } else { "position_counted" })
}

struct Turn {
    rope: Rope,
    places: Places,
    /// Detects changes in place of the given positions.
    given: Option<Saved>,
}

impl Op for Turn {
    fn name(&self) -> &'static str {
        "rope"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        if let Some(given) = &self.given {
            given.get("rope");
        }
        sink.add(0, self.rope.turned(&dy.detach(), &self.places, true));
    }
}

impl Tensor {
    /// Rotary position embedding of `[batch, heads, tokens, head_dim]`, where token `t` is at position `offset + t`.
    ///
    /// The pair `i` is rotated by the angle `position / base^(2 i / head_dim)`. The op is linear, and its gradient
    /// rotates back. f16 is returned as f32. Source: Su et al. 2021, "RoFormer".
    ///
    /// # Panics
    /// If the shape does not have four axes, `head_dim` is not the table's, or the table ends before the last token.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::ops::sequence::rope::{Pairing, Rope};
    /// let rope = Rope::new(&gpu, 8, 2, 10000.0, Pairing::Halves);
    /// let x = Tensor::from_slice(&gpu, &[1f32, 0.0, 1.0, 0.0], [1, 1, 2, 2]);
    /// let y = x.rope(&rope, 0).reshape([2, 2]).to_vec2::<f32>()?;
    /// assert_eq!(y[0], [1.0, 0.0]); // position 0 is not rotated
    /// assert!((y[1][0] - 1f32.cos()).abs() < 1e-6 && (y[1][1] - 1f32.sin()).abs() < 1e-6);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn rope(&self, rope: &Rope, offset: usize) -> Tensor {
        let last = offset + self.shape().get(2).copied().unwrap_or(0);
        assert!(
            last <= rope.positions(),
            "rope: {} from position {offset} needs {last} positions, the table has {}",
            self.shape(),
            rope.positions()
        );
        self.turn(rope, Places::From(offset))
    }

    /// [`Tensor::rope`] with tokens at given positions: u32, `[tokens]`, or `[batch, tokens]` for routed tokens and
    /// batches of unequal length. A position beyond the table gives zeros, and a checked device reports it at the next
    /// readback ([`Error::Outside`](crate::Error::Outside)).
    ///
    /// # Panics
    /// If shapes do not fit or the positions are not u32.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::ops::sequence::rope::{Pairing, Rope};
    /// let rope = Rope::new(&gpu, 8, 4, 10000.0, Pairing::Halves);
    /// let x = Tensor::ones(&gpu, [1, 1, 2, 4]);
    /// let positions = Tensor::from_slice(&gpu, &[5u32, 6], [2]);
    /// assert_eq!(x.rope_at(&rope, &positions).to_vec::<f32>()?, x.rope(&rope, 5).to_vec::<f32>()?);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn rope_at(&self, rope: &Rope, positions: &Tensor) -> Tensor {
        same_gpu("rope", &[self, positions]);
        assert!(positions.dtype() == DType::U32, "rope: positions must be u32, got {}", positions.dtype());
        let (x, at) = (self.shape(), positions.shape());
        let fits = x.len() == 4 && (at[..] == [x[2]] || at[..] == [x[0], x[2]]);
        assert!(fits, "rope: positions {at} for {x}; they must be [tokens] or [batch, tokens]");
        check_ids("rope", positions, rope.positions(), None);
        self.turn(rope, Places::Given(positions.detach().contiguous()))
    }

    #[track_caller]
    fn turn(&self, rope: &Rope, places: Places) -> Tensor {
        same_gpu("rope", &[self, &rope.table]);
        let (shape, table) = (self.shape(), rope.table.shape());
        assert!(
            shape.len() == 4 && shape[3] == table[1],
            "rope: {shape} is not [batch, heads, tokens, {}], the table's head_dim",
            table[1]
        );
        if shape.count() == 0 {
            return Tensor::zeros(self.gpu(), *shape);
        }
        let y = rope.turned(&crate::ops::float("rope", self).detach(), &places, false);
        y.made_by(&[self], || {
            let given = match &places {
                Places::Given(all) => Some(Saved::new(all)),
                Places::From(_) => None,
            };
            Box::new(Turn { rope: rope.clone(), places, given })
        })
    }
}

/// Rotates `x[batch, heads, tokens, head_dim]` at the positions `place(batch, token)`. Positions of `limit` and above
/// give zeros.
fn rope64(
    x: &Array,
    base: f64,
    pairing: Pairing,
    limit: usize,
    place: impl Fn(usize, usize) -> usize,
) -> Array {
    let [heads, tokens, head_dim] = [x.shape[1], x.shape[2], x.shape[3]];
    let half = head_dim / 2;
    Array::from_fn(x.shape, |at| {
        let (row, d) = (at / head_dim, at % head_dim);
        let position = place(row / tokens / heads, row % tokens);
        if position >= limit {
            return 0.0;
        }
        let (i, second, other) = match pairing {
            Pairing::Halves => (d % half, d >= half, row * head_dim + (d + half) % head_dim),
            Pairing::Neighbours => (d / 2, d % 2 == 1, at ^ 1),
        };
        let (sin, cos) = angle(position, i, head_dim, base).sin_cos();
        x.data[at] * cos + if second { x.data[other] * sin } else { -x.data[other] * sin }
    })
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // The last case has large positions, for which an angle computed in f32 would be off by 0.004.
    for (shape, offset) in [
        ([1, 1, 1, 2], 0),
        ([2, 3, 7, 10], 0),
        ([1, 2, 5, 16], 3),
        ([1, 1, 67, 8], 0),
        ([1, 1, 3, 64], 99_990),
    ] {
        for pairing in [Pairing::Halves, Pairing::Neighbours] {
            // Not the default base in one case, so that a base that is ignored would be noticed.
            let base = if offset == 3 { 500.0 } else { 10_000.0 };
            all.push(Case::new(
                format!("{pairing:?} {shape:?} from {offset}"),
                vec![Input::normal(shape)],
                move |x| {
                    x[0].rope(&Rope::new(x[0].gpu(), offset + shape[2], shape[3], base, pairing), offset)
                },
                move |x| rope64(&x[0], base, pairing, usize::MAX, |_, t| offset + t),
            ));
        }
    }
    for at in [&[5][..], &[3, 5]] {
        let each = at.len() == 2;
        for pairing in [Pairing::Halves, Pairing::Neighbours] {
            // Positions 20 to 22 are beyond the table.
            let places = Fill::Values(vec![3.0, 22.0, 0.0, 19.0, 20.0, 7.0, 21.0]);
            let inputs =
                vec![Input::normal([3, 2, 5, 8]), Input::integers(at, DType::U32, 0, 1).fill(places)];
            let case = Case::new(
                format!("{pairing:?} at {at:?}"),
                inputs,
                move |x| x[0].rope_at(&Rope::new(x[0].gpu(), 20, 8, 100.0, pairing), &x[1]),
                move |x| {
                    let place = |b: usize, t: usize| x[1].data[if each { b * 5 + t } else { t }] as usize;
                    rope64(&x[0], 100.0, pairing, 20, place)
                },
            );
            all.push(case.outside());
        }
    }
    let places = Fill::Values(vec![3.0, 2.0, 0.0, 19.0, 5.0, 7.0, 11.0, 4.0, 1.0, 6.0]);
    let inputs = vec![Input::normal([2, 5, 3, 8]), Input::integers([2, 5], DType::U32, 0, 1).fill(places)];
    all.push(Case::new(
        "of a transpose, at [2, 5]",
        inputs,
        |x| x[0].transpose(1, 2).rope_at(&Rope::new(x[0].gpu(), 20, 8, 100.0, Pairing::Neighbours), &x[1]),
        |x| {
            let from = |i: usize| ((i / 120 * 5 + i / 8 % 5) * 3 + i / 40 % 3) * 8 + i % 8;
            let turned = Array::from_fn([2, 3, 5, 8], |i| x[0].data[from(i)]);
            rope64(&turned, 100.0, Pairing::Neighbours, usize::MAX, |b, t| x[1].data[b * 5 + t] as usize)
        },
    ));
    all.push(Case::new(
        "of a transpose",
        vec![Input::normal([2, 5, 3, 8])],
        |x| x[0].transpose(1, 2).rope(&Rope::new(x[0].gpu(), 5, 8, 10_000.0, Pairing::Halves), 0),
        |x| {
            let from = |i: usize| ((i / 120 * 5 + i / 8 % 5) * 3 + i / 40 % 3) * 8 + i % 8;
            let turned = Array::from_fn([2, 3, 5, 8], |i| x[0].data[from(i)]);
            rope64(&turned, 10_000.0, Pairing::Halves, usize::MAX, |_, t| t)
        },
    ));
    all
}
