//! The kernels of products, and the choice among them.

use crate::gpu::kernel::MOST_TURNS;
use crate::gpu::shader::Source;
use crate::gpu::{DeviceClass, Gpu, Tiles};
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
    fn memory(&self) -> usize {
        const SKEW: usize = 8;
        let lines = |side: usize| (side * (self.depth + SKEW)).max(self.depth * (side + SKEW));
        let [high, wide] = self.subgroups();
        2 * self.stages * (lines(self.tile[0]) + lines(self.tile[1]))
            + 4 * high * wide * self.size * self.size
    }

    /// Whether the device has the threads and the workgroup memory.
    fn fits(&self, class: &DeviceClass) -> bool {
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
        let matrix = |of: &str| format!("coop_mat{size}x{size}<{of}>");
        set("matmul_coop", &constants)
            .alias("MatrixA", matrix("f16, A"))
            .alias("MatrixB", matrix("f16, B"))
            .alias("MatrixC", matrix("f32, C"))
            .slot("tile", if words { "coop_tile_words" } else { "coop_tile_elements" })
            .enable("f16")
            .enable("wgpu_cooperative_matrix")
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
    /// Whether the operands are f16, or may be rounded to it.
    pub half: bool,
    /// The size of cooperative matrices, if the product may use them.
    pub coop: Option<usize>,
}

impl Problem {
    /// Returns the problem with the size of the matrix units. `coop` is called only if they would be used, as the first
    /// call on a device tests them.
    pub fn with(self, coop: impl FnOnce() -> Option<usize>) -> Problem {
        let large = self.half && self.m.min(self.n) >= 64 && self.k >= 32;
        Problem { coop: if large { coop() } else { None }, ..self }
    }

    /// Returns the problem on this device.
    pub fn on(self, gpu: &Gpu) -> Problem {
        self.with(|| gpu.coop().map(|matrices| matrices.size as usize))
    }

    /// Bytes of the operands, each counted once.
    pub fn operand_bytes(&self) -> f64 {
        let size = if self.half { 2.0 } else { 4.0 };
        size * self.batch as f64 * (self.m * self.k + self.k * self.n) as f64
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
        let half = if self.half { "f16" } else { "f32" };
        format!("matmul {half} {} {} {m}x{k}x{n} {batch}", self.left, self.right)
    }
}

/// A product with a side up to this size is limited by reading the other operand.
const THIN: usize = 8;
/// The most workgroups along an axis that every adapter supports.
pub(super) const MOST_GROUPS: usize = 65535;
/// Multiply-adds from which a product on a CPU driver is worth source code that takes long to compile.
const LARGE: usize = 1 << 21;
/// Number of lanes that lie side by side in `matmul_direct` on CPU drivers.
const DIRECT_LANES: usize = 32;

fn set(file: &'static str, constants: &[(&'static str, usize)]) -> Source {
    constants.iter().fold(Source::file(file), |s, (name, v)| s.u32(*name, *v as u32))
}

/// The share of a device that must be busy. At seven eighths, no multiprocessor is idle.
pub(super) const FULL: f64 = 0.875;

pub(super) const fn tiled(tile: [usize; 2], thread: [usize; 2]) -> Core {
    Core::Tiled { tile, thread }
}

/// Tiles from large to small. Both sides have a multiple of eight threads.
const TILES: [Core; 4] =
    [tiled([128, 128], [8, 8]), tiled([128, 64], [8, 8]), tiled([64, 64], [8, 4]), tiled([32, 32], [4, 4])];

/// The depth of a large and of a small tile in workgroup memory. Small tiles have little to compute in a step, so steps
/// are longer and fewer: what they wait for is the same.
const DEPTHS: [usize; 2] = [16, 32];

impl Core {
    /// Rows and columns per workgroup.
    pub fn tile(&self) -> [usize; 2] {
        match *self {
            Core::Direct { high, wide, thread: [tm, tn], .. } => [high * tm, wide * tn],
            Core::Tiled { tile, .. } | Core::Coop(Coop { tile, .. }) => tile,
        }
    }

    /// Steps of the inner axis that are loaded together.
    pub fn depth(&self) -> usize {
        match *self {
            Core::Direct { deep, .. } => 4 * deep,
            Core::Tiled { tile: [m, _], .. } => DEPTHS[(m < 128) as usize],
            Core::Coop(coop) => coop.depth,
        }
    }

    /// Threads per workgroup, for subgroups of at most `lanes`.
    pub fn threads(&self, lanes: u32) -> usize {
        match *self {
            Core::Direct { high, wide, deep, .. } => high * wide * deep,
            Core::Tiled { tile: [m, n], thread: [tm, tn] } => m / tm * (n / tn),
            Core::Coop(coop) => coop.subgroups().iter().product::<usize>() * lanes as usize,
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
        }
    }

    /// Returns the fragment that this kernel has for a slot, given the name of the one that the other kernels have.
    pub fn fragment(&self, name: &'static str) -> &'static str {
        match name {
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

    /// Returns the source for a launch with this store. Where every row has its own place and no epilogue needs the
    /// elements, the matrix units store to the result themselves.
    pub fn with_store(&self, source: Source, problem: &Problem, store: &str, scattered: bool) -> Source {
        let [tm, tn] = self.tile();
        let whole = problem.m.is_multiple_of(tm) && problem.n.is_multiple_of(tn) && !scattered;
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
            Core::Tiled { tile: [tm, tn], .. } => {
                let quarter = self.depth() / 4;
                let fills = (quarter * (tm + tn) / 4).div_ceil(self.threads(0));
                (4 * quarter, quarter + 2 + fills * 4 * load)
            }
            // The matrix units sum 16 products before they round to f32, so this makes a chain of 128.
            Core::Coop(_) => return 2048,
        };
        let deep = if let Core::Direct { deep, .. } = self { *deep } else { 1 };
        (MOST_TURNS / turns * steps).min(BLOCKS * 64 * deep) / 16 * 16
    }

    /// Whether a running sum over an inner axis of this length is cut into blocks.
    pub fn is_blocked(&self, k: usize) -> bool {
        match self {
            Core::Direct { deep, .. } => k > 64 * deep,
            Core::Tiled { .. } => k > 64,
            Core::Coop(_) => false,
        }
    }

    /// Whether the sizes are multiples of the tile's, so that no load is out of range.
    pub fn fits(&self, problem: &Problem) -> bool {
        let [tm, tn] = self.tile();
        // The fragments read four steps of the inner axis at a time, and only tiles read past the end.
        let depth = if let Core::Direct { .. } = self { 16 } else { self.depth() };
        problem.m.is_multiple_of(tm) && problem.n.is_multiple_of(tn) && problem.k.is_multiple_of(depth)
    }

    /// The choice without measurements. It takes no time, and is the same every time.
    pub fn by_table(class: &DeviceClass, problem: &Problem) -> Core {
        let Problem { m, n, k, .. } = *problem;
        if class.tiles == Tiles::Registers {
            return direct(m, n, k);
        }
        if m.min(n) <= THIN && fits_grid(&thin(problem), problem) {
            return thin(problem);
        }
        let coops = problem.coop.map_or(vec![], |size| coop(class, size));
        let tiles = if coops.is_empty() { &TILES[..] } else { &coops[..] };
        // The largest tile that takes little more than the least time: it reads operands less often.
        let fitting = tiles.iter().copied().filter(|core| fits_grid(core, problem));
        let timed: Vec<(f64, Core)> = fitting.map(|core| (core.seconds(class, problem), core)).collect();
        let least = timed.iter().map(|(seconds, _)| *seconds).fold(f64::INFINITY, f64::min);
        let good = timed.iter().find(|(seconds, _)| *seconds <= 1.03 * least);
        good.map_or(tiles[0], |(_, core)| *core)
    }

    /// Every kernel worth measuring for this problem, with the table's choice first.
    pub fn candidates(class: &DeviceClass, problem: &Problem) -> Vec<Core> {
        let mut all = vec![Core::by_table(class, problem)];
        if class.tiles == Tiles::Registers {
            for wide in [4, 8, 32] {
                let high = DIRECT_LANES / wide;
                let threads = [[16, 16], [16, 8], [8, 16], [8, 8], [4, 16], [4, 8]];
                all.extend(threads.map(|thread| Core::Direct { high, wide, deep: 1, thread }));
            }
            all.extend(&TILES[2..]);
        } else {
            all.extend(TILES);
            all.push(tiled([64, 64], [8, 8]));
            all.push(thin(problem));
            all.push(Core::Direct { high: 4, wide: 16, deep: 1, thread: [8, 8] });
            // This fits the registers of a GPU's thread, unlike the large tiles for CPU drivers.
            all.push(Core::Direct { high: 4, wide: 16, deep: 1, thread: [4, 4] });
        }
        if let Some(size) = problem.coop {
            all.extend(coop_candidates(class, size));
        }
        // Tiles that would be mostly empty cannot win.
        let fits = |core: &Core| {
            let [tm, tn] = core.tile();
            fits_grid(core, problem)
                && tm < 4 * problem.m.next_multiple_of(4)
                && tn < 4 * problem.n.next_multiple_of(4)
        };
        let table = all[0];
        let mut kept = Vec::new();
        for core in all.into_iter().filter(|core| *core == table || fits(core)) {
            if !kept.contains(&core) {
                kept.push(core);
            }
        }
        kept
    }
}

/// The kernels for matrix units, with every fragment that a layer may use. The list of variants needs them from here,
/// because the adapters that it is recorded on have no matrix units.
#[doc(hidden)]
pub fn for_matrix_units() -> Vec<Source> {
    let stores = [
        "store_plain",
        "store_accumulate",
        "store_bias",
        "store_activation",
        "store_residual",
        "store_bias_residual",
        "store_bias_both",
        "store_slope",
    ];
    let mut all = Vec::new();
    let lefts = ["lhs_plain", "lhs_transposed", "lhs_any", "lhs_gathered"];
    let rights = ["rhs_plain", "rhs_transposed", "rhs_any", "rhs_site", "rhs_site_transposed"];
    let row = DeviceClass::named("nvidia").expect("a row of the table");
    let problem = Problem { m: 128, n: 128, k: 128, batch: 1, left: "", right: "", half: true, coop: None };
    for (size, workgroup_memory) in [(16, 48 << 10), (16, 32 << 10), (8, 32 << 10)] {
        let class = DeviceClass { workgroup_memory, ..row.clone() };
        let table = coop(&class, size);
        for core in coop_candidates(&class, size) {
            let of = |left: &'static str, right: &'static str| {
                core.source(&class).slot("lhs", core.fragment(left)).slot("rhs", core.fragment(right))
            };
            let half = |source: Source| source.slot("lhs_word", "lhs_half").slot("rhs_word", "rhs_half");
            let [left, right] = [lefts[0], rights[0]];
            let layouts = [[left, right], [left, rights[1]], [lefts[1], right]];
            all.extend(layouts.map(|[left, right]| half(of(left, right))));
            if !table.contains(&core) {
                continue;
            }
            all.extend(lefts[2..].iter().map(|left| of(left, right)));
            all.push(of(left, rights[2]));
            all.extend(rights[3..].iter().map(|right| of(left, right).slot("site", "site_tied")));
            all.extend(stores.map(|store| half(of(left, right)).slot("store", store)));
            for store in ["store_plain", "store_accumulate"] {
                let source = half(of(left, right)).slot("store", store).bool("EDGES", false);
                all.push(core.with_store(source, &problem, store, false));
            }
        }
    }
    all
}

/// Whether a launch has no more workgroups along an axis than every adapter supports.
fn fits_grid(core: &Core, problem: &Problem) -> bool {
    let [tm, tn] = core.tile();
    problem.m.div_ceil(tm).max(problem.n.div_ceil(tn)) <= MOST_GROUPS
}

/// Fewer lanes than any matrix unit works with. Such an adapter is a CPU driver that emulates matrices, whatever class is
/// asked for. Each multiply becomes hundreds of instructions, and large tiles take minutes to compile.
const FEWEST_LANES: u32 = 16;
/// Threads per workgroup that every adapter supports.
const MOST_THREADS: usize = 256;

/// The tiles of cooperative matrices from large to small, with two stages if these fit the workgroup memory. Empty if no
/// tile fits the device.
pub(super) fn coop(class: &DeviceClass, size: usize) -> Vec<Core> {
    // Only Metal has matrices of 8 on real matrix units.
    let words = size == 16;
    let lanes = class.lanes as usize;
    // A thread keeps 64 sums.
    let part = if lanes > 32 { [64, 64] } else { [64, 32] };
    let large = Coop { size, tile: [128, 128], depth: 32, part, stages: 2, words };
    let small = Coop { tile: [64, 64], depth: 64, part: [32, 32], ..large };
    let least = 2 * size;
    let least = Coop { tile: [2 * least; 2], depth: least, part: [least; 2], words: true, ..large };
    let tiles = if class.lanes < FEWEST_LANES { vec![least] } else { vec![large, small] };
    let stages = |tile: Coop| [tile, Coop { stages: 1, ..tile }].into_iter().find(|coop| coop.fits(class));
    tiles.into_iter().filter_map(stages).map(Core::Coop).collect()
}

/// Every kernel of cooperative matrices that is worth measuring, with the table's first.
fn coop_candidates(class: &DeviceClass, size: usize) -> Vec<Core> {
    let mut all = coop(class, size);
    for core in all.clone() {
        let Core::Coop(table) = core else { continue };
        let mut others = vec![Coop { stages: 1, ..table }];
        if class.lanes < FEWEST_LANES {
            others.push(Coop { words: false, ..table });
        } else if table.part == [64, 32] {
            // Fewer reads of workgroup memory, but these parts need nearly as many registers as a thread can have.
            others.push(Coop { part: [64; 2], ..table });
        }
        all.extend(others.into_iter().filter(|coop| *coop != table && coop.fits(class)).map(Core::Coop));
    }
    all
}

/// The kernel of a CPU driver, whose registers are wide: the largest thread tile that pads the matrix least. Lanes lie
/// along a row of `y`, but not past its end, and all of them do if there are few rows.
pub(super) fn direct(m: usize, n: usize, k: usize) -> Core {
    let wide = match m {
        0..=4 => 32,
        5..=8 => 16,
        // Measured: here, threads of 16 columns gain more than a longer row of lanes.
        _ if n <= 64 && m * n * k >= LARGE => n.div_ceil(16).next_power_of_two(),
        _ => n.div_ceil(4).next_power_of_two().min(8),
    };
    let high = DIRECT_LANES / wide;
    let thread = |size: usize, lanes: usize| {
        let padded = |t: usize| size.div_ceil(lanes * t) * lanes * t;
        // A tile of 16 by 16 is a quarter faster than 8 by 8, but takes four times as long to compile. Small products do
        // without.
        let most = if m * n * k < LARGE { 8 } else { 16 };
        [16, 12, 8, 4].into_iter().filter(|&t| t <= most).min_by_key(|&t| padded(t)).unwrap_or(4)
    };
    Core::Direct { high, wide, deep: 1, thread: [thread(m, high), thread(n, wide)] }
}

/// The kernel of a GPU for a product with a short side. The long operand is read once, so lanes lie along its contiguous
/// axis. If that is the inner axis, the lanes share it. If it is the long side, up to four lanes share the inner axis. A
/// lane along the inner axis takes two steps of four terms or more; if that axis is short, the remaining lanes take
/// further rows.
pub(super) fn thin(problem: &Problem) -> Core {
    let short = |size: usize| if size <= 4 { 4 } else { 8 };
    let deep = |most: usize| (problem.k / 8).next_power_of_two().min(most);
    if problem.m <= problem.n {
        let deep = match problem.right {
            "rhs_plain" | "rhs_site" => deep(4),
            _ => deep(64),
        };
        return Core::Direct { high: 1, wide: 64 / deep, deep, thread: [short(problem.m), 4] };
    }
    let deep = if problem.left == "lhs_transposed" { deep(4) } else { deep(64) };
    Core::Direct { high: 64 / deep, wide: 1, deep, thread: [4, short(problem.n)] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::plan::Pass;

    #[test]
    fn tiles_of_matrices_need_the_memory_that_is_counted() {
        for class in DeviceClass::all() {
            for (size, core) in
                [16, 8].into_iter().flat_map(|size| coop(&class, size).into_iter().map(move |c| (size, c)))
            {
                let Core::Coop(coop) = core else { panic!("{core}") };
                let most =
                    [["coop_lhs_plain", "coop_rhs_plain"], ["coop_lhs_transposed", "coop_rhs_transposed"]]
                        .map(|[lhs, rhs]| {
                            let source = core.source(&class).slot("lhs", lhs).slot("rhs", rhs);
                            let (op, entry, grid) = ("matmul".into(), "main".into(), [1; 3]);
                            Pass { op, source, entry, grid, parts: 1, bytes: 0.0, flops: 0.0 }
                                .workgroup_memory()
                                .unwrap()
                        });
                // Half of the words have the longer lines in either orientation.
                assert!(most.iter().all(|&bytes| bytes <= coop.memory()), "{size} {core}: {most:?}");
                assert!(coop.memory() <= class.workgroup_memory as usize, "{core} on {}", class.name);
            }
        }
    }
}
