//! Chooses the kernel of a product.

use super::core::{Core, Problem};
use super::operand::operand;
use super::parts::Cut;
use super::tune;
use crate::gpu::Gpu;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// Returns the kernel for a product: the measured choice if there is one, else the table's.
pub(crate) fn choose(gpu: &Gpu, problem: &Problem) -> Core {
    if gpu.has_choices() {
        let key = problem.key();
        if let Some(name) = gpu.choice(&key) {
            // A class covers many sizes. If its choice does not suit this one, the table's is taken.
            let usable =
                Core::candidates(gpu.class(), problem).into_iter().find(|core| core.to_string() == name);
            return usable.unwrap_or_else(|| Core::by_table(gpu.class(), problem));
        }
        if gpu.tunes() && tune::measurable(gpu.class(), problem) {
            return tune::measure(gpu, problem);
        }
    }
    Core::by_table(gpu.class(), problem)
}

/// Returns the name of the kernel that [`Tensor::matmul`] uses for these operands, and the number of parts of the inner
/// axis. The benchmark uses it.
#[doc(hidden)]
pub fn chosen(a: &Tensor, b: &Tensor) -> String {
    let axes = a.shape().len();
    let batch = Shape::new(&a.shape()[..axes - 2]);
    let (left, right) = (operand(a, &batch, false), operand(b, &batch, true));
    let [m, n, k] = [a.shape()[axes - 2], b.shape()[axes - 1], a.shape()[axes - 1]];
    let half = left.half && right.half || a.gpu().rounds_products();
    let (left, right) = (left.fragment, right.fragment);
    let problem = Problem { m, n, k, batch: batch.count(), left, right, half, coop: None }.on(a.gpu());
    let cut = Cut::of(a.gpu().class(), &problem).filter(|_| axes == 2);
    let Some(cut) = cut else { return choose(a.gpu(), &problem).to_string() };
    let part = Problem { k: cut.len, batch: cut.parts, ..problem };
    format!("{}, {} parts", choose(a.gpu(), &part), cut.parts)
}
