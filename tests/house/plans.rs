//! The dispatches that ops will make on devices that are not present. Plans are pure functions of sizes and of the device's
//! class, so these tests need no device. `tiebeam bench --plan` prints the same for the device that is present.

use std::collections::BTreeSet;
use std::path::PathBuf;
use tiebeam::gpu::DeviceClass;
use tiebeam::gpu::plan::Pass;
use tiebeam::ops::moves::embedding;
use tiebeam::ops::product::matmul;
use tiebeam::ops::product::matmul::plan::{ProductKind, Sizes};
use tiebeam::ops::reduction::{norm, reduce, softmax};
use tiebeam::ops::sequence::attention;

/// Kernels of one pass over rows. A subgroup or a workgroup has a whole row, so few rows cannot fill a device.
const ROW_KERNELS: [&str; 2] = ["norm forward", "softmax forward"];

/// Kernels that join parts to one result.
const JOIN: [&str; 3] = ["reduce", "reduce_rows", "attention_combine"];

/// Marks rows whose kernels do not fill the device yet. Their numbers are those that really run.
const PARTLY: bool = true;
const FULL: bool = false;

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
    let of_attention = || attention::plan(class, std::array::from_fn(|i| sizes[i]));
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
        ("gradient through a site", &[m, k, n]) => of_kind(ProductKind::Site, [m, k, n], [false; 2]),
        ("scattered linear", &[m, k, n]) => of_kind(ProductKind::Scattered, [m, k, n], [false, true]),
        // The sum over the middle axis.
        ("sum", &[outer, size, inner]) => reduce::plan(class, [outer, size, inner]),
        ("layer_norm", _) => norm::plan(class, two())[0].clone(),
        ("gradient of a norm's gain", _) => norm::plan(class, two())[1].clone(),
        ("softmax", _) => softmax::plan_rows(class, two()),
        // [batch, heads, key heads, queries, keys, head]
        ("attention", _) => of_attention()[0].clone(),
        ("attention backward: queries", _) => of_attention()[1].clone(),
        ("attention backward: keys", _) => of_attention()[2].clone(),
        // [rows, width, ids]
        ("gradient of an embedding", &[rows, width, ids]) => embedding::plan_sum([rows, width, ids]),
        _ => panic!("{name}: no such op"),
    }
}

fn class(name: &str) -> DeviceClass {
    DeviceClass::named(name).expect("a row of the table")
}

#[test]
fn plans_are_as_expected() {
    let mut wrong = String::new();
    for (device, name, want, _) in EXPECTED {
        let got: Vec<String> = plan(&class(device), name).iter().map(Pass::to_string).collect();
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
    let rows = EXPECTED.iter().map(|(_, name, ..)| *name);
    let planned = rows.flat_map(|name| classes.iter().flat_map(move |class| plan(class, name)));
    let sources = planned.map(|pass| pass.source).chain(matmul::core::for_matrix_units());
    #[cfg(feature = "cli")]
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

/// Whether a dispatch keeps a device busy: it has two workgroups of 256 threads (or eight of 64) per multiprocessor. Fewer are
/// enough if with 1.5 times as many, a workgroup would have less than 64 KiB of operands and less than a million operations.
fn is_full(class: &DeviceClass, pass: &Pass) -> bool {
    let groups = pass.workgroups() as f64;
    let threads = groups * pass.threads().expect("a kernel of the house") as f64;
    let little = pass.bytes / (1.5 * groups) < 65_536.0 && pass.flops / (1.5 * groups) < 1e6;
    threads >= class.in_flight() as f64 || little
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
            if 2.0 * share > (pass.bytes - share) / 4.0 {
                return Some(format!("{pass}: its parts cost {:.0} bytes", 2.0 * share));
            }
        }
    }
    None
}

#[test]
fn plans_fill_the_device_or_are_marked() {
    let mut wrong = String::new();
    for (device, name, _, marked) in EXPECTED {
        let class = class(device);
        match (fault(&class, &plan(&class, name)), *marked) {
            (Some(why), FULL) => wrong += &format!("{device}, {name}: {why}\n"),
            (None, PARTLY) => wrong += &format!("{name} fills {device} now: take its mark away\n"),
            _ => {}
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
        "attention backward: keys 64x64x64x4096x4096x64",
        "gradient of an embedding 1000000x64x1000000",
    ];
    for class in DeviceClass::all() {
        let expected = EXPECTED.iter().map(|(_, name, ..)| *name);
        for name in sizes.iter().copied().chain(expected) {
            for pass in plan(&class, name) {
                let threads = pass.threads().expect("a kernel of the house");
                let within =
                    pass.grid.iter().all(|&n| (1..=65535).contains(&n)) && (1..=256).contains(&threads);
                assert!(within, "{name} on {}: {pass}, grid {:?}", class.name, pass.grid);
            }
        }
    }
}

/// A device, an op with its sizes, the dispatches, and whether these may leave the device idle.
#[rustfmt::skip]
const EXPECTED: &[(&str, &str, &[&str], bool)] = &[
    ("h200", "matmul 256x256x256", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 64 workgroups of 64, 786.4 kB, 33.6 MFLOP",
    ], FULL),
    ("h200", "matmul 512x512x512", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 256 workgroups of 64, 3.1 MB, 268.4 MFLOP",
    ], FULL),
    ("h200", "matmul 1024x1024x1024", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 1024 workgroups of 64, 12.6 MB, 2.1 GFLOP",
    ], PARTLY),
    ("h200", "matmul 2048x768x768", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 1536 workgroups of 64, 14.9 MB, 2.4 GFLOP",
    ], FULL),
    ("h200", "matmul 32x128x64x128", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 512 workgroups of 64, 4.2 MB, 67.1 MFLOP",
    ], FULL),
    ("h200", "matmul 1x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=4 THREAD_N=4 WIDE=16: 256 workgroups of 64, 8 parts, 16.9 MB, 8.4 MFLOP",
        "reduce columns: 8 workgroups of 64, 73.7 kB",
    ], FULL),
    ("h200", "matmul 8x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=16: 256 workgroups of 64, 8 parts, 17.4 MB, 67.1 MFLOP",
        "reduce columns: 64 workgroups of 64, 589.8 kB",
    ], FULL),
    ("h200", "matmul 2048x2048x8", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=4 THREAD_N=8 WIDE=1: 512 workgroups of 64, 16.9 MB, 67.1 MFLOP",
    ], FULL),
    ("h200", "matmul 64x16384x64", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 128 workgroups of 64, 32 parts, 8.9 MB, 134.2 MFLOP",
        "reduce columns: 16 workgroups of 64, 540.7 kB",
    ], FULL),
    ("h200", "matmul 2048x2048x2048", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 256 workgroups of 256, 50.3 MB, 17.2 GFLOP",
    ], PARTLY),
    ("h200", "matmul 4096x4096x4096", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 1024 workgroups of 256, 201.3 MB, 137.4 GFLOP",
    ], FULL),
    ("h200", "matmul f16 1024x1024x1024", &[
        "matmul_coop main HIGH=2 LANES=32 SIZE=16 STAGES=2 TILE_K=64 TILE_M=64 TILE_N=64 WIDE=2: 256 workgroups of 128, 8.4 MB, 2.1 GFLOP",
    ], PARTLY),
    ("h200", "matmul f16 4096x4096x4096", &[
        "matmul_coop main HIGH=2 LANES=32 SIZE=16 STAGES=2 TILE_K=32 TILE_M=128 TILE_N=128 WIDE=4: 1024 workgroups of 256, 134.2 MB, 137.4 GFLOP",
    ], FULL),
    ("h200", "linear 1x2048x2048", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=4 THREAD_N=4 WIDE=1: 512 workgroups of 64, 16.8 MB, 8.4 MFLOP",
    ], FULL),
    ("h200", "linear 8192x768x3072", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 1536 workgroups of 256, 135.3 MB, 38.7 GFLOP",
    ], FULL),
    ("h200", "linear of a site 8x2048x2048", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=1: 512 workgroups of 64, 16.9 MB, 67.1 MFLOP",
    ], FULL),
    ("h200", "linear of a site 64x2048x2048", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 128 workgroups of 64, 17.8 MB, 536.9 MFLOP",
    ], PARTLY),
    ("h200", "gradient through a site 8x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=16: 32 workgroups of 64, 16.9 MB, 67.1 MFLOP",
    ], PARTLY),
    ("h200", "gradient through a site 64x2048x2048", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 128 workgroups of 64, 17.8 MB, 536.9 MFLOP",
    ], PARTLY),
    ("h200", "scattered linear 128x3072x768", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 96 workgroups of 64, 11.4 MB, 604.0 MFLOP",
    ], PARTLY),
    ("h200", "scattered linear 2048x3072x768", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 1536 workgroups of 64, 40.9 MB, 9.7 GFLOP",
    ], FULL),
    ("h200", "gradient of a weight 768x8192x768", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 1152 workgroups of 64, 2 parts, 55.1 MB, 9.7 GFLOP",
        "reduce columns: 2304 workgroups of 64, 7.1 MB",
    ], FULL),
    ("h200", "gradient of a weight 3072x8192x768", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 2304 workgroups of 64, 135.3 MB, 38.7 GFLOP",
    ], FULL),
    ("h200", "gradient of a weight 64x131072x64", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 1024 workgroups of 64, 256 parts, 71.3 MB, 1.1 GFLOP",
        "reduce columns: 64 workgroups of 64, 4 parts, 4.3 MB",
        "reduce columns: 16 workgroups of 64, 81.9 kB",
    ], FULL),
    ("h200", "gradient of a weight 64x131075x64", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 1024 workgroups of 64, 256 parts, 71.3 MB, 1.1 GFLOP",
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 4 workgroups of 64, 17.9 kB, 24.6 kFLOP",
        "reduce columns: 64 workgroups of 64, 4 parts, 4.3 MB",
        "reduce columns: 16 workgroups of 64, 81.9 kB",
    ], FULL),
    ("h200", "gradient of a weight 128x1001x512", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 64 workgroups of 64, 2.8 MB, 131.2 MFLOP",
    ], PARTLY),
    ("h200", "sum 1x131072x64", &[
        "reduce columns: 512 workgroups of 64, 2048 parts, 34.1 MB",
        "reduce columns: 8 workgroups of 64, 32 parts, 532.5 kB",
        "reduce columns: 1 workgroups of 64, 8.4 kB",
    ], FULL),
    ("h200", "sum 1x4096x1024", &[
        "reduce columns: 256 workgroups of 64, 64 parts, 17.0 MB",
        "reduce columns: 4 workgroups of 64, 266.2 kB",
    ], FULL),
    ("h200", "sum 1x16777216x1", &[
        "reduce_rows rows LANES=64: 4096 workgroups of 64, 4096 parts, 67.1 MB",
        "reduce_rows rows LANES=64: 1 workgroups of 64, 16.4 kB",
    ], FULL),
    ("h200", "sum 4096x1024x1", &[
        "reduce_rows rows LANES=64: 4096 workgroups of 64, 16.8 MB",
    ], FULL),
    ("h200", "gradient of a norm's gain 256x768", &[
        "norm columns LANES=64: 24 workgroups of 64, 8 parts, 1.6 MB",
        "reduce columns: 6 workgroups of 64, 55.3 kB",
    ], FULL),
    ("h200", "gradient of a norm's gain 4096x768", &[
        "norm columns LANES=64: 384 workgroups of 64, 128 parts, 26.0 MB",
        "reduce columns: 12 workgroups of 64, 2 parts, 798.7 kB",
        "reduce columns: 6 workgroups of 64, 18.4 kB",
    ], FULL),
    ("h200", "layer_norm 256x768", &[
        "norm forward LANES=8: 32 workgroups of 64, 1.6 MB",
    ], FULL),
    ("h200", "layer_norm 4096x768", &[
        "norm forward LANES=8: 512 workgroups of 64, 25.2 MB",
    ], FULL),
    ("h200", "softmax 4096x1024", &[
        "softmax forward LANES=64: 4096 workgroups of 64, 33.6 MB",
    ], FULL),
    ("h200", "attention 4x8x8x512x512x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 256 workgroups of 64, 16.8 MB, 2.1 GFLOP",
    ], PARTLY),
    ("h200", "attention 8x16x16x1024x1024x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 2048 workgroups of 64, 134.7 MB, 34.4 GFLOP",
    ], FULL),
    ("h200", "attention 4x32x8x1x2048x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 64 workgroups of 64, 32 parts, 34.7 MB, 67.1 MFLOP",
        "attention_combine main: 32 workgroups of 64, 1.1 MB",
    ], PARTLY),
    ("h200", "attention backward: queries 8x16x16x1024x1024x64", &[
        "attention_backward queries HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 2048 workgroups of 64, 168.8 MB, 51.5 GFLOP",
    ], FULL),
    ("h200", "attention backward: queries 4x8x8x512x512x64", &[
        "attention_backward queries HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 256 workgroups of 64, 21.1 MB, 3.2 GFLOP",
    ], PARTLY),
    ("h200", "attention backward: keys 4x8x8x512x512x64", &[
        "attention_backward keys COLUMNS=1 HEAD_DIM=64 PARTS=2 SLOTS=2: 512 workgroups of 64, 25.3 MB, 4.3 GFLOP",
    ], PARTLY),
    ("h200", "gradient of an embedding 8192x512x4096", &[
        "embedding clear: 16384 workgroups of 64, 16.8 MB",
        "embedding sum_runs CHUNK=32: 256 workgroups of 64, 17.3 MB",
        "embedding sum_runs CHUNK=32: 16 workgroups of 64, 1.1 MB",
        "embedding sum_runs CHUNK=32: 2 workgroups of 64, 69.7 kB",
    ], FULL),
    ("integrated", "matmul 256x256x256", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 64 workgroups of 64, 786.4 kB, 33.6 MFLOP",
    ], FULL),
    ("integrated", "matmul 512x512x512", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 16 workgroups of 256, 3.1 MB, 268.4 MFLOP",
    ], FULL),
    ("integrated", "matmul 1024x1024x1024", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 64 workgroups of 256, 12.6 MB, 2.1 GFLOP",
    ], FULL),
    ("integrated", "matmul 2048x768x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 96 workgroups of 256, 14.9 MB, 2.4 GFLOP",
    ], FULL),
    ("integrated", "matmul 32x128x64x128", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 32 workgroups of 256, 4.2 MB, 67.1 MFLOP",
    ], FULL),
    ("integrated", "matmul 1x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=4 THREAD_N=4 WIDE=16: 64 workgroups of 64, 2 parts, 16.8 MB, 8.4 MFLOP",
        "reduce columns: 8 workgroups of 64, 24.6 kB",
    ], FULL),
    ("integrated", "matmul 8x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=16: 64 workgroups of 64, 2 parts, 17.0 MB, 67.1 MFLOP",
        "reduce columns: 64 workgroups of 64, 196.6 kB",
    ], FULL),
    ("integrated", "matmul 2048x2048x8", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=4 THREAD_N=8 WIDE=1: 512 workgroups of 64, 16.9 MB, 67.1 MFLOP",
    ], FULL),
    ("integrated", "matmul 64x16384x64", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 64 workgroups of 64, 16 parts, 8.7 MB, 134.2 MFLOP",
        "reduce columns: 16 workgroups of 64, 278.5 kB",
    ], FULL),
    ("integrated", "matmul 2048x2048x2048", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 256 workgroups of 256, 50.3 MB, 17.2 GFLOP",
    ], FULL),
    ("integrated", "matmul 4096x4096x4096", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 1024 workgroups of 256, 201.3 MB, 137.4 GFLOP",
    ], FULL),
    ("integrated", "linear 1x2048x2048", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=4 THREAD_N=4 WIDE=1: 512 workgroups of 64, 16.8 MB, 8.4 MFLOP",
    ], FULL),
    ("integrated", "linear 8192x768x3072", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 1536 workgroups of 256, 135.3 MB, 38.7 GFLOP",
    ], FULL),
    ("integrated", "linear of a site 8x2048x2048", &[
        "matmul_direct main DEEP=64 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=1: 512 workgroups of 64, 16.9 MB, 67.1 MFLOP",
    ], FULL),
    ("integrated", "linear of a site 64x2048x2048", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 128 workgroups of 64, 17.8 MB, 536.9 MFLOP",
    ], FULL),
    ("integrated", "gradient through a site 8x2048x2048", &[
        "matmul_direct main DEEP=4 HIGH=1 THREAD_M=8 THREAD_N=4 WIDE=16: 32 workgroups of 64, 16.9 MB, 67.1 MFLOP",
    ], PARTLY),
    ("integrated", "gradient through a site 64x2048x2048", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 128 workgroups of 64, 17.8 MB, 536.9 MFLOP",
    ], FULL),
    ("integrated", "scattered linear 128x3072x768", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 96 workgroups of 64, 11.4 MB, 604.0 MFLOP",
    ], FULL),
    ("integrated", "scattered linear 2048x3072x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 96 workgroups of 256, 40.9 MB, 9.7 GFLOP",
    ], FULL),
    ("integrated", "gradient of a weight 768x8192x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 36 workgroups of 256, 52.7 MB, 9.7 GFLOP",
    ], FULL),
    ("integrated", "gradient of a weight 3072x8192x768", &[
        "matmul main THREAD_M=8 THREAD_N=8 TILE_M=128 TILE_N=128: 144 workgroups of 256, 135.3 MB, 38.7 GFLOP",
    ], FULL),
    ("integrated", "gradient of a weight 64x131072x64", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 64 workgroups of 64, 16 parts, 67.4 MB, 1.1 GFLOP",
        "reduce columns: 16 workgroups of 64, 278.5 kB",
    ], FULL),
    ("integrated", "gradient of a weight 128x1001x512", &[
        "matmul main THREAD_M=4 THREAD_N=4 TILE_M=32 TILE_N=32: 64 workgroups of 64, 2.8 MB, 131.2 MFLOP",
    ], FULL),
    ("integrated", "sum 1x131072x64", &[
        "reduce columns: 64 workgroups of 64, 256 parts, 33.6 MB",
        "reduce columns: 1 workgroups of 64, 65.8 kB",
    ], FULL),
    ("integrated", "sum 1x4096x1024", &[
        "reduce columns: 64 workgroups of 64, 16 parts, 16.8 MB",
        "reduce columns: 4 workgroups of 64, 69.6 kB",
    ], FULL),
    ("integrated", "sum 1x16777216x1", &[
        "reduce_rows rows LANES=64: 4096 workgroups of 64, 4096 parts, 67.1 MB",
        "reduce_rows rows LANES=64: 1 workgroups of 64, 16.4 kB",
    ], FULL),
    ("integrated", "sum 4096x1024x1", &[
        "reduce_rows rows LANES=64: 4096 workgroups of 64, 16.8 MB",
    ], FULL),
    ("integrated", "gradient of a norm's gain 256x768", &[
        "norm columns LANES=64: 24 workgroups of 64, 8 parts, 1.6 MB",
        "reduce columns: 6 workgroups of 64, 55.3 kB",
    ], FULL),
    ("integrated", "gradient of a norm's gain 4096x768", &[
        "norm columns LANES=64: 66 workgroups of 64, 22 parts, 25.4 MB",
        "reduce columns: 6 workgroups of 64, 141.3 kB",
    ], FULL),
    ("integrated", "layer_norm 256x768", &[
        "norm forward LANES=8: 32 workgroups of 64, 1.6 MB",
    ], FULL),
    ("integrated", "layer_norm 4096x768", &[
        "norm forward LANES=8: 512 workgroups of 64, 25.2 MB",
    ], FULL),
    ("integrated", "softmax 4096x1024", &[
        "softmax forward LANES=64: 4096 workgroups of 64, 33.6 MB",
    ], FULL),
    ("integrated", "attention 4x8x8x512x512x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 256 workgroups of 64, 16.8 MB, 2.1 GFLOP",
    ], FULL),
    ("integrated", "attention 8x16x16x1024x1024x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 2048 workgroups of 64, 134.7 MB, 34.4 GFLOP",
    ], FULL),
    ("integrated", "attention 4x32x8x1x2048x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 64 workgroups of 64, 32 parts, 34.7 MB, 67.1 MFLOP",
        "attention_combine main: 32 workgroups of 64, 1.1 MB",
    ], FULL),
    ("integrated", "attention backward: queries 8x16x16x1024x1024x64", &[
        "attention_backward queries HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 2048 workgroups of 64, 168.8 MB, 51.5 GFLOP",
    ], FULL),
    ("integrated", "attention backward: queries 4x8x8x512x512x64", &[
        "attention_backward queries HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 256 workgroups of 64, 21.1 MB, 3.2 GFLOP",
    ], FULL),
    ("integrated", "attention backward: keys 4x8x8x512x512x64", &[
        "attention_backward keys COLUMNS=1 HEAD_DIM=64 PARTS=2 SLOTS=2: 512 workgroups of 64, 25.3 MB, 4.3 GFLOP",
    ], FULL),
    ("integrated", "gradient of an embedding 8192x512x4096", &[
        "embedding clear: 16384 workgroups of 64, 16.8 MB",
        "embedding sum_runs CHUNK=32: 256 workgroups of 64, 17.3 MB",
        "embedding sum_runs CHUNK=32: 16 workgroups of 64, 1.1 MB",
        "embedding sum_runs CHUNK=32: 2 workgroups of 64, 69.7 kB",
    ], FULL),
    ("cpu", "matmul 256x256x256", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 8 workgroups of 32, 786.4 kB, 33.6 MFLOP",
    ], FULL),
    ("cpu", "matmul 512x512x512", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 32 workgroups of 32, 3.1 MB, 268.4 MFLOP",
    ], FULL),
    ("cpu", "matmul 1024x1024x1024", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 128 workgroups of 32, 12.6 MB, 2.1 GFLOP",
    ], FULL),
    ("cpu", "matmul 2048x768x768", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 192 workgroups of 32, 14.9 MB, 2.4 GFLOP",
    ], FULL),
    ("cpu", "matmul 32x128x64x128", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=8 THREAD_N=8 WIDE=8: 256 workgroups of 32, 4.2 MB, 67.1 MFLOP",
    ], FULL),
    ("cpu", "matmul 1x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=1 THREAD_M=4 THREAD_N=16 WIDE=32: 8 workgroups of 32, 2 parts, 16.8 MB, 8.4 MFLOP",
        "reduce columns: 8 workgroups of 64, 24.6 kB",
    ], FULL),
    ("cpu", "matmul 8x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=2 THREAD_M=4 THREAD_N=16 WIDE=16: 8 workgroups of 32, 16.9 MB, 67.1 MFLOP",
    ], FULL),
    ("cpu", "matmul 2048x2048x8", &[
        "matmul_direct main DEEP=1 HIGH=32 THREAD_M=16 THREAD_N=8 WIDE=1: 8 workgroups of 32, 2 parts, 17.0 MB, 67.1 MFLOP",
        "reduce columns: 64 workgroups of 64, 196.6 kB",
    ], FULL),
    ("cpu", "matmul 64x16384x64", &[
        "matmul_direct main DEEP=1 HIGH=8 THREAD_M=8 THREAD_N=16 WIDE=4: 8 workgroups of 32, 8 parts, 8.5 MB, 134.2 MFLOP",
        "reduce columns: 16 workgroups of 64, 147.5 kB",
    ], FULL),
    ("cpu", "matmul 2048x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 512 workgroups of 32, 50.3 MB, 17.2 GFLOP",
    ], FULL),
    ("cpu", "matmul 4096x4096x4096", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 2048 workgroups of 32, 201.3 MB, 137.4 GFLOP",
    ], FULL),
    ("cpu", "linear 1x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=1 THREAD_M=4 THREAD_N=16 WIDE=32: 8 workgroups of 32, 2 parts, 16.8 MB, 8.4 MFLOP",
        "reduce columns: 8 workgroups of 64, 24.6 kB",
    ], FULL),
    ("cpu", "linear 8192x768x3072", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 3072 workgroups of 32, 135.3 MB, 38.7 GFLOP",
    ], FULL),
    ("cpu", "linear of a site 8x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=2 THREAD_M=4 THREAD_N=16 WIDE=16: 8 workgroups of 32, 16.9 MB, 67.1 MFLOP",
    ], FULL),
    ("cpu", "linear of a site 64x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 16 workgroups of 32, 17.8 MB, 536.9 MFLOP",
    ], FULL),
    ("cpu", "gradient through a site 8x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=2 THREAD_M=4 THREAD_N=16 WIDE=16: 8 workgroups of 32, 16.9 MB, 67.1 MFLOP",
    ], FULL),
    ("cpu", "gradient through a site 64x2048x2048", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 16 workgroups of 32, 17.8 MB, 536.9 MFLOP",
    ], FULL),
    ("cpu", "scattered linear 128x3072x768", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 12 workgroups of 32, 11.4 MB, 604.0 MFLOP",
    ], FULL),
    ("cpu", "scattered linear 2048x3072x768", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 192 workgroups of 32, 40.9 MB, 9.7 GFLOP",
    ], FULL),
    ("cpu", "gradient of a weight 768x8192x768", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 72 workgroups of 32, 52.7 MB, 9.7 GFLOP",
    ], FULL),
    ("cpu", "gradient of a weight 3072x8192x768", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 288 workgroups of 32, 135.3 MB, 38.7 GFLOP",
    ], FULL),
    ("cpu", "gradient of a weight 64x131072x64", &[
        "matmul_direct main DEEP=1 HIGH=8 THREAD_M=8 THREAD_N=16 WIDE=4: 8 workgroups of 32, 8 parts, 67.2 MB, 1.1 GFLOP",
        "reduce columns: 16 workgroups of 64, 147.5 kB",
    ], FULL),
    ("cpu", "gradient of a weight 128x1001x512", &[
        "matmul_direct main DEEP=1 HIGH=4 THREAD_M=16 THREAD_N=16 WIDE=8: 8 workgroups of 32, 2.8 MB, 131.2 MFLOP",
    ], FULL),
    ("cpu", "sum 1x131072x64", &[
        "reduce columns: 8 workgroups of 64, 32 parts, 33.6 MB",
        "reduce columns: 1 workgroups of 64, 8.4 kB",
    ], FULL),
    ("cpu", "sum 1x4096x1024", &[
        "reduce columns: 4 workgroups of 64, 16.8 MB",
    ], FULL),
    ("cpu", "sum 1x16777216x1", &[
        "reduce_rows rows LANES=1: 64 workgroups of 64, 4096 parts, 67.1 MB",
        "reduce_rows rows LANES=64: 1 workgroups of 64, 16.4 kB",
    ], FULL),
    ("cpu", "sum 4096x1024x1", &[
        "reduce_rows rows LANES=1: 64 workgroups of 64, 16.8 MB",
    ], FULL),
    ("cpu", "gradient of a norm's gain 256x768", &[
        "norm columns LANES=64: 6 workgroups of 64, 2 parts, 1.6 MB",
        "reduce columns: 6 workgroups of 64, 18.4 kB",
    ], FULL),
    ("cpu", "gradient of a norm's gain 4096x768", &[
        "norm columns LANES=64: 6 workgroups of 64, 2 parts, 25.2 MB",
        "reduce columns: 6 workgroups of 64, 18.4 kB",
    ], FULL),
    ("cpu", "layer_norm 256x768", &[
        "norm forward LANES=1: 4 workgroups of 64, 1.6 MB",
    ], FULL),
    ("cpu", "layer_norm 4096x768", &[
        "norm forward LANES=1: 64 workgroups of 64, 25.2 MB",
    ], FULL),
    ("cpu", "softmax 4096x1024", &[
        "softmax forward LANES=1: 64 workgroups of 64, 33.6 MB",
    ], FULL),
    ("cpu", "attention 4x8x8x512x512x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=8 SLOTS=16: 32 workgroups of 64, 16.8 MB, 2.1 GFLOP",
    ], FULL),
    ("cpu", "attention 8x16x16x1024x1024x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=8 SLOTS=16: 256 workgroups of 64, 134.7 MB, 34.4 GFLOP",
    ], FULL),
    ("cpu", "attention 4x32x8x1x2048x64", &[
        "attention forward HEAD_DIM=64 PARTS=1 ROWS=1 SLOTS=2: 32 workgroups of 64, 2 parts, 33.7 MB, 67.1 MFLOP",
        "attention_combine main: 32 workgroups of 64, 99.8 kB",
    ], FULL),
    ("cpu", "attention backward: queries 8x16x16x1024x1024x64", &[
        "attention_backward queries HEAD_DIM=64 PARTS=1 ROWS=4 SLOTS=8: 512 workgroups of 64, 168.8 MB, 51.5 GFLOP",
    ], FULL),
    ("cpu", "attention backward: queries 4x8x8x512x512x64", &[
        "attention_backward queries HEAD_DIM=64 PARTS=1 ROWS=4 SLOTS=8: 64 workgroups of 64, 21.1 MB, 3.2 GFLOP",
    ], FULL),
    ("cpu", "attention backward: keys 4x8x8x512x512x64", &[
        "attention_backward keys COLUMNS=4 HEAD_DIM=64 PARTS=1 SLOTS=8: 64 workgroups of 64, 25.3 MB, 4.3 GFLOP",
    ], FULL),
    ("cpu", "gradient of an embedding 8192x512x4096", &[
        "embedding clear: 16384 workgroups of 64, 16.8 MB",
        "embedding sum_runs CHUNK=32: 256 workgroups of 64, 17.3 MB",
        "embedding sum_runs CHUNK=32: 16 workgroups of 64, 1.1 MB",
        "embedding sum_runs CHUNK=32: 2 workgroups of 64, 69.7 kB",
    ], FULL),
];
