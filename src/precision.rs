//! The precision of a part of a program: products that read and write f16 or bf16, with every sum in f32.
//!
//! [`autocast`] is a scope, as in PyTorch. What is in it keeps its code: products ([`linear`](crate::Tensor::linear),
//! [`matmul`](crate::Tensor::matmul), routed rows) and norms return the scope's type, products convert operands that are
//! not of it, and all other ops are as they are outside. Weights stay f32: a weight is converted once per scope, however
//! many sites use it, and its gradient arrives in f32, where an optimizer adds it to the f32 weight. Gradients of
//! tensors that are stored in 16 bits have 16 bits. The backward pass may run outside of the scope.
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

/// What a scope keeps, by the caller's numbers.
type Kept = RefCell<HashMap<[u64; 3], Box<dyn Any>>>;

/// The scope of a thread.
struct Scope {
    precision: Precision,
    kept: Kept,
}

thread_local! {
    static SCOPE: RefCell<Option<Rc<Scope>>> = const { RefCell::new(None) };
}

/// Runs `work` with products and norms in this precision. It concerns this thread only. Scopes may be nested, and the
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
    let scope = same.unwrap_or_else(|| Rc::new(Scope { precision, kept: Kept::default() }));
    let _restore = Restore(SCOPE.replace(Some(scope)));
    work()
}

/// The precision of the innermost scope of this thread.
pub fn precision() -> Precision {
    SCOPE.with_borrow(|scope| scope.as_ref().map_or(Precision::F32, |scope| scope.precision))
}

/// Returns what this thread's scope keeps under `key`, made at the first call. Without a scope, it is made each time.
pub(crate) fn kept<T: Clone + 'static>(key: [u64; 3], make: impl FnOnce() -> T) -> T {
    let Some(scope) = SCOPE.with_borrow(Clone::clone) else { return make() };
    let known = scope.kept.borrow().get(&key).and_then(|kept| kept.downcast_ref::<T>().cloned());
    known.unwrap_or_else(|| {
        let made = make();
        scope.kept.borrow_mut().insert(key, Box::new(made.clone()));
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
            assert_eq!(kept([1, 0, 0], || 1), 1);
            autocast(Precision::Bf16, || assert_eq!(kept([1, 0, 0], || 2), 1, "the same scope"));
            autocast(Precision::F16, || {
                assert_eq!(precision(), Precision::F16);
                assert_eq!(kept([1, 0, 0], || 3), 3, "another scope");
            });
            let end = std::panic::catch_unwind(|| autocast(Precision::F32, || panic!("inside")));
            assert!(end.is_err() && precision() == Precision::Bf16);
        });
        assert_eq!(precision(), Precision::F32);
        assert_eq!(kept([1, 0, 0], || 4), 4, "no scope keeps anything");
    }

    #[test]
    fn names_are_read_as_they_are_printed() {
        for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
            assert_eq!(precision.to_string().parse::<Precision>().unwrap(), precision);
        }
        assert!("f64".parse::<Precision>().unwrap_err().to_string().contains("f32, f16 and bf16"));
    }
}
