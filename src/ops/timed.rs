//! What a case says about the benchmark: in which suites it is timed, and which elements of its large result are checked there.

use super::case::{Array, Case};

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

impl Case {
    /// Returns this case with what the benchmark needs. It stays a test, for which `element` is checked too, until
    /// [`Case::when`] makes it a row of the benchmark.
    pub fn timed(
        mut self,
        family: &'static str,
        elements: impl Into<Vec<usize>>,
        element: impl Fn(&[Array], usize) -> Want + Send + Sync + 'static,
    ) -> Case {
        let (elements, element) = (elements.into(), Box::new(element));
        self.timed = Some(Timed { family, when: [When::Never; 2], gradient: None, elements, element });
        self
    }

    /// Returns this case with the gradient of an input timed, for which so many bytes must move.
    ///
    /// # Panics
    /// If the case is not [timed](Case::timed).
    #[track_caller]
    pub fn gradient_of(mut self, input: usize, bytes: f64) -> Case {
        self.timed.as_mut().expect("a timed case").gradient = Some((input, bytes));
        self
    }

    /// Returns this case as a row of the benchmark: on a CPU driver, and on a GPU.
    ///
    /// # Panics
    /// If the case is not [timed](Case::timed).
    #[track_caller]
    pub fn when(mut self, cpu: When, gpu: When) -> Case {
        self.timed.as_mut().expect("a timed case").when = [cpu, gpu];
        self
    }

    /// Whether the case is small enough for its whole reference. Otherwise only the benchmark runs it.
    pub fn is_test(&self) -> bool {
        self.timed.as_ref().is_none_or(|timed| timed.when == [When::Never; 2])
    }
}
