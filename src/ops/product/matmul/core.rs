//! The kernels of products, and the problems among which they are chosen.

use crate::dtype::DType;
use crate::gpu::kernel::MOST_TURNS;
use crate::gpu::shader::Source;
use crate::gpu::{DeviceClass, Gpu};
use std::fmt;

/// A kernel and its constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Core {
    /// `matmul_direct`: no workgroup memory. Lanes along rows (`high`), columns (`wide`) and the inner axis (`deep`);
    /// rows and columns per thread.
    Direct { high: usize, wide: usize, deep: usize, thread: [usize; 2] },
    /// `matmul`: tiles in workgroup memory; rows and columns per thread.
    Tiled { tile: [usize; 2], thread: [usize; 2] },
    /// `matmul_coop`: cooperative matrices.
    Coop(Coop),
    /// `matmul_packed`: a few rows and a packed weight. Lanes along columns (`wide`) and the inner axis (`deep`); rows and
    /// columns per thread.
    Packed { wide: usize, deep: usize, thread: [usize; 2] },
}

/// The constants of `matmul_coop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Coop {
    /// Rows and columns of a matrix.
    pub size: usize,
    /// Rows and columns per workgroup, and the depth of a step along the inner axis.
    pub tile: [usize; 2],
    pub depth: usize,
    /// Rows and columns per subgroup.
    pub part: [usize; 2],
    /// Tiles that are in workgroup memory in turn.
    pub stages: usize,
    /// Whether tiles are kept in vectors of four elements. Metal loads matrices from single elements only.
    pub words: bool,
}

impl Coop {
    fn subgroups(&self) -> [usize; 2] {
        [self.tile[0] / self.part[0], self.tile[1] / self.part[1]]
    }

    /// Bytes of workgroup memory: tiles in the longer of their two orientations, and a matrix of results per subgroup.
    pub(super) fn memory(&self) -> usize {
        const SKEW: usize = 8;
        let lines = |side: usize| (side * (self.depth + SKEW)).max(self.depth * (side + SKEW));
        let [high, wide] = self.subgroups();
        2 * self.stages * (lines(self.tile[0]) + lines(self.tile[1]))
            + 4 * high * wide * self.size * self.size
    }

    /// Whether the device has the threads and the workgroup memory.
    pub(super) fn fits(&self, class: &DeviceClass) -> bool {
        let threads = Core::Coop(*self).threads(class.lanes);
        threads <= MOST_THREADS && self.memory() <= class.workgroup_memory as usize
    }

    fn source(&self, lanes: u32) -> Source {
        let Coop { size, tile: [m, n], depth, stages, words, .. } = *self;
        let [high, wide] = self.subgroups();
        let constants = [
            ("SIZE", size),
            ("TILE_M", m),
            ("TILE_N", n),
            ("TILE_K", depth),
            ("HIGH", high),
            ("WIDE", wide),
            ("STAGES", stages),
            ("LANES", lanes as usize),
        ];
        let source = set("matmul_coop", &constants);
        source.slot("tile", if words { "coop_tile_words" } else { "coop_tile_elements" }).matrices(size)
    }
}

impl fmt::Display for Coop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Coop { size, tile: [m, n], depth, part: [pm, pn], stages, words } = self;
        let elements = if *words { "" } else { " elements" };
        write!(f, "coop{size} {m}x{n}x{depth} of {pm}x{pn}, {stages} in turn{elements}")
    }
}

impl fmt::Display for Core {
    /// The name in the file of measured choices.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Core::Direct { high, wide, deep, thread: [tm, tn] } => {
                write!(f, "direct {high}x{wide}x{deep} of {tm}x{tn}")
            }
            Core::Tiled { tile: [m, n], thread: [tm, tn] } => write!(f, "tiled {m}x{n} of {tm}x{tn}"),
            Core::Coop(coop) => coop.fmt(f),
            Core::Packed { wide, deep, thread: [tm, tn] } => write!(f, "packed {wide}x{deep} of {tm}x{tn}"),
        }
    }
}

/// The properties of a product on which the choice may depend.
#[derive(Clone, Copy)]
pub(crate) struct Problem {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub batch: usize,
    /// The fragments in the operands' slots.
    pub left: &'static str,
    pub right: &'static str,
    /// The operands' type: f16 if both are or may be rounded to it, bf16 if both are, and f32 otherwise.
    pub dtype: DType,
    /// The size of cooperative matrices, if the product may use them.
    pub coop: Option<usize>,
    /// Bits of an element of the right operand, if they are not those of its type.
    pub bits: Option<f64>,
}

impl Problem {
    /// The type of two operands. If the device `rounds`, f32 counts as f16. bf16 is never rounded to f16, which has not
    /// its range, and WGSL has no matrices of bf16: such products are computed in f32.
    pub fn operands(stored: [DType; 2], rounds: bool) -> DType {
        let as_f16 = |dtype| dtype == DType::F16 || rounds && dtype == DType::F32;
        match stored {
            [left, right] if as_f16(left) && as_f16(right) => DType::F16,
            [DType::Bf16, DType::Bf16] => DType::Bf16,
            _ => DType::F32,
        }
    }

    /// Returns the problem with the size of the matrix units. `coop` is called only if they would be used, as the first
    /// call on a device tests them.
    pub fn with(self, coop: impl FnOnce() -> Option<usize>) -> Problem {
        let large = self.dtype == DType::F16 && self.m.min(self.n) >= 64 && self.k >= 32;
        Problem { coop: if large { coop() } else { None }, ..self }
    }

    /// Returns the problem on this device.
    pub fn on(self, gpu: &Gpu) -> Problem {
        self.with(|| gpu.coop().map(|matrices| matrices.size as usize))
    }

    /// Bytes of the operands, each counted once.
    pub fn operand_bytes(&self) -> f64 {
        let size = self.dtype.size() as f64;
        let right = self.bits.map_or(size, |bits| bits / 8.0);
        self.batch as f64 * (size * (self.m * self.k) as f64 + right * (self.k * self.n) as f64)
    }

    /// Bytes of the result.
    pub fn result_bytes(&self) -> f64 {
        4.0 * self.batch as f64 * (self.m * self.n) as f64
    }

    /// Number of operations. A multiply-add counts as two.
    pub fn flops(&self) -> f64 {
        2.0 * self.batch as f64 * self.m as f64 * self.n as f64 * self.k as f64
    }

    /// How many dispatches it takes so that none is too long for a device of this class.
    pub fn launches(&self, class: &DeviceClass) -> usize {
        let seconds = class.seconds(self.operand_bytes(), self.flops());
        (seconds / DeviceClass::LONGEST).ceil().max(1.0) as usize
    }

    /// Name of the class of products that share a measured choice.
    pub fn key(&self) -> String {
        let [m, n, k, batch] = [self.m, self.n, self.k, self.batch].map(|v| v.max(1).next_power_of_two());
        format!("matmul {} {} {} {m}x{k}x{n} {batch}", self.dtype, self.left, self.right)
    }
}

/// Columns of a packed weight that `matmul_packed` reads at a time.
const UNIT: usize = 32;

/// The most workgroups along an axis that every adapter supports.
pub(super) const MOST_GROUPS: usize = 65535;

fn set(file: &'static str, constants: &[(&'static str, usize)]) -> Source {
    constants.iter().fold(Source::file(file), |s, (name, v)| s.u32(*name, *v as u32))
}

pub(super) const fn tiled(tile: [usize; 2], thread: [usize; 2]) -> Core {
    Core::Tiled { tile, thread }
}

/// The depth of a large and of a small tile in workgroup memory. Small tiles have little to compute in a step, so steps
/// are longer and fewer: what they wait for is the same.
const DEPTHS: [usize; 2] = [16, 32];

impl Core {
    /// Rows and columns per workgroup.
    pub fn tile(&self) -> [usize; 2] {
        match *self {
            Core::Direct { high, wide, thread: [tm, tn], .. } => [high * tm, wide * tn],
            Core::Tiled { tile, .. } | Core::Coop(Coop { tile, .. }) => tile,
            Core::Packed { wide, thread: [tm, tn], .. } => [tm, wide * tn],
        }
    }

    /// Steps of the inner axis that are loaded together.
    pub fn depth(&self) -> usize {
        match *self {
            Core::Direct { deep, .. } => 4 * deep,
            Core::Tiled { tile: [m, _], .. } => DEPTHS[(m < 128) as usize],
            Core::Coop(coop) => coop.depth,
            Core::Packed { deep, .. } => UNIT * deep,
        }
    }

    /// Blocks of 4 x 4 that each thread of a tiled kernel reads for a tile: FILLS in matmul.wgsl.
    pub fn fills(&self) -> usize {
        let [tm, tn] = self.tile();
        (self.depth() * (tm + tn) / 16).div_ceil(self.threads(0))
    }

    /// Threads per workgroup, for subgroups of at most `lanes`.
    pub fn threads(&self, lanes: u32) -> usize {
        match *self {
            Core::Direct { high, wide, deep, .. } => high * wide * deep,
            Core::Tiled { tile: [m, n], thread: [tm, tn] } => m / tm * (n / tn),
            Core::Coop(coop) => coop.subgroups().iter().product::<usize>() * lanes as usize,
            Core::Packed { wide, deep, .. } => wide * deep,
        }
    }

    /// Workgroups along columns, rows and batches.
    pub fn grid(&self, problem: &Problem) -> [usize; 3] {
        let [tm, tn] = self.tile();
        [problem.n.div_ceil(tn), problem.m.div_ceil(tm), problem.batch]
    }

    pub fn groups(&self, problem: &Problem) -> usize {
        self.grid(problem).iter().product()
    }

    /// The source of the kernel, for a device of this class.
    pub fn source(&self, class: &DeviceClass) -> Source {
        match *self {
            Core::Direct { high, wide, deep, thread: [tm, tn] } => {
                let constants =
                    [("THREAD_M", tm), ("THREAD_N", tn), ("WIDE", wide), ("HIGH", high), ("DEEP", deep)];
                let source = set("matmul_direct", &constants);
                if deep > 1 { source.slot("deep", "deep_many") } else { source }
            }
            Core::Tiled { tile: [m, n], thread: [tm, tn] } => {
                let depth = self.depth();
                let sizes = [("TILE_M", m), ("TILE_N", n), ("THREAD_M", tm), ("THREAD_N", tn)];
                let tiles = set("matmul", &sizes).u32("TILE_K", depth as u32);
                // Two tiles of each operand, in turn, where there is room for them.
                let room = 2 * 4 * depth * (m + n) <= class.workgroup_memory as usize;
                if room { tiles } else { tiles.u32("STAGES", 1) }
            }
            Core::Coop(coop) => coop.source(class.lanes),
            Core::Packed { wide, deep, thread: [tm, tn] } => {
                let constants = [("THREAD_M", tm), ("THREAD_N", tn), ("WIDE", wide), ("DEEP", deep)];
                let source = set("matmul_packed", &constants);
                if deep > 1 { source.slot("deep", "deep_many") } else { source }
            }
        }
    }

    /// Whether the kernel has this slot. A packed weight is read by the kernel made for it, in no other way.
    pub fn has_slot(&self, slot: &str) -> bool {
        !matches!(self, Core::Packed { .. }) || !matches!(slot, "rhs" | "rhs_word")
    }

    /// Returns the fragment that this kernel has for a slot, given the name of the one that the other kernels have.
    pub fn fragment(&self, name: &'static str) -> &'static str {
        match name {
            "rhs_packed" if matches!(self, Core::Coop(_)) => "coop_rhs_site_transposed",
            "rhs_packed" => "rhs_site_transposed",
            _ if !matches!(self, Core::Coop(_)) => name,
            "lhs_plain" => "coop_lhs_plain",
            "lhs_transposed" => "coop_lhs_transposed",
            "lhs_any" => "coop_lhs_any",
            "lhs_gathered" => "coop_lhs_gathered",
            "lhs_f16" => "lhs_half",
            "rhs_plain" => "coop_rhs_plain",
            "rhs_transposed" => "coop_rhs_transposed",
            "rhs_any" => "coop_rhs_any",
            "rhs_site" => "coop_rhs_site",
            "rhs_site_transposed" => "coop_rhs_site_transposed",
            "rhs_f16" => "rhs_half",
            _ => name,
        }
    }

    /// Returns the source for a launch with this store, whose rows may be scattered. Where every row has its own place and
    /// no epilogue needs the elements, the matrix units store to the result themselves. Emulated matrices do not: Mesa
    /// 26.2.6 loses most of what matrices of 8 store to a buffer.
    pub fn with_store(
        &self,
        class: &DeviceClass,
        source: Source,
        problem: &Problem,
        (store, scattered): (&str, bool),
    ) -> Source {
        let [tm, tn] = self.tile();
        let whole = problem.m.is_multiple_of(tm) && problem.n.is_multiple_of(tn);
        let whole = whole && !scattered && class.lanes >= FEWEST_LANES;
        let direct = match (self, store) {
            (Core::Coop(_), "store_plain") if whole => 1,
            (Core::Coop(_), "store_accumulate") if whole => 2,
            _ => return source,
        };
        // The result is then an array of single elements.
        source.u32("DIRECT", direct).slot("pieces", "pieces_of_1")
    }

    /// The longest inner axis of one launch, if each load of the right side takes `load` turns. It is limited by the
    /// turns that a thread may take, and by the number of 64-term sums that may be added up in a row. Longer products
    /// take several launches.
    pub fn longest(&self, load: usize) -> usize {
        const BLOCKS: usize = 256;
        // A loop in a load takes one more turn to end.
        let load = if load > 0 { load + 1 } else { 0 };
        // A number of steps along the inner axis, and the turns that a thread takes for them.
        let (steps, turns) = match *self {
            // Blocks add two turns to every sixteen.
            Core::Direct { deep, thread: [_, tn], .. } => (4 * deep, 2 + tn * load),
            Core::Tiled { .. } => {
                let quarter = self.depth() / 4;
                (4 * quarter, quarter + 2 + self.fills() * 4 * load)
            }
            // The matrix units sum 16 products before they round to f32, so this makes a chain of 128.
            Core::Coop(_) => return 2048,
            // The sum of a unit is added to those before, as that of a block is.
            Core::Packed { deep, .. } => (UNIT * deep, 1),
        };
        let deep = if let Core::Direct { deep, .. } | Core::Packed { deep, .. } = self { *deep } else { 1 };
        (MOST_TURNS / turns * steps).min(BLOCKS * 64 * deep) / 16 * 16
    }

    /// Whether a running sum over an inner axis of this length is cut into blocks.
    pub fn is_blocked(&self, k: usize) -> bool {
        match self {
            Core::Direct { deep, .. } => k > 64 * deep,
            Core::Tiled { .. } => k > 64,
            Core::Coop(_) | Core::Packed { .. } => false,
        }
    }

    /// Whether the sizes are multiples of the tile's, so that no load is out of range.
    pub fn fits(&self, problem: &Problem) -> bool {
        let [tm, tn] = self.tile();
        // The fragments read four steps of the inner axis at a time, and only tiles read past the end.
        let depth = if let Core::Direct { .. } = self { 16 } else { self.depth() };
        problem.m.is_multiple_of(tm) && problem.n.is_multiple_of(tn) && problem.k.is_multiple_of(depth)
    }
}

/// Fewer lanes than any matrix unit works with. Such an adapter is a CPU driver that emulates matrices, whatever class is
/// asked for. Each multiply becomes hundreds of instructions, and large tiles take minutes to compile.
pub(super) const FEWEST_LANES: u32 = 16;

/// Threads per workgroup that every adapter supports.
const MOST_THREADS: usize = 256;
