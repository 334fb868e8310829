//! Attention on matrix units: whether its kernels take a call.

use super::kernels::{Kernel, Kernels};
use super::matrices::{Matrices, WALKED};
use super::pass::Pass;
use super::sizes::Sizes;
use crate::gpu::DeviceClass;
use crate::gpu::shader::Source;

/// Larger heads would need more registers than a thread has.
const LARGEST_HEAD: usize = 128;
/// With smaller heads, fewer rows or fewer keys, most of a matrix would be padding.
const LEAST: usize = 16;

impl Matrices {
    /// Whether these kernels compute attention of these sizes on a device of this class, each pass in one dispatch.
    fn fit(&self, class: &DeviceClass, sizes: &Sizes) -> bool {
        let Sizes { head_dim, group, tokens_q, tokens_k, .. } = *sizes;
        // As long as a walk in pieces, by `walk` in backward.rs.
        let whole = |pass, walked: usize| {
            let most = Kernel::Coop(*self).most(pass, head_dim);
            walked + 2 * WALKED <= most && sizes.longest(class, pass, walked) == usize::MAX
        };
        let large = head_dim.min(sizes.rows()).min(tokens_k) >= LEAST;
        large
            && head_dim <= LARGEST_HEAD
            && head_dim.is_multiple_of(4)
            && self.memory(head_dim) <= class.workgroup_memory as usize
            // Every row has threads of its own.
            && (self.rows()..=256).contains(&self.threads())
            && whole(Pass::Queries, tokens_k)
            && whole(Pass::Keys, group * (tokens_q + 3 * WALKED))
    }

    /// The kernels for these sizes on a device of this class, with matrices of `size`.
    pub fn kernels(class: &DeviceClass, size: usize, sizes: &Sizes) -> Option<Kernels> {
        let matrices = Matrices::new(class, size);
        let kernel = Kernel::Coop(matrices);
        matrices.fit(class, sizes).then_some(Kernels { forward: kernel, queries: kernel, keys: kernel })
    }
}

/// The kernels for matrix units, with every fragment. The test of the list of variants needs them from here, because the
/// adapters that it is recorded on have no matrix units.
pub fn for_matrix_units() -> Vec<Source> {
    let class = DeviceClass::named("nvidia").expect("a row of the table");
    let mut all = Vec::new();
    for (size, head_dim) in
        [16, 8].into_iter().flat_map(|size| [32, 64, 80, 128].map(|head_dim| (size, head_dim)))
    {
        let kernel = Kernel::Coop(Matrices::new(&class, size));
        for (pass, masked) in [Pass::Forward, Pass::Queries].into_iter().flat_map(|p| [(p, false), (p, true)])
        {
            let source = kernel.source(pass, head_dim, masked);
            if pass == Pass::Forward {
                all.push(source.clone().slot("out", "out_f16").slot("packed", "f16"));
            }
            all.push(source);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::plan;

    #[test]
    fn tiles_need_the_memory_that_is_counted() {
        // Those of CPU drivers have too few lanes.
        for class in DeviceClass::all().into_iter().filter(|class| class.lanes >= 16) {
            for (size, head_dim, pass) in
                [16, 8].into_iter().flat_map(|size| [20, 64, 128].map(|head_dim| (size, head_dim))).flat_map(
                    |(size, dim)| [Pass::Forward, Pass::Queries, Pass::Keys].map(|pass| (size, dim, pass)),
                )
            {
                let matrices = Matrices::new(&class, size);
                let source = Kernel::Coop(matrices).source(pass, head_dim, false);
                let (op, entry, grid) = ("attention".into(), pass.entry().into(), [1; 3]);
                let pass = plan::Pass { op, source, entry, grid, parts: 1, bytes: 0.0, flops: 0.0 };
                let bytes = pass.workgroup_memory().unwrap();
                assert!(bytes <= matrices.memory(head_dim), "{}: {bytes}", pass.kernel());
                assert!(bytes <= 32 << 10, "{}: {bytes}", pass.kernel());
                assert_eq!(pass.threads().unwrap(), matrices.threads());
            }
        }
    }
}
