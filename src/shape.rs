//! Shapes, strides and the rules that combine them. All functions are pure: they need no device and no data.
//!
//! The rules are NumPy's. Misuse is a bug of the caller and panics with the op's name and both shapes.

use std::fmt;
use std::ops::{Bound, Deref, Range, RangeBounds};

/// The most axes that a tensor may have.
pub const MAX_AXES: usize = 6;

/// The sizes of a tensor's axes, outermost first. There are at most [`MAX_AXES`], and none for a scalar.
///
/// ```
/// use tiebeam::Shape;
/// let shape = Shape::from([2, 3, 4]);
/// assert_eq!(shape.count(), 24);
/// assert_eq!(shape.strides()[..3], [12, 4, 1]);
/// assert_eq!((shape[0], &shape.without(0)[..]), (2, &[3, 4][..]));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    len: u8,
    sizes: [usize; MAX_AXES],
}

impl Shape {
    /// The shape with these sizes.
    ///
    /// # Panics
    /// With more than [`MAX_AXES`] axes, or if the element count does not fit in 32 bits.
    #[track_caller]
    pub fn new(sizes: &[usize]) -> Self {
        assert!(sizes.len() <= MAX_AXES, "shape: {sizes:?} has more than {MAX_AXES} axes");
        match Shape::checked(sizes) {
            Some(shape) => shape,
            None => panic!("shape: {sizes:?} has more than 2^32 - 1 elements"),
        }
    }

    /// [`Shape::new`] for sizes that come from outside of the program. `None` where that would panic.
    pub(crate) fn checked(sizes: &[usize]) -> Option<Self> {
        let count = sizes.iter().try_fold(1usize, |n, &s| n.checked_mul(s));
        if sizes.len() > MAX_AXES || count.is_none_or(|n| n > u32::MAX as usize) {
            return None;
        }
        let mut all = [1; MAX_AXES];
        all[..sizes.len()].copy_from_slice(sizes);
        Some(Shape { len: sizes.len() as u8, sizes: all })
    }

    /// Number of elements: the product of the sizes, 1 for a scalar.
    pub fn count(&self) -> usize {
        self.iter().product()
    }

    /// Row-major strides in elements.
    pub fn strides(&self) -> Strides {
        let mut strides = [0; MAX_AXES];
        let mut step = 1;
        for axis in (0..self.len()).rev() {
            strides[axis] = step;
            step *= self[axis];
        }
        strides
    }

    /// This shape with `axis` set to `size`.
    pub fn with(&self, axis: usize, size: usize) -> Self {
        let mut sizes = self.to_vec();
        sizes[axis] = size;
        Shape::new(&sizes)
    }

    /// This shape without `axis`.
    pub fn without(&self, axis: usize) -> Self {
        let mut sizes = self.to_vec();
        sizes.remove(axis);
        Shape::new(&sizes)
    }

    /// The product of the sizes before `axis`, its size, and the product of those after it. A kernel that works along
    /// an axis needs these three numbers.
    pub fn split_at_axis(&self, axis: usize) -> (usize, usize, usize) {
        (self[..axis].iter().product(), self[axis], self[axis + 1..].iter().product())
    }
}

/// Strides in elements, one for each axis of the shape that they belong to. The rest are zero.
pub type Strides = [usize; MAX_AXES];

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.sizes[..self.len as usize]
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl From<&[usize]> for Shape {
    #[track_caller]
    fn from(sizes: &[usize]) -> Self {
        Shape::new(sizes)
    }
}

impl From<&Shape> for Shape {
    fn from(shape: &Shape) -> Self {
        *shape
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    #[track_caller]
    fn from(sizes: [usize; N]) -> Self {
        Shape::new(&sizes)
    }
}

impl<const N: usize> From<&[usize; N]> for Shape {
    #[track_caller]
    fn from(sizes: &[usize; N]) -> Self {
        Shape::new(sizes)
    }
}

/// The axes that an op works along: one, such as `1`, or several, such as `[0, 2]`. Negative ones count from the end.
///
/// ```
/// use tiebeam::{Shape, shape::Axes};
/// let axes: Axes = [-1, 0].into();
/// assert_eq!(axes.of("sum", &Shape::from([2, 3, 4])), [0, 2]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axes(Vec<isize>);

impl Axes {
    /// Returns the indices of these axes of `shape`, in increasing order.
    ///
    /// # Panics
    /// If there are none, one is out of range, or one is named twice.
    #[track_caller]
    pub fn of(&self, op: &str, shape: &Shape) -> Vec<usize> {
        assert!(!self.0.is_empty(), "{op}: no axes of {shape} are named; name at least one");
        let mut all: Vec<usize> = self.0.iter().map(|&a| axis(op, a, shape)).collect();
        all.sort_unstable();
        let twice = all.windows(2).find(|pair| pair[0] == pair[1]);
        assert!(twice.is_none(), "{op}: {:?} names an axis of {shape} twice", self.0);
        all
    }
}

impl From<isize> for Axes {
    fn from(axis: isize) -> Axes {
        Axes(vec![axis])
    }
}

impl From<&[isize]> for Axes {
    fn from(axes: &[isize]) -> Axes {
        Axes(axes.to_vec())
    }
}

impl<const N: usize> From<[isize; N]> for Axes {
    fn from(axes: [isize; N]) -> Axes {
        Axes(axes.to_vec())
    }
}

impl<const N: usize> From<&[isize; N]> for Axes {
    fn from(axes: &[isize; N]) -> Axes {
        Axes(axes.to_vec())
    }
}

/// The shape that `a` and `b` broadcast to: aligned at the last axis, sizes equal or 1.
///
/// # Panics
/// When two sizes differ and neither is 1.
///
/// ```
/// use tiebeam::shape::{Shape, broadcast};
/// assert_eq!(broadcast("add", &Shape::from([2, 1]), &Shape::from([3])), Shape::from([2, 3]));
/// ```
#[track_caller]
pub fn broadcast(op: &str, a: &Shape, b: &Shape) -> Shape {
    let axes = a.len().max(b.len());
    let size = |s: &Shape, i: usize| if i + s.len() < axes { 1 } else { s[i + s.len() - axes] };
    let sizes: Vec<usize> = (0..axes)
        .map(|i| match (size(a, i), size(b, i)) {
            (x, y) if x == y => x,
            (1, y) => y,
            (x, 1) => x,
            _ => panic!("{op}: shapes do not broadcast: lhs {a}, rhs {b}; aligned sizes must be equal or 1"),
        })
        .collect();
    Shape::new(&sizes)
}

/// The strides with which a tensor of shape `from` is read as shape `to`: 0 along the axes that repeat.
///
/// # Panics
/// When `from` does not broadcast to `to`.
#[track_caller]
pub fn expand_strides(op: &str, from: &Shape, strides: &Strides, to: &Shape) -> Strides {
    assert!(from.len() <= to.len(), "{op}: {from} does not expand to {to}: too many axes");
    let shift = to.len() - from.len();
    let mut out = [0; MAX_AXES];
    for axis in 0..from.len() {
        let (have, want) = (from[axis], to[axis + shift]);
        assert!(have == want || have == 1, "{op}: {from} does not expand to {to}: axis {axis} is {have}");
        out[axis + shift] = if have == want && have != 1 { strides[axis] } else { 0 };
    }
    out
}

/// Returns the index of an axis that is given as in Python, where negative numbers count from the end.
///
/// # Panics
/// If it is out of range.
///
/// ```
/// use tiebeam::shape::{Shape, axis};
/// assert_eq!(axis("sum", -1, &Shape::from([2, 3])), 1);
/// ```
#[track_caller]
pub fn axis(op: &str, axis: isize, shape: &Shape) -> usize {
    let axes = shape.len() as isize;
    assert!((-axes..axes).contains(&axis), "{op}: axis {axis} is outside shape {shape}");
    axis.rem_euclid(axes) as usize
}

/// Returns the places of `range` on an axis of a shape.
///
/// # Panics
/// When it does not lie in the axis.
#[track_caller]
pub(crate) fn range(op: &str, range: impl RangeBounds<usize>, axis: usize, shape: &Shape) -> Range<usize> {
    let start = match range.start_bound() {
        Bound::Included(&at) => at,
        Bound::Excluded(&before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&last) => last.saturating_add(1),
        Bound::Excluded(&end) => end,
        Bound::Unbounded => shape[axis],
    };
    let range = start..end;
    assert!(start <= end && end <= shape[axis], "{op}: {range:?} is outside axis {axis} of {shape}");
    range
}

/// Returns the output shape of a batched matrix product `[.., m, k] x [.., k, n] -> [.., m, n]`, where leading axes
/// broadcast.
///
/// # Panics
/// With fewer than two axes, or if the inner sizes differ.
///
/// ```
/// use tiebeam::shape::{Shape, matmul};
/// let [a, b] = [Shape::from([5, 2, 3]), Shape::from([3, 4])];
/// assert_eq!(matmul("matmul", &a, &b), Shape::from([5, 2, 4]));
/// ```
#[track_caller]
pub fn matmul(op: &str, lhs: &Shape, rhs: &Shape) -> Shape {
    assert!(lhs.len() >= 2 && rhs.len() >= 2, "{op}: both sides need two axes: lhs {lhs}, rhs {rhs}");
    let (l, r) = (lhs.len(), rhs.len());
    assert!(lhs[l - 1] == rhs[r - 2], "{op}: inner sizes differ: lhs {lhs}, rhs {rhs}");
    let batch = broadcast(op, &Shape::new(&lhs[..l - 2]), &Shape::new(&rhs[..r - 2]));
    let mut sizes = batch.to_vec();
    sizes.extend([lhs[l - 2], rhs[r - 1]]);
    Shape::new(&sizes)
}

/// Merges axes. Returns the sizes of the fewest axes that visit the same elements in the same order, and each operand's
/// strides over them.
///
/// Axes of size 1 vanish. Neighbours `(outer, inner)` merge if `outer stride = inner stride * inner size` for every
/// operand.
pub(crate) fn collapse(shape: &Shape, operands: &[Strides]) -> (Vec<usize>, Vec<Vec<usize>>) {
    let mut sizes: Vec<usize> = Vec::new();
    let mut strides: Vec<Vec<usize>> = vec![Vec::new(); operands.len()];
    for (axis, &size) in shape.iter().enumerate().filter(|&(_, &size)| size != 1) {
        let merges = !sizes.is_empty()
            && operands.iter().zip(&strides).all(|(s, kept)| kept[kept.len() - 1] == s[axis] * size);
        if merges {
            *sizes.last_mut().unwrap() *= size;
            for (s, kept) in operands.iter().zip(&mut strides) {
                *kept.last_mut().unwrap() = s[axis];
            }
        } else {
            sizes.push(size);
            for (s, kept) in operands.iter().zip(&mut strides) {
                kept.push(s[axis]);
            }
        }
    }
    (sizes, strides)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasts_like_numpy() {
        assert_eq!(broadcast("t", &[2, 1, 4].into(), &[3, 1].into()), [2, 3, 4].into());
        assert_eq!(broadcast("t", &[].into(), &[5].into()), [5].into());
    }

    #[test]
    #[should_panic(expected = "add: shapes do not broadcast: lhs [2, 3], rhs [4]")]
    fn refuses_to_broadcast() {
        broadcast("add", &[2, 3].into(), &[4].into());
    }

    #[test]
    #[should_panic(expected = "matmul: inner sizes differ: lhs [32, 64], rhs [128, 10]")]
    fn matmul_names_both_shapes() {
        matmul("matmul", &[32, 64].into(), &[128, 10].into());
    }

    #[test]
    fn axes_are_sorted() {
        let shape: Shape = [2, 3, 4].into();
        assert_eq!(Axes::from([-1, 0]).of("t", &shape), [0, 2]);
        assert_eq!(Axes::from(-2).of("t", &shape), [1]);
    }

    #[test]
    #[should_panic(expected = "sum: [0, -2] names an axis of [2, 3] twice")]
    fn refuses_an_axis_twice() {
        Axes::from([0, -2]).of("sum", &[2, 3].into());
    }

    #[test]
    fn merges_what_walks_together() {
        let shape: Shape = [2, 3, 4].into();
        let plain = shape.strides();
        assert_eq!(collapse(&shape, &[plain]), (vec![24], vec![vec![1]]));
        let mut row = [0; MAX_AXES];
        row[2] = 1;
        assert_eq!(collapse(&shape, &[plain, row]), (vec![6, 4], vec![vec![4, 1], vec![0, 1]]));
    }
}
