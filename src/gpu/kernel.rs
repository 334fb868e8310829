//! Launches: what an op states about a dispatch. This is the kernel, bindings and parameters by name, the grid and the
//! cost.

use super::Gpu;
use super::buffer::Buffer;
use super::shader::{Name, Source};
use crate::dtype::DType;
use crate::error::Error;
use naga::ScalarKind;
use std::any::Any;
use std::sync::Arc;

/// Part of a buffer that a kernel reads or writes. A tensor converts to the part that holds its elements.
#[derive(Clone)]
pub struct Part {
    pub(crate) buffer: Arc<Buffer>,
    /// In bytes.
    pub(crate) offset: u64,
    /// In bytes.
    pub(crate) size: u64,
    /// The type of the elements, for those of a tensor.
    pub(crate) dtype: Option<DType>,
}

impl Part {
    /// The first `size` bytes of a buffer.
    pub(crate) fn first(buffer: &Arc<Buffer>, size: u64) -> Part {
        Part { buffer: buffer.clone(), offset: 0, size, dtype: None }
    }

    /// All of a buffer.
    pub(crate) fn whole(buffer: &Arc<Buffer>) -> Part {
        Part::first(buffer, buffer.size)
    }
}

/// A part of a buffer, with its name in the kernel.
#[derive(Clone)]
pub(crate) struct Bind {
    pub name: Name,
    pub part: Part,
    pub write: bool,
}

/// The value of a parameter: up to four 32-bit numbers of one kind. `u32`, `i32`, `f32`, `bool` (as 0 or 1), `usize` and
/// arrays of `u32` and `usize` convert to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Param {
    pub(crate) kind: ScalarKind,
    pub(crate) words: [u32; 4],
    pub(crate) count: usize,
    /// A size above 32 bits, which cannot be passed to a kernel.
    too_large: Option<u64>,
}

impl Param {
    fn of<const N: usize>(kind: ScalarKind, words: [u32; N]) -> Param {
        let words = std::array::from_fn(|i| words.get(i).copied().unwrap_or(0));
        Param { kind, words, count: N, too_large: None }
    }
}

impl From<u32> for Param {
    fn from(x: u32) -> Param {
        Param::of(ScalarKind::Uint, [x])
    }
}

impl From<i32> for Param {
    fn from(x: i32) -> Param {
        Param::of(ScalarKind::Sint, [x as u32])
    }
}

impl From<f32> for Param {
    fn from(x: f32) -> Param {
        Param::of(ScalarKind::Float, [x.to_bits()])
    }
}

/// As 0 or 1, because WGSL does not share booleans between host and device.
impl From<bool> for Param {
    fn from(x: bool) -> Param {
        Param::from(x as u32)
    }
}

impl From<usize> for Param {
    fn from(x: usize) -> Param {
        Param::from([x])
    }
}

impl<const N: usize> From<[u32; N]> for Param {
    fn from(x: [u32; N]) -> Param {
        Param::of(ScalarKind::Uint, x)
    }
}

impl<const N: usize> From<[usize; N]> for Param {
    fn from(x: [usize; N]) -> Param {
        let too_large = x.iter().map(|&x| x as u64).find(|&x| x > u32::MAX as u64);
        Param { too_large, ..Param::from(x.map(|x| x as u32)) }
    }
}

/// Computes the values of a kernel's parameters from the step's current rates.
pub(crate) type Numbers = Arc<dyn Fn(&[f32]) -> Vec<(&'static str, f32)> + Send + Sync>;

/// The parameters of a kernel that change from one replay of a recorded step to the next.
#[derive(Clone)]
pub(crate) enum Live {
    /// `key` and `stream`, which identify a random stream of the generator.
    Stream { generator: u64 },
    /// The parameters that this function computes.
    Numbers(Numbers),
}

/// The most turns that all loops of one thread may make together. Each loop takes one more turn to end, and a turn that
/// may `continue` counts double. The few turns of a reduction tree at the end are not counted. Mesa's software driver
/// up to 22.3, the version of Debian 12, silently ends a thread's loops after 65 535 turns in all. Plans divide longer
/// walks into several dispatches on every adapter, so that results have the same bits everywhere and fewer kernels meet
/// a driver's watchdog. A launch with more turns fails with an error.
pub(crate) const MOST_TURNS: usize = 60_000;

/// One dispatch: the kernel, its bindings and parameters by name, and the grid. Every launch states the turns of its loops.
///
/// The names are those of the WGSL, which alone says binding numbers and types. A launch with a name that the kernel lacks,
/// without one that it has, or with a parameter of another type fails with an error that lists what the kernel has. The
/// kernel's parameters are the members of one struct, `var<immediate> p: Params;`, of at most 64 bytes. A member `groups_x:
/// u32` is the grid's width and needs no [`set`](Launch::set).
#[must_use = "a launch does nothing until Gpu::launch"]
pub struct Launch<'a> {
    pub(crate) op: &'a str,
    pub(crate) source: &'a Source,
    pub(crate) entry: &'a str,
    pub(crate) binds: Vec<Bind>,
    pub(crate) params: Vec<(Name, Param)>,
    pub(crate) grid: [u32; 3],
    /// The most turns that the loops of a thread make, up to [`MOST_TURNS`].
    pub(crate) turns: Option<usize>,
    /// Roughly how often each element of an operand is loaded. 0 means that most of a large operand is not loaded.
    pub(crate) reuse: u32,
    /// What it computes, apart from moving its operands.
    pub(crate) work: Work,
    /// The parameters that change when a recorded step is replayed.
    pub(crate) live: Option<Live>,
    /// The values that a kernel from outside writes, which nobody else may hold.
    pub(crate) outputs: Vec<Arc<dyn Any + Send + Sync>>,
}

/// What a dispatch computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Floating-point operations, if they may take longer than moving the operands, else 0.
    pub(crate) flops: f64,
    /// Parts of a summed axis, which a later pass joins.
    pub(crate) parts: usize,
}

impl Work {
    /// Work that takes no longer than moving the operands.
    pub(crate) const MOVES: Work = Work { flops: 0.0, parts: 1 };

    /// This many operations, with complete results that no later pass joins.
    pub fn flops(flops: f64) -> Work {
        Work { flops, parts: 1 }
    }
}

impl<'a> Launch<'a> {
    /// A dispatch of `grid` workgroups of the kernel's `entry`, on behalf of `op`.
    pub fn new(op: &'a str, source: &'a Source, entry: &'a str, grid: [u32; 3]) -> Launch<'a> {
        let (binds, params) = (Vec::with_capacity(8), Vec::with_capacity(16));
        Launch {
            op,
            source,
            entry,
            binds,
            params,
            grid,
            turns: None,
            reuse: 1,
            work: Work::MOVES,
            live: None,
            outputs: Vec::new(),
        }
    }

    fn bound(mut self, name: Name, part: Part, write: bool) -> Self {
        self.binds.push(Bind { name, part, write });
        self
    }

    /// Binds what the kernel reads as `name`: for a tensor `&x`, its elements in row-major order. f32, u32 and i32 are arrays
    /// of these types or of vectors of them, and two elements of 16 bits share a u32. A kernel of your own text must have the
    /// tensor's type there. The array is padded to 16 bytes, so its length is no element
    /// count.
    ///
    /// # Panics
    /// When a tensor is strided or begins inside of another: call [`contiguous`](crate::Tensor::contiguous) first.
    #[track_caller]
    pub fn bind(self, name: impl Into<Name>, part: impl Into<Part>) -> Self {
        self.bound(name.into(), part.into(), false)
    }

    /// Binds `part` if there is one. The kernel then has imported a fragment that reads it.
    pub(crate) fn bind_some(self, name: &'static str, part: Option<impl Into<Part>>) -> Self {
        match part {
            Some(part) => self.bind(name, part),
            None => self,
        }
    }

    /// Binds what the kernel writes as `name`.
    pub(crate) fn bind_mut(self, name: impl Into<Name>, part: impl Into<Part>) -> Self {
        self.bound(name.into(), part.into(), true)
    }

    /// Sets a member of the kernel's parameters `p`.
    pub fn set(mut self, name: impl Into<Name>, value: impl Into<Param>) -> Self {
        self.params.push((name.into(), value.into()));
        self
    }

    /// States the most turns that the loops of a thread make: 0 for a kernel without loops, and one more for each loop to
    /// end. A launch of more than 60 000 turns fails, because some drivers silently end a thread's loops after 65 535. Divide
    /// a longer walk into several dispatches.
    pub fn turns(self, turns: usize) -> Self {
        Launch { turns: Some(turns), ..self }
    }

    /// States how often each element of an operand is loaded. The default is once.
    pub(crate) fn reuse(self, reuse: u32) -> Self {
        Launch { reuse, ..self }
    }

    /// States what it computes apart from moving its operands, for the estimate of its time by which work is handed to the
    /// device. The default is a few operations per turn.
    pub fn work(self, work: Work) -> Self {
        Launch { work, ..self }
    }

    /// States which parameters change when a recorded step is replayed. The default is none.
    pub(crate) fn live(self, live: Live) -> Self {
        Launch { live: Some(live), ..self }
    }

    /// Bytes of its operands and results, each counted once. If most of an operand is not loaded (`reuse` is 0), the
    /// operands count for no more than the results.
    pub(crate) fn bytes(&self) -> f64 {
        let of = |write: bool| -> f64 {
            self.binds.iter().filter(|bind| bind.write == write).map(|bind| bind.part.size as f64).sum()
        };
        let (read, written) = (of(false), of(true));
        written + if self.reuse == 0 { read.min(written) } else { read }
    }

    /// Estimated seconds on this device.
    pub(super) fn seconds(&self, gpu: &Gpu) -> f64 {
        // For an op that does not state its work: operations per turn of a workgroup, as 4 for each of 64 threads.
        const EACH: f64 = 4.0 * 64.0;
        let groups: f64 = self.grid.iter().map(|&n| n as f64).product();
        let turns = self.turns.unwrap_or(0) as f64;
        let flops = if self.work.flops > 0.0 { self.work.flops } else { EACH * turns * groups };
        gpu.class().seconds(self.bytes(), flops)
    }

    /// The buffers that it writes.
    pub(super) fn written(&self) -> impl Iterator<Item = &Arc<Buffer>> {
        self.binds.iter().filter(|bind| bind.write).map(|bind| &bind.part.buffer)
    }

    /// Returns a parameter above 32 bits, with its value.
    pub(super) fn too_large(&self) -> Option<(&str, u64)> {
        self.params.iter().find_map(|(name, param)| param.too_large.map(|size| (&**name, size)))
    }

    /// Marks its results with the error.
    pub(super) fn fail(&self, error: &Error) {
        self.written().filter(|buffer| !buffer.is_spared()).for_each(|buffer| buffer.fail(error));
    }
}

/// Arranges at least `groups` workgroups as a grid within the 65535 per axis that every adapter has. `x` is the fastest
/// axis, so a workgroup's number is `group.y * p.groups_x + group.x`. There may be more workgroups than asked for: a kernel
/// compares its number with a count.
///
/// ```
/// use tiebeam::op::grid;
/// assert_eq!(grid(1000), [1000, 1, 1]);
/// assert_eq!(grid(100_000), [50_000, 2, 1]);
/// ```
pub fn grid(groups: usize) -> [u32; 3] {
    const MOST: usize = 65535;
    if groups <= MOST {
        return [groups as u32, 1, 1];
    }
    let y = groups.div_ceil(MOST);
    [groups.div_ceil(y) as u32, y as u32, 1]
}
