//! What a case says about the benchmark: in which suites it is timed, and which elements of its large result are checked there.

use super::array::Array;

/// In which suites of the benchmark a case is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// In all.
    Quick,
    /// In the full suite only.
    Full,
    /// In all, but only if the command line selects it, because it takes minutes.
    Asked,
    /// In none.
    Never,
}

/// One element of a result.
#[derive(Clone, Copy, Debug)]
pub struct Want {
    /// By the f64 reference.
    pub value: f64,
    /// Allowed distance.
    pub bound: f64,
}

/// Returns the element at a flat index of the result. It may compute no more than this element, so that results which no f64
/// reference could compute in time can be checked. If a gradient is timed, the gradient of the op's result follows the inputs.
pub type Element = Box<dyn Fn(&[Array], usize) -> Want + Send + Sync>;

/// How the benchmark times a case.
pub struct Timed {
    /// The first words of the row's name: the op and its variant. The name of the case, which has the sizes, follows.
    pub family: &'static str,
    /// In which suites, on a CPU driver and on a GPU.
    pub when: [When; 2],
    /// The input whose gradient is computed in place of the result, and the bytes that must move for it.
    pub gradient: Option<(usize, f64)>,
    /// Elements that are always checked.
    pub elements: Vec<usize>,
    /// The reference of one element.
    pub element: Element,
}
