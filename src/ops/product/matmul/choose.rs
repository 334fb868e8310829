//! Chooses the kernel of a product.

use super::core::{Core, Problem};
use super::tune;
use crate::gpu::Gpu;

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
