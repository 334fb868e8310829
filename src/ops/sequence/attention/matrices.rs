//! The kernels of attention that use cooperative matrices.

use super::kernels::{Kernel, Kernels, Pass};
use super::sizes::Sizes;
use crate::gpu::DeviceClass;
use crate::gpu::shader::Source;

/// The constants of `attention_coop` and `attention_coop_backward`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) struct Matrices {
    /// Rows and columns of a matrix.
    size: usize,
    /// Rows per subgroup.
    part: usize,
    /// The most lanes that a subgroup has.
    lanes: usize,
    /// Whether tiles are kept in vectors of four elements. Metal loads matrices from single elements only.
    words: bool,
}

const SUBGROUPS: usize = 4;
/// Keys or queries that are walked in a step.
pub(super) const WALKED: usize = 32;
/// Larger heads would need more registers than a thread has.
const LARGEST_HEAD: usize = 128;
/// With smaller heads, fewer rows or fewer keys, most of a matrix would be padding.
const LEAST: usize = 16;

/// Elements of a head in workgroup memory.
fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(WALKED)
}

impl Matrices {
    pub fn new(class: &DeviceClass, size: usize) -> Matrices {
        let lanes = class.lanes as usize;
        // There is a thread for every row.
        Matrices { size, part: lanes.min(16).max(size), lanes, words: size == 16 }
    }

    pub fn rows(&self) -> usize {
        SUBGROUPS * self.part
    }

    pub fn threads(&self) -> usize {
        SUBGROUPS * self.lanes
    }

    /// Bytes of workgroup memory: two tiles, weights and scores, in lines as in lib/attention_matrices.wgsl, and two flags.
    fn memory(&self, head_dim: usize) -> usize {
        2 * (2 * WALKED * (padded(head_dim) + 8) + self.rows() * (WALKED + 8))
            + 4 * self.rows() * (WALKED + 4)
            + 8
    }

    /// Turns of a thread before and after its walk, and in every step.
    pub fn turns_of(&self, pass: Pass, head_dim: usize) -> [usize; 2] {
        let own = (self.rows() * padded(head_dim) / 4).div_ceil(self.threads()) + 1;
        match pass {
            // A step may scale the sums.
            Pass::Forward => {
                [own, 1 + padded(head_dim) * self.rows() / self.threads() + padded(head_dim) / WALKED]
            }
            Pass::Queries | Pass::Keys => [2 * own, 1],
        }
    }

    pub fn source(&self, pass: Pass, head_dim: usize) -> Source {
        let Matrices { size, part, lanes, words } = *self;
        let matrix = |of: &str| format!("coop_mat{size}x{size}<{of}>");
        let file = if pass == Pass::Forward { "attention_coop" } else { "attention_coop_backward" };
        Source::file(file)
            .u32("SIZE", size as u32)
            .u32("PART", part as u32)
            .u32("LANES", lanes as u32)
            .u32("HEAD", head_dim as u32 / 4)
            .u32("DIM", padded(head_dim) as u32)
            .alias("MatrixA", matrix("f16, A"))
            .alias("MatrixB", matrix("f16, B"))
            .alias("MatrixC", matrix("f32, C"))
            .slot("halves", if words { "halves_words" } else { "halves_elements" })
            .enable("f16")
            .enable("wgpu_cooperative_matrix")
    }

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
            && self.threads() <= 256
            && whole(Pass::Queries, tokens_k)
            && whole(Pass::Keys, group * (tokens_q + WALKED))
    }

    /// The kernels for these sizes on a device of this class, with matrices of `size`.
    pub fn kernels(class: &DeviceClass, size: usize, sizes: &Sizes) -> Option<Kernels> {
        let matrices = Matrices::new(class, size);
        let kernel = Kernel::Coop(matrices);
        matrices.fit(class, sizes).then_some(Kernels { forward: kernel, queries: kernel, keys: kernel })
    }
}

/// The kernels for matrix units, with every fragment. The list of variants needs them from here, because the adapters
/// that it is recorded on have no matrix units.
#[doc(hidden)]
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
        for class in DeviceClass::all() {
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
