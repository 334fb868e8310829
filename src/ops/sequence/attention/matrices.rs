//! The constants of attention's kernels with cooperative matrices.

use super::pass::Pass;
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
/// Elements of a head in workgroup memory.
fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(WALKED)
}

impl Matrices {
    pub fn new(class: &DeviceClass, size: usize) -> Matrices {
        let lanes = class.lanes as usize;
        Matrices { size, part: lanes.min(16).max(size), lanes, words: size == 16 }
    }

    pub fn rows(&self) -> usize {
        SUBGROUPS * self.part
    }

    pub fn threads(&self) -> usize {
        SUBGROUPS * self.lanes
    }

    /// Bytes of workgroup memory: two tiles, weights and scores, in lines as in lib/attention_matrices.wgsl, and two flags.
    pub fn memory(&self, head_dim: usize) -> usize {
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
        let file = if pass == Pass::Forward { "attention_coop" } else { "attention_coop_backward" };
        Source::file(file)
            .u32("SIZE", size as u32)
            .u32("PART", part as u32)
            .u32("LANES", lanes as u32)
            .u32("HEAD", head_dim as u32 / 4)
            .u32("DIM", padded(head_dim) as u32)
            .slot("halves", if words { "halves_words" } else { "halves_elements" })
            .matrices(size)
    }
}
