//! The rows of ops and of sharing kinds: their cases that are marked as sizes of the benchmark.

use super::{Check, Entry, Row, Suite, carried};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::plan::Pass;
use crate::ops::case::{Array, Case, Forward, Input};
use crate::ops::timed::{Timed, Want, When};
use crate::rng::Rng;
use crate::shape::Shape;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::cmp::Ordering::Equal;

/// The number of elements of a result that are checked in addition if the user asks for checks.
const MANY: usize = 64;
/// Bytes of inputs that exceed the caches of a CPU and of a GPU.
const BEYOND_CACHES: [usize; 2] = [64 << 20, 256 << 20];
/// Integers from which on each set of inputs has its own.
const MANY_INTEGERS: usize = 1 << 18;
/// The most sets of inputs that are made to exceed the caches.
const MOST_SETS: usize = 8;

/// Returns the rows of a suite, for a CPU driver or for a GPU.
pub(super) fn entries(cpu: bool, suite: Suite) -> Vec<Entry> {
    let cases = crate::ops::cases().into_iter().chain(crate::share::cases()).flat_map(|(_, cases)| cases);
    cases.filter_map(|case| entry(case, cpu, suite)).collect()
}

fn entry(case: Case, cpu: bool, suite: Suite) -> Option<Entry> {
    let is_in = match case.timed.as_ref()?.when[!cpu as usize] {
        When::Quick => true,
        When::Full => suite == Suite::Full,
        When::Never => false,
    };
    if is_in { row_of(case) } else { None }
}

/// The row of a timed case, whatever its suites.
pub(super) fn row_of(mut case: Case) -> Option<Entry> {
    let timed = case.timed.take()?;
    let (family, shape) = (timed.family, case.name.clone());
    let make = move |gpu: &Gpu, checked: bool| row(gpu, case, &timed, checked);
    Some(Entry { family, shape, asked: false, make: Box::new(make) })
}

fn row(gpu: &Gpu, case: Case, timed: &Timed, checked: bool) -> Result<Row> {
    let mut arrays = case.draw();
    let half = case.inputs.iter().any(|input| input.dtype == DType::F16);
    let sets = sets(gpu, &case.inputs, &arrays);
    let call = match timed.gradient {
        None => value(case.forward, sets),
        Some((input, _)) => {
            let (call, dy) = gradient(&case, input, sets);
            arrays.push(dy);
            call
        }
    };
    let count = call.shape.count();
    let mut elements = timed.elements.clone();
    if checked {
        // Adding multiples of a prime spreads the elements over all rows and columns.
        elements.extend((0..MANY.min(count)).map(|i| (i * 7919 + i * (count / MANY)) % count));
    }
    let check = |at| {
        let Want { value: want, bound } = (timed.element)(&arrays, at);
        Check { at, want, bound }
    };
    let checks = elements.into_iter().map(check).collect();
    let passes = planned(gpu, &call)?;
    let sum = |of: fn(&Pass) -> f64| passes.iter().map(of).sum::<f64>();
    let once = call.operands + 4.0 * count as f64;
    let [once, flops] = timed.gradient.map_or_else(|| [once, sum(|pass| pass.flops)], |(_, work)| work);
    // The passes' bytes include intermediate results, so `once` bounds them. They can also be fewer than `once`, if passes do not
    // read all of an operand.
    let work = [sum(|pass| pass.bytes).min(once), flops];
    let longest =
        passes.iter().max_by(|a, b| (a.flops, a.bytes).partial_cmp(&(b.flops, b.bytes)).unwrap_or(Equal));
    let constants = longest.map_or(String::new(), Pass::kernel);
    Ok(Row { half, constants, sets: call.sets, checks, repeats: true, ..Row::new(work, call.run) })
}

/// A function that computes the result for one set of inputs, with the sizes of inputs and result.
struct Call {
    run: Box<dyn Fn(usize) -> Tensor>,
    sets: usize,
    /// The shape of the result.
    shape: Shape,
    /// Bytes of the inputs of one set.
    operands: f64,
}

/// Uploads the inputs in as many copies as exceed the caches, up to `MOST_SETS`.
fn sets(gpu: &Gpu, inputs: &[Input], arrays: &[Array]) -> Vec<Vec<Tensor>> {
    let first: Vec<Tensor> =
        inputs.iter().zip(arrays).map(|(input, array)| array.upload(gpu, input.dtype)).collect();
    let bytes = (bytes(&first) as usize).max(1);
    let more = (BEYOND_CACHES[!gpu.adapter().is_software() as usize] / bytes).min(MOST_SETS - 1);
    let set = |_| first.iter().zip(arrays).map(|(x, array)| copy(gpu, x, array)).collect();
    let mut sets: Vec<Vec<Tensor>> = (0..more).map(set).collect();
    sets.insert(0, first);
    sets
}

/// Returns a copy of a tensor. A few integers, such as ids, are shared; many are packed weights.
fn copy(gpu: &Gpu, x: &Tensor, array: &Array) -> Tensor {
    if !x.dtype().is_float() {
        return if x.count() < MANY_INTEGERS { x.clone() } else { array.upload(gpu, x.dtype()) };
    }
    let y = x.affine(1.0, 0.0);
    y.evaluate();
    y
}

fn bytes(tensors: &[Tensor]) -> f64 {
    tensors.iter().map(|x| (x.shape().count() * x.dtype().size()) as f64).sum()
}

/// Returns a call that computes the op's result.
fn value(forward: Forward, sets: Vec<Vec<Tensor>>) -> Call {
    let shape = *no_grad(|| forward(&sets[0])).shape();
    let (count, operands) = (sets.len(), bytes(&sets[0]));
    Call { run: Box::new(move |i| no_grad(|| forward(&sets[i]))), sets: count, shape, operands }
}

/// Returns a call that computes the gradient of one input, and the gradient of the result from which it starts, of normal draws.
/// Every set has its own copy of that gradient.
fn gradient(case: &Case, input: usize, sets: Vec<Vec<Tensor>>) -> (Call, Array) {
    let operands = bytes(&sets[0]);
    let graph = |x: Vec<Tensor>| {
        let of = |(x, input): (&Tensor, &Input)| if input.grad { x.requires_grad() } else { x.clone() };
        let leaves: Vec<Tensor> = x.iter().zip(&case.inputs).map(of).collect();
        ((case.forward)(&leaves), leaves[input].clone())
    };
    let graphs: Vec<(Tensor, Tensor)> = sets.into_iter().map(graph).collect();
    let (y, leaf) = &graphs[0];
    let array = Input::normal(*y.shape()).draw(&mut Rng::new(7));
    let first = array.upload(y.gpu(), DType::F32);
    let mut incoming: Vec<Tensor> = (1..graphs.len()).map(|_| copy(y.gpu(), &first, &array)).collect();
    incoming.push(first);
    let (shape, sets) = (*leaf.shape(), graphs.len());
    let run = move |i: usize| {
        let (y, leaf) = &graphs[i];
        let grads = y.backward_with_retain_graph(&incoming[i]);
        carried(
            y.gpu(),
            grads.and_then(|grads| {
                grads.get(leaf).cloned().ok_or_else(|| Error::device("there is no gradient"))
            }),
        )
    };
    (Call { run: Box::new(run), sets, shape, operands }, array)
}

/// Returns the dispatches that a call plans. None of them runs.
fn planned(gpu: &Gpu, call: &Call) -> Result<Vec<Pass>> {
    gpu.only_planned(|| no_grad(|| (call.run)(0).contiguous().evaluate()))
}
