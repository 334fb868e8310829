//! The precision of a part of a program: products that read and write f16 or bf16, with every sum in f32.
//!
//! [`autocast`] is a scope, as in PyTorch. What is in it keeps its code: products ([`linear`](crate::Tensor::linear),
//! [`matmul`](crate::Tensor::matmul), routed rows), attention and norms return the scope's type. Products convert operands
//! that are not of it, and so does attention in f16 on matrix units, which rounds its weights too. All other ops are as
//! they are outside. Weights stay f32: a weight is converted once per scope, however
//! many sites use it, and its gradient arrives in f32, where an optimizer adds it to the f32 weight. Gradients of
//! tensors that are stored in 16 bits have 16 bits. The backward pass may run outside of the scope.
//!
//! Source: Micikevicius et al. 2018, "Mixed precision training", arXiv 1710.03740.

use crate::dtype::DType;
use crate::error::Error;
use crate::tensor::Tensor;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;
use std::str::FromStr;
use std::sync::Arc;

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

/// A tensor as a scope has converted it. The source is kept too, so that its address cannot become another's.
struct Converted {
    source: Tensor,
    /// How often the source had been changed.
    changes: u64,
    result: Tensor,
}

/// The scope of a thread.
struct Scope {
    precision: Precision,
    /// By the address of the source's elements and the recording that the conversion belongs to, 0 outside of recordings.
    kept: RefCell<HashMap<(usize, u64), Converted>>,
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
    let scope = same.unwrap_or_else(|| Rc::new(Scope { precision, kept: RefCell::default() }));
    let _restore = Restore(SCOPE.replace(Some(scope)));
    work()
}

/// The precision of the innermost scope of this thread.
pub fn precision() -> Precision {
    SCOPE.with_borrow(|scope| scope.as_ref().map_or(Precision::F32, |scope| scope.precision))
}

/// Returns `source` as this thread's scope has converted it, or converts it now. Without a scope, it is converted each
/// time. A conversion lasts until its source changes or is held by nobody else, or its recording ends.
pub(crate) fn converted(source: &Tensor, recording: u64, convert: impl FnOnce() -> Tensor) -> Tensor {
    let Some(scope) = SCOPE.with_borrow(Clone::clone) else { return convert() };
    let (key, changes) = ((Arc::as_ptr(&source.value) as usize, recording), source.value.changes());
    let known = scope.kept.borrow().get(&key).and_then(|known| {
        // One that failed, because there was no memory for example, may succeed now.
        let good = known.changes == changes && known.result.check().is_ok();
        good.then(|| known.result.clone())
    });
    known.unwrap_or_else(|| {
        let result = convert();
        let mut kept = scope.kept.borrow_mut();
        kept.retain(|&(_, of), known| {
            (of == 0 || of == recording) && Arc::strong_count(&known.source.value) > 1
        });
        kept.insert(key, Converted { source: source.clone(), changes, result: result.clone() });
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_nest_and_end_with_a_panic() {
        assert_eq!(precision(), Precision::F32);
        autocast(Precision::Bf16, || {
            autocast(Precision::F16, || assert_eq!(precision(), Precision::F16));
            let end = std::panic::catch_unwind(|| autocast(Precision::F32, || panic!("inside")));
            assert!(end.is_err() && precision() == Precision::Bf16);
        });
        assert_eq!(precision(), Precision::F32);
    }

    #[test]
    fn names_are_read_as_they_are_printed() {
        for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
            assert_eq!(precision.to_string().parse::<Precision>().unwrap(), precision);
        }
        assert!("f64".parse::<Precision>().unwrap_err().to_string().contains("f32, f16 and bf16"));
    }
}
