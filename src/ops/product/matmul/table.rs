//! The choice among the kernels of products without measurements: what takes the least time by count on a GPU
//! (`cost.rs`), and what CPU drivers were seen to be fast with.

use super::core::{Coop, Core, FEWEST_LANES, MOST_GROUPS, Problem, tiled};
use crate::dtype::DType;
use crate::gpu::shader::Source;
use crate::gpu::{DeviceClass, Tiles};

/// A product with a side up to this size is limited by reading the other operand.
pub(super) const THIN: usize = 8;
/// Multiply-adds from which a product on a CPU driver is worth source code that takes long to compile.
const LARGE: usize = 1 << 21;
/// Number of lanes that lie side by side in `matmul_direct` on CPU drivers.
const DIRECT_LANES: usize = 32;

/// Tiles from large to small. Both sides have a multiple of eight threads.
const TILES: [Core; 4] =
    [tiled([128, 128], [8, 8]), tiled([128, 64], [8, 8]), tiled([64, 64], [8, 4]), tiled([32, 32], [4, 4])];

impl Core {
    /// The choice without measurements. It takes no time, and is the same every time.
    pub fn by_table(class: &DeviceClass, problem: &Problem) -> Core {
        let Problem { m, n, k, .. } = *problem;
        let packed = packed(class, problem);
        if problem.right == "rhs_packed"
            && problem.left == "lhs_plain"
            && m <= THIN
            && fits_grid(&packed, problem)
        {
            return packed;
        }
        if class.tiles == Tiles::Registers {
            return direct(m, n, k);
        }
        if m.min(n) <= THIN && fits_grid(&thin(problem), problem) {
            return thin(problem);
        }
        let coops = problem.coop.map_or(vec![], |size| coop(class, size));
        let tiles = if coops.is_empty() { &TILES[..] } else { &coops[..] };
        // The largest tile that takes little more than the least time: it reads operands less often.
        let seconds =
            |core: &Core| if fits_grid(core, problem) { core.seconds(class, problem) } else { f64::INFINITY };
        let least = tiles.iter().map(seconds).fold(f64::INFINITY, f64::min);
        tiles.iter().copied().find(|core| seconds(core) <= 1.03 * least).unwrap_or(tiles[0])
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

/// The kernels for matrix units, with every fragment that a layer may use. The test of the list of variants needs
/// them from here, because the adapters that it is recorded on have no matrix units.
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
    let problem = Problem {
        m: 128,
        n: 128,
        k: 128,
        batch: 1,
        left: "",
        right: "",
        dtype: DType::F16,
        coop: None,
        bits: None,
    };
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
            for site in ["site_tied", "site_packed"] {
                all.extend(rights[3..].iter().map(|right| of(left, right).slot("site", site)));
            }
            all.extend(stores.map(|store| half(of(left, right)).slot("store", store)));
            // Results of a scope of f16.
            let narrow = |source: Source| source.slot("pieces", "pieces_of_4").slot("out", "out_f16");
            all.extend(
                stores[..6]
                    .iter()
                    .map(|store| narrow(half(of(left, right)).slot("store", *store)).slot("packed", "f16")),
            );
            for store in ["store_plain", "store_accumulate"] {
                let source = half(of(left, right)).slot("store", store).bool("EDGES", false);
                all.push(core.with_store(&class, source, &problem, (store, false)));
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
    let least = Coop { tile: [2 * least; 2], depth: least, part: [least; 2], ..large };
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

/// The kernel for a few rows and a packed weight. On GPUs, lanes share the inner axis, so that what they read lies side by
/// side. CPU drivers compute lanes in vectors, and need no more of them than fill one.
fn packed(class: &DeviceClass, problem: &Problem) -> Core {
    let rows = problem.m.next_power_of_two().min(4);
    if class.tiles == Tiles::Registers {
        return Core::Packed { wide: 16, deep: 1, thread: [rows, 8] };
    }
    let deep = 1 << (problem.k / 32).clamp(1, 64).ilog2();
    Core::Packed { wide: 64 / deep, deep, thread: [rows, 4] }
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
