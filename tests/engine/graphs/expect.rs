//! The expected values of a program's tensors, and their expected rounding errors.

use super::host::{Tape, U, Var};
use super::interpret;
use super::program::Program;

/// The expected value of a tensor.
pub struct Expected {
    pub value: Vec<f64>,
    /// The scale of its f32 rounding error: the largest change by noise, plus two roundoffs of the largest element.
    pub unit: f64,
}

impl Expected {
    fn new(all: &[&[f64]]) -> Expected {
        let (exact, noisy) = all.split_first().expect("the exact one");
        let largest = exact.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        Expected { value: exact.to_vec(), unit: moved(exact, noisy) + 2.0 * U * largest }
    }

    /// Returns the largest error in units.
    pub fn off(&self, got: &[f64]) -> f64 {
        if got.len() != self.value.len() {
            return f64::INFINITY;
        }
        let off = |(g, w): (&f64, &f64)| if g == w { 0.0 } else { (g - w).abs() / self.unit };
        got.iter()
            .zip(&self.value)
            .map(off)
            .fold(0.0, |m, v| if v.is_nan() { f64::INFINITY } else { v.max(m) })
    }

    /// Whether rounding errors are so large that a comparison means little.
    fn is_lost(&self) -> bool {
        let largest = self.value.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        !(largest <= 1e4 && self.unit <= 1e-3 * largest.max(1e-3))
    }
}

/// Returns the largest difference of any element.
pub fn moved(exact: &[f64], noisy: &[&[f64]]) -> f64 {
    let of = |noisy: &&[f64]| exact.iter().zip(*noisy).fold(0.0f64, |m, (e, n)| m.max((e - n).abs()));
    noisy.iter().map(of).fold(0.0, f64::max)
}

/// A program and its expected results, by line.
pub struct Graph {
    pub program: Program,
    pub loss: Expected,
    pub values: Vec<Expected>,
    pub grads: Vec<Option<Expected>>,
    /// Number of values on the host's tapes.
    pub nodes: usize,
}

/// Computes the expected results of a program from the exact tape, which is the first, and those with noise.
pub fn expected(program: Program, mut tapes: Vec<Tape>, vars: &[Var]) -> Option<Graph> {
    let losses: Vec<Var> = tapes.iter_mut().map(|t| interpret::loss(t, &program, vars)).collect();
    let grads: Vec<_> = tapes.iter_mut().zip(&losses).map(|(t, &loss)| t.backward(loss)).collect();
    let of = |var: Var| Expected::new(&tapes.iter().map(|t| t.value(var)).collect::<Vec<_>>());
    let gradient = |i: usize| {
        let leaf = program.lines[i].is_leaf() && program.lines[i].tracked;
        let all: Option<Vec<&[f64]>> = grads.iter().map(|g| g[vars[i]].as_deref()).collect();
        all.filter(|_| leaf).map(|all| Expected::new(&all))
    };
    let graph = Graph {
        loss: of(losses[0]),
        values: vars.iter().map(|&v| of(v)).collect(),
        grads: (0..vars.len()).map(gradient).collect(),
        nodes: tapes[0].nodes.len(),
        program,
    };
    let lost = graph.grads.iter().flatten().chain([&graph.loss]).any(Expected::is_lost);
    Some(graph).filter(|_| !lost)
}
