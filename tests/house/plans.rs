//! The dispatches that ops will make on devices that are not present. Plans are pure functions of sizes and of the device's
//! class, so these tests need no device. `tiebeam bench --plan` prints the same for the device that is present.

mod rows;

use std::collections::BTreeSet;
use std::path::PathBuf;
use tiebeam::gpu::DeviceClass;
use tiebeam::gpu::plan::Pass;
use tiebeam::ops::moves::embedding_sum;
use tiebeam::ops::product::matmul;
use tiebeam::ops::product::matmul::plan::{ProductKind, Sizes};
use tiebeam::ops::reduction::{cross_entropy, norm, reduce, softmax};
use tiebeam::ops::sequence::attention;

/// Kernels of one pass over rows. A subgroup or a workgroup has a whole row, so few rows cannot fill a device.
const ROW_KERNELS: [&str; 4] =
    ["norm forward", "norm_rows forward", "softmax forward", "cross_entropy forward"];

/// Kernels that join parts to one result.
const JOIN: [&str; 5] = ["reduce", "reduce_rows", "reduce_columns", "attention_combine", "matmul_join"];

/// Kernels whose threads have tiles of independent sums.
const TILED: [&str; 7] = [
    "matmul",
    "matmul_coop",
    "attention_tiled",
    "attention_tiled_backward",
    "attention_queries",
    "attention_coop",
    "attention_coop_backward",
];

fn product(batch: usize, [m, k, n]: [usize; 3], turned: [bool; 2]) -> Sizes {
    Sizes { batch, m, n, k, turned, half: false, coop: None, kind: ProductKind::Tensors }
}

/// Returns the plan that a name in [`EXPECTED`] stands for.
fn plan(class: &DeviceClass, name: &str) -> Vec<Pass> {
    let (op, sizes) = name.rsplit_once(' ').expect("an op and its sizes");
    let sizes: Vec<usize> = sizes.split('x').map(|size| size.parse().expect("a size")).collect();
    let two = || [sizes[0], sizes[1]];
    let of_kind =
        |kind, sizes, turned| matmul::plan::plan(class, Sizes { kind, ..product(1, sizes, turned) });
    let of_attention = |coop| attention::plan(class, std::array::from_fn(|i| sizes[i]), coop);
    match (op, &sizes[..]) {
        ("matmul", &[m, k, n]) => matmul::plan::plan(class, product(1, [m, k, n], [false; 2])),
        // [batch, m, k, n]
        ("matmul", &[batch, m, k, n]) => matmul::plan::plan(class, product(batch, [m, k, n], [false; 2])),
        ("matmul f16", &[m, k, n]) => {
            let half = Sizes { half: true, coop: Some(16), ..product(1, [m, k, n], [false; 2]) };
            matmul::plan::plan(class, half)
        }
        // y = x W^T of [rows, in, out], and dW = dy^T x.
        ("linear", &[m, k, n]) => matmul::plan::plan(class, product(1, [m, k, n], [false, true])),
        ("gradient of a weight", &[m, k, n]) => {
            matmul::plan::plan(class, product(1, [m, k, n], [true, false]))
        }
        // Forward and backward of a layer whose weight is computed in the loads, and rows that are added at the places of a list.
        ("linear of a site", &[m, k, n]) => of_kind(ProductKind::Site, [m, k, n], [false, true]),
        // A layer whose weight is packed in 5 bits with its scales.
        ("linear of packed weights", &[m, k, n]) => of_kind(ProductKind::Packed(5), [m, k, n], [false, true]),
        ("gradient through a site", &[m, k, n]) => of_kind(ProductKind::Site, [m, k, n], [false; 2]),
        ("scattered linear", &[m, k, n]) => of_kind(ProductKind::Scattered, [m, k, n], [false, true]),
        // The sum over the middle axis.
        ("sum", &[outer, size, inner]) => reduce::plan(class, [outer, size, inner]),
        ("layer_norm", _) => norm::plan(class, two())[0].clone(),
        ("gradient of a norm's gain", _) => norm::plan(class, two())[1].clone(),
        ("cross_entropy", _) => cross_entropy::plan(class, two()),
        ("softmax", _) => softmax::plan_rows(class, two()),
        // [batch, heads, key heads, queries, keys, head]
        ("attention", _) => of_attention(None)[0].clone(),
        ("attention backward", _) => of_attention(None)[1].clone(),
        ("attention f16", _) => of_attention(Some(16)).concat(),
        // [rows, width, ids]
        ("gradient of an embedding", &[rows, width, ids]) => embedding_sum::plan(class, [rows, width, ids]),
        _ => panic!("{name}: no such op"),
    }
}

fn class(name: &str) -> DeviceClass {
    DeviceClass::named(name).expect("a row of the table")
}

/// The lines of a plan. One that is repeated, as for each chunk of the operands, is listed once with how often.
fn counted(passes: &[Pass]) -> Vec<String> {
    let mut all: Vec<(&Pass, usize)> = Vec::new();
    for pass in passes {
        match all.iter_mut().find(|(known, _)| *known == pass) {
            Some((_, count)) => *count += 1,
            None => all.push((pass, 1)),
        }
    }
    let line = |(pass, count): (&Pass, usize)| {
        if count > 1 { format!("{pass} ({count} times)") } else { pass.to_string() }
    };
    all.into_iter().map(line).collect()
}

#[test]
fn plans_are_as_expected() {
    let mut wrong = String::new();
    for (device, name, want) in expected() {
        let got = counted(&plan(&class(device), name));
        if got != *want {
            wrong += &format!("{device}, {name}:\n    {got:?}\n    expected {want:?}\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// The list of variants has the kernels for devices that no machine here has: those in the plans of all classes, and those for
/// matrix units.
#[test]
fn planned_kernels_are_in_the_list_of_variants() {
    let record = std::env::var_os("TIEBEAM_RECORD_VARIANTS").is_some();
    let classes = DeviceClass::all();
    let rows = expected().map(|(_, name, ..)| *name);
    let planned = rows.flat_map(|name| classes.iter().flat_map(move |class| plan(class, name)));
    let sources = planned.map(|pass| pass.source).chain(matmul::table::for_matrix_units());
    let sources = sources.chain(attention::for_matrix_units());
    let sources = sources.chain(tiebeam::bench::ceilings::for_matrix_units());
    let lines: BTreeSet<String> = sources.flat_map(|source| source.lines()).collect();
    let named = std::env::var_os("TIEBEAM_VARIANTS").filter(|_| record);
    let path =
        named.map_or_else(|| crate::support::folder::root().join("shaders/variants.txt"), PathBuf::from);
    let list = std::fs::read_to_string(&path).unwrap_or_default();
    let known: BTreeSet<&str> = list.lines().collect();
    let missing: Vec<&str> = lines.iter().map(String::as_str).filter(|line| !known.contains(line)).collect();
    if record {
        let all: BTreeSet<&str> = known.into_iter().chain(missing).collect();
        let text = all.into_iter().map(|line| format!("{line}\n")).collect::<String>();
        return std::fs::write(&path, text).expect("the list is writable");
    }
    assert!(
        missing.is_empty(),
        "not in shaders/variants.txt; run `make variants` or add:\n{}",
        missing.join("\n")
    );
}

/// Whether a dispatch keeps a device busy: it has two workgroups of 256 threads (or eight of 64) per multiprocessor, to within an
/// eighth. Fewer are enough if with 1.5 times as many, a workgroup would have less than 64 KiB of operands and less than a million operations.
///
/// A thread of a tiled product has 16 to 64 independent sums and its next operands under way, so four subgroups, one for each
/// scheduler of a multiprocessor, keep it busy. A thread of attention's tiles has as many sums, and thousands of operations between
/// two fills of a tile, during which the other workgroups of the multiprocessor compute. But multiprocessors must have equally many
/// workgroups to within an eighth.
fn is_full(class: &DeviceClass, pass: &Pass) -> bool {
    let groups = pass.workgroups() as f64;
    let threads = groups * pass.threads().expect("a kernel of the house") as f64;
    let little = pass.bytes / (1.5 * groups) < 65_536.0 && pass.flops / (1.5 * groups) < 1e6;
    let turns = (groups / class.width as f64).ceil();
    let even = groups >= 0.875 * turns * class.width as f64;
    let busy =
        if TILED.contains(&pass.source.name()) { 4.0 * 32.0 * class.width as f64 } else { f64::INFINITY };
    threads >= 0.875 * class.in_flight() as f64 || little || even && threads >= 0.875 * busy
}

/// Returns why a plan does not fill its device within the rules, if it does not.
fn fault(class: &DeviceClass, passes: &[Pass]) -> Option<String> {
    for (i, pass) in passes.iter().enumerate() {
        let kernel = format!("{} {}", pass.source.name(), pass.entry);
        if !is_full(class, pass) && !ROW_KERNELS.contains(&kernel.as_str()) {
            return Some(format!("{pass} leaves {} idle", class.name));
        }
        if pass.parts > 1 {
            // The pass that joins the parts reads the results of this one, and writes one result instead of `parts`.
            let joins = |next: &&Pass| JOIN.contains(&next.source.name());
            let parts = passes[i + 1..].iter().find(joins).expect("a pass that joins the parts").bytes;
            let share = parts * pass.parts as f64 / (pass.parts + 1) as f64;
            if 2.0 * share > pass.bytes - share {
                return Some(format!("{pass}: its parts cost {:.0} bytes", 2.0 * share));
            }
        }
    }
    None
}

#[test]
fn plans_fill_the_device() {
    let mut wrong = String::new();
    for (device, name, _) in expected() {
        let class = class(device);
        if let Some(why) = fault(&class, &plan(&class, name)) {
            wrong += &format!("{device}, {name}: {why}\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// Plans stay within the limits of every adapter: see `wgpu::Limits::default`.
#[test]
fn nothing_is_beyond_a_limit() {
    let sizes = [
        "matmul 1x1x1",
        "matmul 4000000x8x4",
        "matmul 4x8x4000000",
        "matmul 3x1000003x3",
        "sum 1x100000007x1",
        "sum 9000000x7x1",
        "sum 1x7x9000000",
        "layer_norm 9000000x8",
        "softmax 9000000x8",
        "attention 64x64x64x4096x4096x64",
        "attention backward 64x64x64x4096x4096x64",
        "attention 8x32x8x1x4096x256",
        "attention 2x4x4x8x4096x72",
        "attention 8x16x16x1024x1024x17",
        "attention 8x16x16x1024x1024x33",
        "attention 8x16x16x1024x1024x65",
        "attention 8x16x16x1024x1024x129",
        "attention 8x16x16x1024x1024x256",
        "attention backward 8x16x16x1024x1024x33",
        "attention backward 8x16x16x1024x1024x65",
        "attention backward 8x16x16x1024x1024x256",
        "gradient of an embedding 1000000x64x1000000",
    ];
    for class in DeviceClass::all() {
        for name in sizes.iter().copied().chain(expected().map(|(_, name, ..)| *name)) {
            let mut known = Vec::new();
            for pass in plan(&class, name) {
                // A plan may repeat a dispatch for each chunk of its operands.
                if known.contains(&pass) {
                    continue;
                }
                known.push(pass.clone());
                let threads = pass.threads().expect("a kernel of the house");
                let within =
                    pass.grid.iter().all(|&n| (1..=65535).contains(&n)) && (1..=256).contains(&threads);
                assert!(within, "{name} on {}: {pass}, grid {:?}", class.name, pass.grid);
                let memory = pass.workgroup_memory().expect("a kernel of the house");
                let room = memory <= class.workgroup_memory as usize;
                assert!(room, "{name} on {}: {pass}: {memory} bytes", class.name);
            }
        }
    }
}

/// A device, an op with its sizes, and the dispatches.
type Expected = (&'static str, &'static str, &'static [&'static str]);

/// All that is expected.
fn expected() -> impl Iterator<Item = &'static Expected> {
    EXPECTED.iter().chain(rows::ROWS)
}

/// The plans of products and of attention.
#[rustfmt::skip]
const EXPECTED: &[Expected] = &[
    ("h200", "matmul 256x256x256", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_K=32 TILE_M=32 TILE_N=32: 64 workgroups of 64, 786.4 kB, 33.6 MFLOP",
    ]),
    ("h200", "matmul 512x512x512", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_K=32 TILE_M=32 TILE_N=32: 256 workgroups of 64, 3.1 MB, 268.4 MFLOP",
    ]),
    ("h200", "matmul 1024x1024x1024", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 256 workgroups of 128, 12.6 MB, 2.1 GFLOP",
    ]),
    ("h200", "matmul 2048x768x768", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 384 workgroups of 128, 14.9 MB, 2.4 GFLOP",
    ]),
    ("h200", "matmul 32x128x64x128", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 128 workgroups of 128, 4.2 MB, 67.1 MFLOP",
    ]),
    ("h200", "matmul 1x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=4 THREAD_N=4 WIDE=16: 1024 workgroups of 64, 32 parts, 17.0 MB, 8.4 MFLOP",
        "matmul_join main DEEP=8: 64 workgroups of 64, 270.3 kB",
    ]),
    ("h200", "matmul 8x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=16: 1024 workgroups of 64, 32 parts, 18.9 MB, 67.1 MFLOP",
        "matmul_join main DEEP=8: 512 workgroups of 64, 2.2 MB",
    ]),
    ("h200", "matmul 2048x2048x8", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=4 THREAD_N=8 WIDE=1: 1536 workgroups of 64, 3 parts, 17.0 MB, 67.1 MFLOP",
        "matmul_join main: 64 workgroups of 64, 262.1 kB",
    ]),
    ("h200", "matmul 64x16384x64", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_K=32 TILE_M=32 TILE_N=32: 344 workgroups of 64, 86 parts, 9.8 MB, 134.2 MFLOP",
        "matmul_join main DEEP=16: 256 workgroups of 64, 1.4 MB",
    ]),
    ("h200", "matmul 2048x2048x2048", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=64: 512 workgroups of 128, 50.3 MB, 17.2 GFLOP",
    ]),
    ("h200", "matmul 4096x4096x4096", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=64: 2048 workgroups of 128, 201.3 MB, 137.4 GFLOP",
    ]),
    ("h200", "matmul f16 1024x1024x1024", &[
        "matmul_coop main HIGH=2 LANES=32 SIZE=16 STAGES=2 TILE_K=64 TILE_M=64 TILE_N=64 WIDE=2: 256 workgroups of 128, 8.4 MB, 2.1 GFLOP",
    ]),
    ("h200", "matmul f16 4096x4096x4096", &[
        "matmul_coop main HIGH=2 LANES=32 SIZE=16 STAGES=2 TILE_K=32 TILE_M=128 TILE_N=128 WIDE=4: 1024 workgroups of 256, 134.2 MB, 137.4 GFLOP",
    ]),
    ("h200", "linear 1x2048x2048", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=4 THREAD_N=4 WIDE=1: 1024 workgroups of 64, 2 parts, 16.8 MB, 8.4 MFLOP",
        "matmul_join main: 8 workgroups of 64, 24.6 kB",
    ]),
    ("h200", "linear 8192x768x3072", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=64: 3072 workgroups of 128, 135.3 MB, 38.7 GFLOP",
    ]),
    ("h200", "linear of packed weights 1x576x1536", &[
        "matmul_packed main DEEP=16 THREAD_M=1 THREAD_N=4 WIDE=4: 96 workgroups of 64, 561.4 kB, 1.8 MFLOP",
    ]),
    ("h200", "linear of packed weights 1x4096x4096", &[
        "matmul_packed main DEEP=64 THREAD_M=1 THREAD_N=4 WIDE=1: 1024 workgroups of 64, 10.5 MB, 33.6 MFLOP",
    ]),
    ("h200", "linear of packed weights 8x4096x14336", &[
        "matmul_packed main DEEP=64 THREAD_M=4 THREAD_N=4 WIDE=1: 7168 workgroups of 64, 37.3 MB, 939.5 MFLOP",
    ]),
    ("h200", "linear of packed weights 64x4096x4096", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 256 workgroups of 128, 4 parts, 15.7 MB, 2.1 GFLOP",
        "matmul_join main: 1024 workgroups of 64, 5.2 MB",
    ]),
    ("h200", "linear of a site 8x2048x2048", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=1: 1536 workgroups of 64, 3 parts, 17.0 MB, 67.1 MFLOP",
        "matmul_join main: 64 workgroups of 64, 262.1 kB",
    ]),
    ("h200", "linear of a site 64x2048x2048", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 256 workgroups of 128, 8 parts, 21.5 MB, 536.9 MFLOP",
        "matmul_join main DEEP=2: 1024 workgroups of 64, 4.7 MB",
    ]),
    ("h200", "gradient through a site 8x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=16: 1024 workgroups of 64, 32 parts, 18.9 MB, 67.1 MFLOP",
        "matmul_join main DEEP=8: 512 workgroups of 64, 2.2 MB",
    ]),
    ("h200", "gradient through a site 64x2048x2048", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 256 workgroups of 128, 8 parts, 21.5 MB, 536.9 MFLOP",
        "matmul_join main DEEP=2: 1024 workgroups of 64, 4.7 MB",
    ]),
    ("h200", "scattered linear 128x3072x768", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_K=32 TILE_M=32 TILE_N=32: 384 workgroups of 64, 4 parts, 12.6 MB, 604.0 MFLOP",
        "matmul_join main: 384 workgroups of 64, 2.0 MB",
    ]),
    ("h200", "scattered linear 2048x3072x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=64: 384 workgroups of 128, 2 parts, 47.2 MB, 9.7 GFLOP",
        "matmul_join main: 6144 workgroups of 64, 18.9 MB",
    ]),
    ("h200", "gradient of a weight 768x8192x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=64: 576 workgroups of 128, 8 parts, 69.2 MB, 9.7 GFLOP",
        "matmul_join main: 2304 workgroups of 64, 21.2 MB",
    ]),
    ("h200", "gradient of a weight 3072x8192x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=64: 1152 workgroups of 128, 4 parts, 163.6 MB, 38.7 GFLOP",
        "matmul_join main: 9216 workgroups of 64, 47.2 MB",
    ]),
    ("h200", "gradient of a weight 64x131072x64", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 256 workgroups of 128, 256 parts, 71.3 MB, 1.1 GFLOP",
        "matmul_join main DEEP=64: 1024 workgroups of 64, 4.2 MB",
    ]),
    ("h200", "gradient of a weight 64x131075x64", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 257 workgroups of 128, 257 parts, 71.3 MB, 1.1 GFLOP",
        "matmul_join main DEEP=64: 1024 workgroups of 64, 4.2 MB",
    ]),
    ("h200", "gradient of a weight 128x1001x512", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_K=32 TILE_M=32 TILE_N=32: 256 workgroups of 64, 4 parts, 3.6 MB, 131.2 MFLOP",
        "matmul_join main: 256 workgroups of 64, 1.3 MB",
    ]),
    ("h200", "attention 4x8x8x512x512x64", &[
        "attention_tiled forward CHUNK=16 CHUNKS=1 HEAD=16 TALL=4: 512 workgroups of 64, 16.8 MB, 2.1 GFLOP",
    ]),
    ("h200", "attention 8x16x16x1024x1024x64", &[
        "attention_tiled forward CHUNK=16 CHUNKS=1 HEAD=16 TALL=8: 2048 workgroups of 64, 134.7 MB, 34.4 GFLOP",
    ]),
    ("h200", "attention f16 8x16x16x1024x1024x64", &[
        "attention_coop forward DIM=64 HEAD=16 LANES=32 PART=16 SIZE=16: 2048 workgroups of 128, 67.4 MB, 34.4 GFLOP",
        "attention_coop_backward queries DIM=64 HEAD=16 LANES=32 PART=16 SIZE=16: 2048 workgroups of 128, 84.4 MB, 51.5 GFLOP",
        "attention_coop_backward keys DIM=64 HEAD=16 LANES=32 PART=16 SIZE=16: 2048 workgroups of 128, 101.2 MB, 68.7 GFLOP",
    ]),
    ("h200", "attention f16 4x12x4x512x1000x128", &[
        "attention_coop forward DIM=128 HEAD=32 LANES=32 PART=16 SIZE=16: 384 workgroups of 128, 20.8 MB, 12.6 GFLOP",
        "attention_coop_backward queries DIM=128 HEAD=32 LANES=32 PART=16 SIZE=16: 384 workgroups of 128, 27.2 MB, 18.9 GFLOP",
        "attention_coop_backward keys DIM=128 HEAD=32 LANES=32 PART=16 SIZE=16: 256 workgroups of 128, 29.1 MB, 25.2 GFLOP",
    ]),
    ("integrated", "attention f16 8x16x16x1024x1024x64", &[
        "attention_coop forward DIM=64 HEAD=16 LANES=32 PART=16 SIZE=16: 2048 workgroups of 128, 67.4 MB, 34.4 GFLOP",
        "attention_coop_backward queries DIM=64 HEAD=16 LANES=32 PART=16 SIZE=16: 2048 workgroups of 128, 84.4 MB, 51.5 GFLOP",
        "attention_coop_backward keys DIM=64 HEAD=16 LANES=32 PART=16 SIZE=16: 2048 workgroups of 128, 101.2 MB, 68.7 GFLOP",
    ]),
    ("h200", "attention 4x32x8x1x2048x64", &[
        "attention_few forward CHUNK=16 CHUNKS=1 HEAD=16 TALL=4: 1024 workgroups of 64, 32 parts, 34.7 MB, 67.1 MFLOP",
        "attention_combine main: 32 workgroups of 64, 1.1 MB",
    ]),
    ("h200", "attention backward 8x16x16x1024x1024x64", &[
        "attention_tiled_backward keys CHUNK=16 CHUNKS=1 HEAD=16 TALL=4: 1024 workgroups of 64, 184.8 MB, 17.2 GFLOP (4 times)",
        "attention_queries queries CHUNK=16 CHUNKS=1 HEAD=16 TALL=2: 512 workgroups of 64, 151.0 MB, 4.3 GFLOP (4 times)",
    ]),
    ("h200", "attention backward 4x8x8x512x512x64", &[
        "attention_tiled_backward keys CHUNK=16 CHUNKS=1 HEAD=16 TALL=4: 512 workgroups of 64, 58.9 MB, 4.3 GFLOP",
        "attention_queries queries CHUNK=16 CHUNKS=1 HEAD=16 TALL=2: 256 workgroups of 64, 41.9 MB, 1.1 GFLOP",
    ]),
    ("integrated", "matmul 256x256x256", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=64: 8 workgroups of 128, 786.4 kB, 33.6 MFLOP",
    ]),
    ("integrated", "matmul 512x512x512", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=128: 16 workgroups of 256, 3.1 MB, 268.4 MFLOP",
    ]),
    ("integrated", "matmul 1024x1024x1024", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=128: 64 workgroups of 256, 12.6 MB, 2.1 GFLOP",
    ]),
    ("integrated", "matmul 2048x768x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=128: 96 workgroups of 256, 14.9 MB, 2.4 GFLOP",
    ]),
    ("integrated", "matmul 32x128x64x128", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=128: 32 workgroups of 256, 4.2 MB, 67.1 MFLOP",
    ]),
    ("integrated", "matmul 1x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=4 THREAD_N=4 WIDE=16: 64 workgroups of 64, 2 parts, 16.8 MB, 8.4 MFLOP",
        "matmul_join main: 8 workgroups of 64, 24.6 kB",
    ]),
    ("integrated", "matmul 8x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=16: 64 workgroups of 64, 2 parts, 17.0 MB, 67.1 MFLOP",
        "matmul_join main: 64 workgroups of 64, 196.6 kB",
    ]),
    ("integrated", "matmul 2048x2048x8", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=4 THREAD_N=8 WIDE=1: 512 workgroups of 64, 16.9 MB, 67.1 MFLOP",
    ]),
    ("integrated", "matmul 64x16384x64", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 8 workgroups of 128, 8 parts, 8.5 MB, 134.2 MFLOP",
        "matmul_join main DEEP=2: 32 workgroups of 64, 147.5 kB",
    ]),
    ("integrated", "matmul 2048x2048x2048", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=128: 256 workgroups of 256, 50.3 MB, 17.2 GFLOP",
    ]),
    ("integrated", "matmul 4096x4096x4096", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=128: 1024 workgroups of 256, 201.3 MB, 137.4 GFLOP",
    ]),
    ("integrated", "linear 1x2048x2048", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=4 THREAD_N=4 WIDE=1: 512 workgroups of 64, 16.8 MB, 8.4 MFLOP",
    ]),
    ("integrated", "linear 8192x768x3072", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=128: 1536 workgroups of 256, 135.3 MB, 38.7 GFLOP",
    ]),
    ("integrated", "linear of packed weights 1x576x1536", &[
        "matmul_packed main DEEP=16 THREAD_M=1 THREAD_N=4 WIDE=4: 96 workgroups of 64, 561.4 kB, 1.8 MFLOP",
    ]),
    ("integrated", "linear of packed weights 1x4096x4096", &[
        "matmul_packed main DEEP=64 THREAD_M=1 THREAD_N=4 WIDE=1: 1024 workgroups of 64, 10.5 MB, 33.6 MFLOP",
    ]),
    ("integrated", "linear of packed weights 8x4096x14336", &[
        "matmul_packed main DEEP=64 THREAD_M=4 THREAD_N=4 WIDE=1: 7168 workgroups of 64, 37.3 MB, 939.5 MFLOP",
    ]),
    ("integrated", "linear of packed weights 64x4096x4096", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 64 workgroups of 128, 12.6 MB, 2.1 GFLOP",
    ]),
    ("integrated", "linear of a site 8x2048x2048", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=1: 512 workgroups of 64, 16.9 MB, 67.1 MFLOP",
    ]),
    ("integrated", "linear of a site 64x2048x2048", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 32 workgroups of 128, 17.8 MB, 536.9 MFLOP",
    ]),
    ("integrated", "gradient through a site 8x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=16: 64 workgroups of 64, 2 parts, 17.0 MB, 67.1 MFLOP",
        "matmul_join main: 64 workgroups of 64, 196.6 kB",
    ]),
    ("integrated", "gradient through a site 64x2048x2048", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 32 workgroups of 128, 17.8 MB, 536.9 MFLOP",
    ]),
    ("integrated", "scattered linear 128x3072x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=64: 24 workgroups of 128, 2 parts, 11.8 MB, 604.0 MFLOP",
        "matmul_join main: 384 workgroups of 64, 1.2 MB",
    ]),
    ("integrated", "scattered linear 2048x3072x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=128: 96 workgroups of 256, 40.9 MB, 9.7 GFLOP",
    ]),
    ("integrated", "gradient of a weight 768x8192x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=64: 72 workgroups of 128, 52.7 MB, 9.7 GFLOP",
    ]),
    ("integrated", "gradient of a weight 3072x8192x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=128: 144 workgroups of 256, 135.3 MB, 38.7 GFLOP",
    ]),
    ("integrated", "gradient of a weight 64x131072x64", &[
        "matmul main THREAD_M=8 THREAD_N=4 TILE_K=32 TILE_M=64 TILE_N=64: 8 workgroups of 128, 8 parts, 67.2 MB, 1.1 GFLOP",
        "matmul_join main DEEP=2: 32 workgroups of 64, 147.5 kB",
    ]),
    ("integrated", "gradient of a weight 128x1001x512", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_K=16 TILE_M=128 TILE_N=64: 8 workgroups of 128, 2.8 MB, 131.2 MFLOP",
    ]),
    ("integrated", "attention 4x8x8x512x512x64", &[
        "attention_tiled forward CHUNK=16 CHUNKS=1 HEAD=16 TALL=8: 256 workgroups of 64, 16.8 MB, 2.1 GFLOP",
    ]),
    ("integrated", "attention 8x16x16x1024x1024x64", &[
        "attention_tiled forward CHUNK=16 CHUNKS=1 HEAD=16 TALL=8: 2048 workgroups of 64, 134.7 MB, 34.4 GFLOP",
    ]),
    ("integrated", "attention 4x32x8x1x2048x64", &[
        "attention_few forward CHUNK=16 CHUNKS=1 HEAD=16 TALL=4: 64 workgroups of 64, 2 parts, 33.7 MB, 67.1 MFLOP",
        "attention_combine main: 32 workgroups of 64, 99.8 kB",
    ]),
    ("integrated", "attention backward 8x16x16x1024x1024x64", &[
        "attention_tiled_backward keys CHUNK=16 CHUNKS=1 HEAD=16 TALL=4: 256 workgroups of 64, 46.2 MB, 4.3 GFLOP (16 times)",
        "attention_queries queries CHUNK=16 CHUNKS=1 HEAD=16 TALL=2: 128 workgroups of 64, 37.7 MB, 1.1 GFLOP (16 times)",
    ]),
    ("integrated", "attention backward 4x8x8x512x512x64", &[
        "attention_tiled_backward keys CHUNK=16 CHUNKS=1 HEAD=16 TALL=4: 512 workgroups of 64, 58.9 MB, 4.3 GFLOP",
        "attention_queries queries CHUNK=16 CHUNKS=1 HEAD=16 TALL=2: 256 workgroups of 64, 41.9 MB, 1.1 GFLOP",
    ]),
    ("cpu", "matmul 256x256x256", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 8 workgroups of 32, 786.4 kB, 33.6 MFLOP",
    ]),
    ("cpu", "matmul 512x512x512", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 32 workgroups of 32, 3.1 MB, 268.4 MFLOP",
    ]),
    ("cpu", "matmul 1024x1024x1024", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 128 workgroups of 32, 12.6 MB, 2.1 GFLOP",
    ]),
    ("cpu", "matmul 2048x768x768", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 192 workgroups of 32, 14.9 MB, 2.4 GFLOP",
    ]),
    ("cpu", "matmul 32x128x64x128", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=8 THREAD_N=8 WIDE=8: 256 workgroups of 32, 4.2 MB, 67.1 MFLOP",
    ]),
    ("cpu", "matmul 1x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=1 THREAD_M=4 THREAD_N=16 WIDE=32: 8 workgroups of 32, 2 parts, 16.8 MB, 8.4 MFLOP",
        "matmul_join main: 8 workgroups of 64, 24.6 kB",
    ]),
    ("cpu", "matmul 8x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=2 THREAD_M=4 THREAD_N=16 WIDE=16: 8 workgroups of 32, 16.9 MB, 67.1 MFLOP",
    ]),
    ("cpu", "matmul 2048x2048x8", &[
        "matmul_direct main DEEP=1 HIGH=32 THREAD_M=16 THREAD_N=8 WIDE=1: 8 workgroups of 32, 2 parts, 17.0 MB, 67.1 MFLOP",
        "matmul_join main: 64 workgroups of 64, 196.6 kB",
    ]),
    ("cpu", "matmul 64x16384x64", &[
        "matmul_direct main DEEP=1 HIGH=8 THREAD_M=8 THREAD_N=16 WIDE=4: 8 workgroups of 32, 8 parts, 8.5 MB, 134.2 MFLOP",
        "matmul_join main: 16 workgroups of 64, 147.5 kB",
    ]),
    ("cpu", "matmul 2048x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 512 workgroups of 32, 50.3 MB, 17.2 GFLOP",
    ]),
    ("cpu", "matmul 4096x4096x4096", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 2048 workgroups of 32, 201.3 MB, 137.4 GFLOP",
    ]),
    ("cpu", "linear 1x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=1 THREAD_M=4 THREAD_N=16 WIDE=32: 8 workgroups of 32, 2 parts, 16.8 MB, 8.4 MFLOP",
        "matmul_join main: 8 workgroups of 64, 24.6 kB",
    ]),
    ("cpu", "linear 8192x768x3072", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 3072 workgroups of 32, 135.3 MB, 38.7 GFLOP",
    ]),
    ("cpu", "linear of packed weights 1x576x1536", &[
        "matmul_packed main DEEP=1 THREAD_M=1 THREAD_N=8 WIDE=16: 12 workgroups of 16, 561.4 kB, 1.8 MFLOP",
    ]),
    ("cpu", "linear of packed weights 1x4096x4096", &[
        "matmul_packed main DEEP=1 THREAD_M=1 THREAD_N=8 WIDE=16: 32 workgroups of 16, 10.5 MB, 33.6 MFLOP",
    ]),
    ("cpu", "linear of packed weights 8x4096x14336", &[
        "matmul_packed main DEEP=1 THREAD_M=4 THREAD_N=8 WIDE=16: 224 workgroups of 16, 37.3 MB, 939.5 MFLOP",
    ]),
    ("cpu", "linear of a site 8x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=2 THREAD_M=4 THREAD_N=16 WIDE=16: 8 workgroups of 32, 16.9 MB, 67.1 MFLOP",
    ]),
    ("cpu", "linear of a site 64x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 16 workgroups of 32, 17.8 MB, 536.9 MFLOP",
    ]),
    ("cpu", "gradient through a site 8x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=2 THREAD_M=4 THREAD_N=16 WIDE=16: 8 workgroups of 32, 16.9 MB, 67.1 MFLOP",
    ]),
    ("cpu", "gradient through a site 64x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 16 workgroups of 32, 17.8 MB, 536.9 MFLOP",
    ]),
    ("cpu", "scattered linear 128x3072x768", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 12 workgroups of 32, 11.4 MB, 604.0 MFLOP",
    ]),
    ("cpu", "scattered linear 2048x3072x768", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 192 workgroups of 32, 40.9 MB, 9.7 GFLOP",
    ]),
    ("cpu", "gradient of a weight 768x8192x768", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 72 workgroups of 32, 52.7 MB, 9.7 GFLOP",
    ]),
    ("cpu", "gradient of a weight 3072x8192x768", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 288 workgroups of 32, 135.3 MB, 38.7 GFLOP",
    ]),
    ("cpu", "gradient of a weight 64x131072x64", &[
        "matmul_direct main DEEP=1 HIGH=8 THREAD_M=8 THREAD_N=16 WIDE=4: 8 workgroups of 32, 8 parts, 67.2 MB, 1.1 GFLOP",
        "matmul_join main: 16 workgroups of 64, 147.5 kB",
    ]),
    ("cpu", "gradient of a weight 128x1001x512", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 8 workgroups of 32, 2.8 MB, 131.2 MFLOP",
    ]),
    ("cpu", "attention 4x8x8x512x512x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=8 SLOTS=16: 32 workgroups of 64, 16.8 MB, 2.1 GFLOP",
    ]),
    ("cpu", "attention 8x16x16x1024x1024x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=8 SLOTS=16: 256 workgroups of 64, 134.7 MB, 34.4 GFLOP",
    ]),
    ("cpu", "attention 4x32x8x1x2048x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 32 workgroups of 64, 2 parts, 33.7 MB, 67.1 MFLOP",
        "attention_combine main: 32 workgroups of 64, 99.8 kB",
    ]),
    ("cpu", "attention backward 8x16x16x1024x1024x64", &[
        "attention_backward queries HEAD_DIM=64 PARTS=1 ROWS=4 SLOTS=8: 512 workgroups of 64, 168.8 MB, 51.5 GFLOP",
        "attention_backward keys COLUMNS=4 HEAD_DIM=64 PARTS=1 SLOTS=8: 512 workgroups of 64, 202.4 MB, 68.7 GFLOP",
    ]),
    ("cpu", "attention backward 4x8x8x512x512x64", &[
        "attention_backward queries HEAD_DIM=64 PARTS=1 ROWS=4 SLOTS=8: 64 workgroups of 64, 21.1 MB, 3.2 GFLOP",
        "attention_backward keys COLUMNS=4 HEAD_DIM=64 PARTS=1 SLOTS=8: 64 workgroups of 64, 25.3 MB, 4.3 GFLOP",
    ]),
];
