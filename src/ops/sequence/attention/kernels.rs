//! The kernels of attention, and the choice among them.

use super::matrices::{Matrices, WALKED};
use super::pass::Pass;
use crate::dtype::DType;
use crate::gpu::kernel::MOST_TURNS;
use crate::gpu::shader::Source;
use crate::gpu::{DeviceClass, Tiles};

/// A kernel of one pass. Its own rows are queries, or in the pass of the keys' gradients keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum Kernel {
    /// `attention`, `attention_backward`: a thread has whole rows, or parts of rows.
    Rows(Split),
    /// `attention_tiled`, `attention_tiled_backward`: blocks of rows against tiles in workgroup memory, with this many
    /// rows per thread.
    Tiled { tall: usize },
    /// `attention_few`: up to eight rows of queries, and a part of the keys per workgroup.
    Few { rows: usize },
    /// `attention_queries`: the gradient of the queries from what the pass of the keys, a tiled one, has kept. A thread
    /// has this many vectors of four rows.
    Kept { tall: usize },
    /// `attention_coop`, `attention_coop_backward`: operands in f16, multiplied by matrix units.
    Coop(Matrices),
}

/// How `attention` divides work: a thread has `each` rows, which it shares with `parts - 1` other threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) struct Split {
    pub each: usize,
    pub parts: usize,
}

/// The vectors of a head that are in workgroup memory at a time, and the chunks of this size that make up a head.
fn chunks(head_dim: usize) -> [usize; 2] {
    let vectors = head_dim.div_ceil(4);
    let chunk = if vectors <= 8 { 8 } else { 16 };
    [chunk, vectors.div_ceil(chunk)]
}

/// Vectors of a head, filled up to whole chunks.
fn width(head_dim: usize) -> usize {
    chunks(head_dim).iter().product()
}

impl Kernel {
    /// Rows of a workgroup.
    pub fn rows(self) -> usize {
        match self {
            Kernel::Rows(Split { each, parts }) => 64 / parts * each,
            Kernel::Tiled { tall } => 8 * tall,
            Kernel::Few { rows } => rows,
            Kernel::Kept { tall } => 32 * tall,
            Kernel::Coop(matrices) => matrices.rows(),
        }
    }

    /// Threads of a workgroup.
    pub fn threads(self) -> usize {
        if let Kernel::Coop(matrices) = self { matrices.threads() } else { 64 }
    }

    /// The type of its operands, and of the gradients.
    pub fn dtype(self) -> DType {
        if let Kernel::Coop(_) = self { DType::F16 } else { DType::F32 }
    }

    /// Keys or queries that are walked in a step.
    pub fn step(self) -> usize {
        match self {
            Kernel::Rows(_) => 4,
            Kernel::Tiled { .. } | Kernel::Kept { .. } => 32,
            Kernel::Few { .. } => 64,
            Kernel::Coop(_) => WALKED,
        }
    }

    /// Turns of a thread before and after its walk, and in every step.
    fn turns_of(self, pass: Pass, head_dim: usize) -> [usize; 2] {
        let [chunk, chunks] = chunks(head_dim);
        match self {
            // At the end, rows are stored in turns. If several threads share a head, every step also takes two joins per
            // row.
            Kernel::Rows(Split { each, parts }) => {
                [each + 1, 1 + if parts > 1 { 2 * each * (parts + 1) } else { 0 }]
            }
            Kernel::Tiled { tall } => {
                let (scores, sums) = (chunk + 1, 9);
                let step = match pass {
                    Pass::Forward => scores + sums,
                    Pass::Queries => 2 * scores + sums,
                    Pass::Keys => 2 * scores + 2 * sums,
                };
                [tall * width(head_dim) / 8 + 2, 1 + chunks * step]
            }
            Kernel::Few { rows } => {
                let groups = 64 / chunk;
                [rows * width(head_dim) / 64 + 3 + chunks * rows * (groups + 1), 1 + chunks * (chunk + 1)]
            }
            Kernel::Kept { .. } => [1, 33],
            Kernel::Coop(matrices) => matrices.turns_of(pass, head_dim),
        }
    }

    /// Turns of a thread that walks this many keys or queries.
    pub fn turns(self, pass: Pass, head_dim: usize, walked: usize) -> usize {
        let [around, step] = self.turns_of(pass, head_dim);
        around + walked.div_ceil(self.step()) * step
    }

    /// The most keys or queries that a thread may walk, a multiple of a step.
    pub fn most(self, pass: Pass, head_dim: usize) -> usize {
        let [around, step] = self.turns_of(pass, head_dim);
        (MOST_TURNS - around) / step * self.step()
    }

    pub fn source(self, pass: Pass, head_dim: usize, masked: bool) -> Source {
        let [chunk, chunks] = chunks(head_dim);
        let forward = pass == Pass::Forward;
        let tiles = |file, tall: usize| {
            Source::file(file)
                .u32("HEAD", head_dim as u32 / 4)
                .u32("CHUNK", chunk as u32)
                .u32("CHUNKS", chunks as u32)
                .u32("TALL", tall as u32)
        };
        let source = match self {
            Kernel::Rows(Split { each, parts }) => {
                let file = if forward { "attention" } else { "attention_backward" };
                let each_name = if pass == Pass::Keys { "COLUMNS" } else { "ROWS" };
                Source::file(file)
                    .u32("HEAD_DIM", head_dim as u32)
                    .u32(each_name, each as u32)
                    .u32("PARTS", parts as u32)
                    .u32("SLOTS", 2 * each as u32)
                    .slot("parts", if parts == 1 { "parts_one" } else { "parts_many" })
            }
            Kernel::Tiled { tall } => {
                tiles(if forward { "attention_tiled" } else { "attention_tiled_backward" }, tall)
            }
            Kernel::Few { rows } => tiles("attention_few", rows),
            // A mask has done its part in what was kept.
            Kernel::Kept { tall } => return tiles("attention_queries", tall),
            Kernel::Coop(matrices) => matrices.source(pass, head_dim),
        };
        source.slot("mask", if masked { "mask_add" } else { "mask_none" })
    }

    /// Heads are padded to a multiple of this, so that every thread has whole vectors.
    pub fn multiple(self) -> usize {
        if let Kernel::Rows(split) = self { 4 * split.parts } else { 4 }
    }
}

/// The kernels of the three passes.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Kernels {
    pub forward: Kernel,
    pub queries: Kernel,
    pub keys: Kernel,
}

/// The sizes on which the choice depends: pairs of a batch entry and a key head, rows of queries and keys of each, and
/// elements of a head.
#[derive(Clone, Copy)]
pub(super) struct Choice {
    pub pairs: usize,
    pub rows: usize,
    pub keys: usize,
    pub head_dim: usize,
    /// Heads of queries for each key head.
    pub group: usize,
    /// Whether a mask is added to the scores.
    pub masked: bool,
}

/// Smaller heads leave most lanes of a tile idle.
const LEAST_HEAD: usize = 17;
/// 32-bit sums that a thread keeps, beside its scores.
const SUMS: usize = 64;
/// The most workgroup memory of a kernel with tiles. A multiprocessor has 64 to 228 KiB and should hold several
/// workgroups.
const MEMORY: usize = 32 << 10;

/// The most rows of queries for `attention_few`, a power of two: it has a vector of sums for each chunk of each row.
fn most_few(head_dim: usize) -> usize {
    let most = SUMS / 4 / chunks(head_dim)[1];
    1 << most.min(8).ilog2()
}

/// Bytes of workgroup memory of `attention_few`: queries, a chunk of 64 keys, scores, and what eight threads found.
fn few_memory(rows: usize, head_dim: usize) -> usize {
    16 * (rows * width(head_dim) + 64 * chunks(head_dim)[0]) + 4 * (64 * rows + 64)
}

impl Kernels {
    /// Kernels without tiles, by rows per thread and threads per row.
    pub const fn of_splits([forward, queries, keys]: [[usize; 2]; 3]) -> Kernels {
        const fn rows([each, parts]: [usize; 2]) -> Kernel {
            Kernel::Rows(Split { each, parts })
        }
        Kernels { forward: rows(forward), queries: rows(queries), keys: rows(keys) }
    }

    /// The choice for a device of this class.
    pub(super) fn of(class: &DeviceClass, choice: Choice) -> Kernels {
        let Choice { rows, keys, head_dim, .. } = choice;
        if class.has_many_registers() {
            return Kernels::for_cpu(rows, keys, head_dim);
        }
        // One row, or part of one, fills a GPU thread's registers.
        let by_rows = Kernels::of_splits(match head_dim {
            0..=32 => [[1, 1], [1, 1], [1, 1]],
            33..=64 => [[1, 1], [1, 1], [1, 2]],
            65..=128 => [[1, 2], [1, 2], [1, 4]],
            _ => [[1, 4], [1, 4], [1, 8]],
        });
        if class.tiles != Tiles::Workgroup || head_dim < LEAST_HEAD {
            return by_rows;
        }
        let own = |pass, items| tall(class, pass, choice, items).map(|tall| Kernel::Tiled { tall });
        let few = rows.max(1).next_power_of_two();
        let forward = if few <= most_few(head_dim)
            && few_memory(few, head_dim) <= MEMORY.min(class.workgroup_memory as usize)
        {
            Some(Kernel::Few { rows: few })
        } else {
            own(Pass::Forward, rows)
        };
        let keys = own(Pass::Keys, keys);
        let queries = keys.and_then(|_| kept(class, choice)).or(own(Pass::Queries, rows));
        Kernels {
            forward: forward.unwrap_or(by_rows.forward),
            queries: queries.unwrap_or(by_rows.queries),
            keys: keys.unwrap_or(by_rows.keys),
        }
    }

    /// On a CPU driver a load costs far more than spilled registers, so threads have many rows. Even more rows would
    /// take long to compile. For short sequences threads have fewer rows, because some lanes would have none.
    fn for_cpu(rows: usize, keys: usize, head_dim: usize) -> Kernels {
        let (forward, backward, parts) = match head_dim {
            0..=64 => (8, 4, 1),
            65..=128 => (4, 2, 2),
            _ => (4, 2, 4),
        };
        let each = |most: usize, items: usize| most.min((items / 8).max(1).next_power_of_two());
        Kernels::of_splits([
            [each(forward, rows), parts],
            [each(backward, rows), parts],
            [each(backward, keys), parts],
        ])
    }

    /// The source of the entry `delta`, which is the same for all kernels with operands of one type.
    pub fn delta(self, head_dim: usize) -> Source {
        let kernel = match self.queries {
            Kernel::Coop(_) => self.queries,
            _ => Kernel::Rows(Split { each: 1, parts: 1 }),
        };
        kernel.source(Pass::Queries, head_dim, false)
    }

    /// Heads are padded to a multiple of this.
    pub fn multiple(self) -> usize {
        self.forward.multiple().max(self.queries.multiple()).max(self.keys.multiple())
    }
}

/// Bytes of what the pass of the keys keeps of one pair, whose `group` heads have these queries each.
pub(super) fn kept_bytes(keys: usize, queries: usize, group: usize) -> usize {
    16 * keys * group * queries.div_ceil(4)
}

/// The kernel that reads what the pass of the keys, one with tiles, has kept, if keeping it takes less time than computing
/// it again.
fn kept(class: &DeviceClass, choice: Choice) -> Option<Kernel> {
    let Choice { rows, keys, head_dim, group, masked, .. } = choice;
    // Of each score: two products, at half of the rate, against 4 bytes written and read.
    let [again, moved] = [8.0 * head_dim as f64 / class.flops_s, 8.0 / class.bytes_s];
    let tall = if width(head_dim) <= 16 { 2 } else { 1 };
    let kernel = Kernel::Kept { tall };
    let fits = kept_bytes(keys, rows / group, group) <= class.chunk as usize
        && 512 * (8 * tall + width(head_dim)) <= MEMORY.min(class.workgroup_memory as usize)
        && keys <= kernel.most(Pass::Queries, head_dim);
    let few_registers = width(head_dim) <= 32;
    // With a mask, the pass of the keys would bind a ninth buffer.
    (fits && !masked && few_registers && again > moved).then_some(kernel)
}

/// Rows per thread of a kernel with tiles: as many as registers and workgroup memory hold, as long as there are enough
/// workgroups to fill the device. `None` if the device has too little memory for one row.
fn tall(class: &DeviceClass, pass: Pass, choice: Choice, items: usize) -> Option<usize> {
    let width = width(choice.head_dim);
    // The arrays of own rows, and the results of a row: y or dq, or both dk and dv.
    let (most, own, results) = match pass {
        Pass::Forward => (8, 1, 1),
        Pass::Queries => (8, 2, 1),
        Pass::Keys => (4, 2, 2),
    };
    // Bytes of own rows, of a chunk of the tile, and of what the threads of a row exchange.
    let memory = |tall: usize| 16 * (own * 8 * tall * width + 32 * chunks(choice.head_dim)[0] + 64 * tall);
    let there = MEMORY.min(class.workgroup_memory as usize);
    let sums = |tall: usize| results * tall * width / 2;
    // A single row is taken whatever its sums.
    let fits = |tall: usize| memory(tall) <= there && (tall == 1 || sums(tall) <= SUMS && 4 * tall < items);
    // Three workgroups on each multiprocessor.
    let fills = |tall: usize| choice.pairs * items.div_ceil(8 * tall) >= 3 * class.width as usize;
    let all = || [8, 4, 2, 1].into_iter().filter(|&tall| tall <= most && fits(tall));
    all().find(|&tall| fills(tall)).or_else(|| all().next_back())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is kept needs a pass of the keys with tiles, and memory, also on adapters with the least that there is.
    #[test]
    fn slopes_are_kept_only_by_tiles_that_fit() {
        for class in DeviceClass::all() {
            for workgroup_memory in [16 << 10, 32 << 10] {
                let class = DeviceClass { workgroup_memory, ..class.clone() };
                for head_dim in [20, 64, 65, 128, 256] {
                    let choice =
                        Choice { pairs: 64, rows: 512, keys: 512, head_dim, group: 2, masked: false };
                    let kernels = Kernels::of(&class, choice);
                    let Kernel::Kept { tall } = kernels.queries else { continue };
                    assert!(matches!(kernels.keys, Kernel::Tiled { .. }), "{head_dim} on {}", class.name);
                    let memory = 16 * (32 * 8 * tall + 32 * width(head_dim));
                    assert!(memory <= workgroup_memory as usize, "{head_dim} on {}: {memory}", class.name);
                }
            }
        }
    }
}
