//! The precision of a part of a program: products that read and write f16 or bf16, with every sum in f32.
//!
//! [`autocast`] is a scope, as in PyTorch. What is in it keeps its code: products ([`linear`](crate::Tensor::linear),
//! [`matmul`](crate::Tensor::matmul), routed rows), attention and norms return the scope's type. Products convert operands
//! that are not of it, and so does attention in f16 on matrix units, which rounds its weights too. All other ops are as
//! they are outside. The backward pass computes the same inside of a scope and outside.
//!
//! Weights stay f32. A weight is converted once per scope, however many layers use it, unless it is passed as a view such
//! as `w.t()`. One that is not stored but computed is rounded where it is written whole, and used in f32 where a product
//! of few rows computes it as it reads it. Gradients of weights arrive in f32, where an optimizer adds them to the f32
//! weights. Gradients of tensors that are stored in 16 bits have 16 bits.
//!
//! Source: Micikevicius et al. 2018, "Mixed precision training", arXiv 1710.03740.

use crate::dtype::DType;
use crate::error::Error;
use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;
use std::str::FromStr;

/// How products are computed and activations are stored. Sums, weights and their gradients are f32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Precision {
    /// Everything in f32.
    #[default]
    F32,
    /// f16: 11 significant bits, up to 65504. Gradients need a loss scale ([`crate::optim::LossScale`]).
    F16,
    /// bf16: 8 significant bits with the range of f32, so a loss scale is not needed.
    Bf16,
}

impl Precision {
    /// The type in which activations are stored.
    pub const fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::F16 => DType::F16,
            Precision::Bf16 => DType::Bf16,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dtype().fmt(f)
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Precision, Error> {
        let all = [Precision::F32, Precision::F16, Precision::Bf16];
        all.into_iter()
            .find(|precision| precision.to_string() == name)
            .ok_or_else(|| Error::config(format!("'{name}' is no precision; there are f32, f16 and bf16")))
    }
}

/// Whether anybody could ask for a kept value.
type IsHeld = Box<dyn Fn(&dyn Any) -> bool>;

/// Something that a scope keeps for further calls.
struct Kept {
    value: Box<dyn Any>,
    is_held: IsHeld,
}

/// The scope of a thread.
struct Scope {
    precision: Precision,
    /// By an address of the caller's, and the recording that it belongs to, 0 outside of recordings.
    kept: RefCell<HashMap<(usize, u64), Kept>>,
}

thread_local! {
    static SCOPE: RefCell<Option<Rc<Scope>>> = const { RefCell::new(None) };
}

/// Runs `work` with products, attention and norms in this precision. It concerns this thread only. Scopes may be nested, and the
/// innermost one counts.
///
/// ```
/// # use tiebeam::{DType, Gpu, Precision, Tensor, autocast};
/// # let gpu = Gpu::open()?;
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]).requires_grad();
/// let x = Tensor::from_slice(&gpu, &[1f32, -1.0], [1, 2]);
/// let y = autocast(Precision::Bf16, || x.matmul(&w));
/// assert_eq!(y.dtype(), DType::Bf16);
/// let grads = y.sum_all().backward()?;
/// assert_eq!(grads.get(&w).unwrap().to_vec::<f32>()?, [1.0, 1.0, -1.0, -1.0]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn autocast<T>(precision: Precision, work: impl FnOnce() -> T) -> T {
    struct Restore(Option<Rc<Scope>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            SCOPE.replace(self.0.take());
        }
    }
    let outer = SCOPE.with_borrow(Clone::clone);
    // An inner scope of the same precision keeps what the outer one has.
    let same = outer.clone().filter(|scope| scope.precision == precision);
    let scope = same.unwrap_or_else(|| Rc::new(Scope { precision, kept: RefCell::default() }));
    let _restore = Restore(SCOPE.replace(Some(scope)));
    work()
}

/// The precision of the innermost scope of this thread.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::{Precision, autocast, precision::precision};
/// assert_eq!(precision(), Precision::F32);
/// assert_eq!(autocast(Precision::Bf16, precision), Precision::Bf16);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn precision() -> Precision {
    SCOPE.with_borrow(|scope| scope.as_ref().map_or(Precision::F32, |scope| scope.precision))
}

/// Returns what this thread's scope keeps under `key` if that `is_good`, or else makes it. Without a scope, it is made
/// each time. A scope may last long, so whatever is not held, or belongs to a recording that has ended, is dropped when
/// something else is made.
pub(crate) fn kept<T: Clone + 'static>(
    key: (usize, u64),
    is_good: impl Fn(&T) -> bool,
    is_held: impl Fn(&T) -> bool + 'static,
    make: impl FnOnce() -> T,
) -> T {
    let Some(scope) = SCOPE.with_borrow(Clone::clone) else { return make() };
    let known = scope.kept.borrow().get(&key).and_then(|kept| kept.value.downcast_ref::<T>().cloned());
    known.filter(is_good).unwrap_or_else(|| {
        let made = make();
        let mut all = scope.kept.borrow_mut();
        all.retain(|&(_, recording), kept| {
            (recording == 0 || recording == key.1) && (kept.is_held)(kept.value.as_ref())
        });
        let is_held = move |value: &dyn Any| value.downcast_ref::<T>().is_some_and(&is_held);
        all.insert(key, Kept { value: Box::new(made.clone()), is_held: Box::new(is_held) });
        made
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_nest_and_end_with_a_panic() {
        assert_eq!(precision(), Precision::F32);
        autocast(Precision::Bf16, || {
            let keep = |value: i32, is_held: bool| kept((1, 0), |_| true, move |_| is_held, || value);
            assert_eq!(keep(1, true), 1);
            autocast(Precision::Bf16, || assert_eq!(keep(2, true), 1, "the same scope"));
            autocast(Precision::F16, || {
                assert_eq!(precision(), Precision::F16);
                assert_eq!(keep(3, false), 3, "another scope");
                assert_eq!(kept((1, 0), |&known| known != 3, |_| true, || 4), 4, "no longer good");
                assert_eq!(kept((2, 7), |_| true, |_| true, || 5), 5);
                assert_eq!(kept((3, 0), |_| true, |_| true, || 6), 6);
                assert_eq!(kept((2, 7), |_| true, |_| true, || 8), 8, "of a recording that has ended");
            });
            let end = std::panic::catch_unwind(|| autocast(Precision::F32, || panic!("inside")));
            assert!(end.is_err() && precision() == Precision::Bf16);
        });
        assert_eq!(precision(), Precision::F32);
        assert_eq!(kept((1, 0), |_| true, |_| true, || 9), 9, "no scope keeps anything");
    }

    #[test]
    fn names_are_read_as_they_are_printed() {
        for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
            assert_eq!(precision.to_string().parse::<Precision>().unwrap(), precision);
        }
        assert!("f64".parse::<Precision>().unwrap_err().to_string().contains("f32, f16 and bf16"));
    }
}
