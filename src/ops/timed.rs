//! How the benchmark uses a case: in which suites it is timed, and which elements of its large result are checked there.

use super::array::Array;

/// The suites of the benchmark that time a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// All suites.
    Quick,
    /// The full suite only.
    Full,
    /// No suite.
    Never,
}

/// The correct value of one element of a result.
#[derive(Clone, Copy, Debug)]
pub struct Want {
    /// The value of the f64 reference.
    pub value: f64,
    /// The largest error that is allowed.
    pub bound: f64,
}

/// Returns the correct element at a flat index of the result, from the inputs. It should compute only this element, so that results
/// can be checked that are too large for a full f64 reference. If a gradient is timed, the gradient of the op's result follows the
/// inputs.
pub type Element = Box<dyn Fn(&[Array], usize) -> Want + Send + Sync>;

/// How the benchmark times a case.
pub struct Timed {
    /// The first part of the row's name: the op and its variant. The name of the case, with the sizes, follows it.
    pub family: &'static str,
    /// The suites that time it, on a CPU driver and on a GPU.
    pub when: [When; 2],
    /// The input whose gradient is timed in place of the result, with the bytes that must move for it and the operations. A
    /// backward pass computes some operations again, which the plan counts and these do not.
    pub gradient: Option<(usize, [f64; 2])>,
    /// Elements that are always checked.
    pub elements: Vec<usize>,
    /// The reference of one element.
    pub element: Element,
}
