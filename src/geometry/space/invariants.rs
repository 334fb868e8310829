//! Invariants: numbers that no motion changes and that tell classes of point pairs apart, made of plain differentiable
//! ops.
//!
//! With a receiver at `p` with orientation `o`, a sender at `p'` with `o'`, and `d = p' - p`:
//!
//! | space | attributes | function |
//! |---|---|---|
//! | R^2, R^3 | `|d|` | [`distance`] |
//! | R^2 x S^1 | `o.d`, `o_perp.d`, and `o.o'` | [`spatial`], [`fiber`]; all at once [`pairs`] |
//! | R^3 x S^2 | `o.d`, `|d - (o.d) o|`, `o.o'`, optionally `o'.d` | the same |
//! | SE(3) | `R^T d`, `R^T R'` | [`frames`] |
//!
//! The attributes of R^3 x S^2 are the same for mirror images: a network that sees only these is E(3)-equivariant and
//! cannot tell left from right. The first three leave one degree of freedom of a pair undetermined, and `o'.d` determines
//! it.
//! Source: Bekkers et al. 2024, "Fast, Expressive SE(n) Equivariant Networks", arXiv 2310.02970.

pub use crate::ops::points::kernel_basis::polynomial_size;
use crate::tensor::Tensor;

/// Length over the last axis. At the zero vector the gradient is 0, as self-loops need it.
///
/// # Panics
/// When `x` is a scalar or of integers.
#[track_caller]
pub fn norm(x: &Tensor) -> Tensor {
    let squares = x.square().sum(-1);
    let zero = Tensor::zeros(x.gpu(), *squares.shape());
    let some = squares.gt(&zero).detach();
    // Where the sum is 0, the root of 1 is taken instead. Its derivative is finite, and the mask discards it.
    squares.where_mask(&some, &Tensor::ones(x.gpu(), *squares.shape())).sqrt().where_mask(&some, &zero)
}

/// `|d|` of edges `d [E, D]`: `[E, 1]`.
///
/// # Panics
/// When `d` is not a matrix.
#[track_caller]
pub fn distance(d: &Tensor) -> Tensor {
    assert!(d.shape().len() == 2, "distance: edges must be [E, D], got {}", d.shape());
    norm(d).unsqueeze(1)
}

/// `o.d` and the second attribute, `[E, O, 2]`, of edges `d [E, D]` and orientations `o [O, D]`.
///
/// In space the second attribute is the length of `d - (o.d) o`, computed as a vector because `|d|^2 - (o.d)^2` would
/// lose digits to cancellation. In the plane it is `-d_x o_y + d_y o_x`, with its sign.
///
/// # Panics
/// When the shapes do not fit or D is not 2 or 3.
#[track_caller]
pub fn spatial(d: &Tensor, o: &Tensor) -> Tensor {
    check("spatial", d, o);
    let along = d.matmul(&o.t());
    let second = if d.shape()[1] == 2 {
        let (x, y) = (o.slice(1, 0..1), o.slice(1, 1..2));
        d.matmul(&Tensor::concat(&[&y.neg(), &x], 1).t())
    } else {
        let parallel = along.unsqueeze(2).mul(&o.unsqueeze(0));
        norm(&d.unsqueeze(1).sub(&parallel))
    };
    Tensor::stack(&[&along, &second], 2)
}

#[track_caller]
fn check(name: &str, d: &Tensor, o: &Tensor) {
    let fits = d.shape().len() == 2 && o.shape().len() == 2 && d.shape()[1] == o.shape()[1];
    let fits = fits && (2..=3).contains(&d.shape()[1]);
    assert!(
        fits,
        "{name}: edges {} and orientations {}; they must be [E, D] and [O, D], D 2 or 3",
        d.shape(),
        o.shape()
    );
}

/// `o_p . o_a`, `[O, O, 1]`, of orientations `o [O, D]`. The angle is not used, because its derivative is singular at
/// both ends.
///
/// # Panics
/// When `o` is not a matrix.
#[track_caller]
pub fn fiber(o: &Tensor) -> Tensor {
    assert!(o.shape().len() == 2, "fiber: orientations must be [O, D], got {}", o.shape());
    o.matmul(&o.t()).unsqueeze(2)
}

/// All attributes of receiver orientation `a` and sender orientation `b`, `[E, O, O, 3]`, or 4 of them with `o_b . d` at
/// the end if `fourth`. A kernel that is not separable depends on these.
///
/// # Panics
/// As [`spatial`].
#[track_caller]
pub fn pairs(d: &Tensor, o: &Tensor, fourth: bool) -> Tensor {
    let (edges, count) = (d.shape()[0], o.shape()[0]);
    let wide = [edges, count, count, 1];
    let own = spatial(d, o).unsqueeze(2).expand([edges, count, count, 2]);
    let between = fiber(o).unsqueeze(0).expand(wide);
    let mut all = vec![own, between];
    if fourth {
        all.push(d.matmul(&o.t()).reshape([edges, 1, count, 1]).expand(wide));
    }
    Tensor::concat(&all.iter().collect::<Vec<_>>(), 3)
}

/// `R_a^T d` and the nine elements of `R_a^T R_b`, row-major: `[E, F, F, 12]`, of edges `d [E, 3]` and frames `[F, 3, 3]`
/// whose columns are the axes. They determine all six degrees of freedom that a pair of frames has up to SE(3), without
/// the singularities of a chart. Mirror images differ.
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn frames(d: &Tensor, frames: &Tensor) -> Tensor {
    let fits = d.shape().len() == 2
        && d.shape()[1] == 3
        && frames.shape().len() == 3
        && frames.shape()[1..] == [3, 3];
    assert!(
        fits,
        "frames: edges {} and frames {}; they must be [E, 3] and [F, 3, 3]",
        d.shape(),
        frames.shape()
    );
    let (edges, count) = (d.shape()[0], frames.shape()[0]);
    // [F, 3, 3] transposed, as rows: one product gives R_a^T d for all frames.
    let rows = frames.t().reshape([3 * count, 3]);
    let offset = d.matmul(&rows.t()).reshape([edges, count, 1, 3]).expand([edges, count, count, 3]);
    // Element (i, j) of R_a^T R_b is the product of columns: [3 F, 3 F] as [a, i, b, j].
    let turn = rows.matmul(&rows.t()).reshape([count, 3, count, 3]).permute([0, 2, 1, 3]);
    let turn = turn.reshape([1, count, count, 9]).expand([edges, count, count, 9]);
    Tensor::concat(&[&offset, &turn], 3)
}

/// Monomials up to `degree` of the last axis: `f_1 = a`, `f_k = flatten(f_{k-1} a^T)`, all concatenated. Two attributes
/// and degree 3 give 2 + 4 + 8 numbers.
///
/// # Panics
/// When `a` is a scalar or `degree` is 0.
#[track_caller]
pub fn polynomial(a: &Tensor, degree: usize) -> Tensor {
    let axes = a.shape().len();
    assert!(axes > 0 && degree > 0, "polynomial: degree {degree} of shape {}", a.shape());
    let mut terms = vec![a.clone()];
    for _ in 1..degree {
        let last = &terms[terms.len() - 1];
        let next = last.unsqueeze(-1).mul(&a.unsqueeze(-2));
        let width = last.shape()[axes - 1] * a.shape()[axes - 1];
        terms.push(next.reshape(a.shape().with(axes - 1, width)));
    }
    Tensor::concat(&terms.iter().collect::<Vec<_>>(), -1)
}

/// The polynomial envelope `1 - 28 u^6 + 48 u^7 - 21 u^8` with `u = distance / radius`, 0 from the radius on. Its value
/// and first two derivatives vanish there. Source: Gasteiger et al. 2020, "Directional Message Passing", with p = 6.
pub fn envelope(distance: &Tensor, radius: f32) -> Tensor {
    let u = distance.scale(1.0 / radius);
    let inside = u.lt(&Tensor::ones(u.gpu(), *u.shape())).detach();
    let six = u.square().mul(&u.square()).mul(&u.square());
    let rest = u.scale(-21.0).affine(1.0, 48.0).mul(&u).affine(1.0, -28.0);
    six.mul(&rest).affine(1.0, 1.0).where_mask(&inside, &Tensor::zeros(u.gpu(), *u.shape()))
}
