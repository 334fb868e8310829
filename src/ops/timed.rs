//! How the benchmark uses a case: in which suites it is timed, and which elements of its large result are checked there.

use super::case::{Array, Case};

/// The suites of the benchmark that time a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// All suites.
    Quick,
    /// The full suite only.
    Full,
    /// All suites, but only if the command line selects the case, because it takes minutes.
    Asked,
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
    /// If set, the gradient of this input is timed instead of the result, and this many bytes must move for it.
    pub gradient: Option<(usize, f64)>,
    /// Elements that are always checked.
    pub elements: Vec<usize>,
    /// The reference of one element.
    pub element: Element,
}

impl Case {
    /// Returns this case with the data that the benchmark needs. It stays a test, which checks `element` too, until
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

    /// Returns this case such that the benchmark times the gradient of an input, for which `bytes` must move.
    ///
    /// # Panics
    /// If the case is not [timed](Case::timed).
    #[track_caller]
    pub fn gradient_of(mut self, input: usize, bytes: f64) -> Case {
        self.timed.as_mut().expect("a timed case").gradient = Some((input, bytes));
        self
    }

    /// Returns this case as a row of the benchmark, in these suites on a CPU driver and on a GPU.
    ///
    /// # Panics
    /// If the case is not [timed](Case::timed).
    #[track_caller]
    pub fn when(mut self, cpu: When, gpu: When) -> Case {
        self.timed.as_mut().expect("a timed case").when = [cpu, gpu];
        self
    }

    /// Whether the tests run this case, because it is small enough for a full reference. Otherwise only the benchmark runs it.
    pub fn is_test(&self) -> bool {
        self.timed.as_ref().is_none_or(|timed| timed.when == [When::Never; 2])
    }
}
