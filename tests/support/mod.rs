//! Shared by the tests: devices, comparison under a derived bound, numerical gradients of f64 references.
#![allow(dead_code)]

pub mod folder;
pub mod potentials;

use folder::root;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use tiebeam::ops::case::{Array, Case, Input};
use tiebeam::{DType, Gpu, Options, Tensor};

/// f32 unit roundoff.
pub const U: f64 = 1.0 / (1u64 << 24) as f64;

/// The device under test, one per process. Without an adapter, tests fail.
pub fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| match Gpu::open() {
        Ok(gpu) => gpu,
        Err(error) => panic!("these tests need an adapter: {error}"),
    })
}

/// A second handle to the adapter, which reads every operand through textures.
pub fn texel_gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    let options = || Options::default().texels(Some(true));
    GPU.get_or_init(|| Gpu::open_with(options()).expect("the adapter opened before"))
}

/// A device that uses the kernels for GPUs on a software driver, and those for CPUs on a GPU.
pub fn other_kernels() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    let other = if gpu().class().is_cpu() { "discrete" } else { "cpu" };
    let options = || Options::default().device(Some(other.into()));
    GPU.get_or_init(|| Gpu::open_with(options()).expect("the adapter opened before"))
}

/// A device for tests that count its dispatches or bytes, raise faults, or need another device than the shared one. Only one test
/// uses it at a time. Taking it twice in one thread deadlocks.
pub fn quiet() -> MutexGuard<'static, Gpu> {
    static GPU: OnceLock<Mutex<Gpu>> = OnceLock::new();
    turn(&GPU, Options::default())
}

/// A device that checks ids. Only one test uses it at a time, because a finding is reported by the next readback of any thread.
pub fn checked_gpu() -> MutexGuard<'static, Gpu> {
    static GPU: OnceLock<Mutex<Gpu>> = OnceLock::new();
    turn(&GPU, Options::default().checked(true))
}

fn turn(device: &'static OnceLock<Mutex<Gpu>>, options: Options) -> MutexGuard<'static, Gpu> {
    let open = || Mutex::new(Gpu::open_with(options).expect("these tests need an adapter"));
    let gpu = device.get_or_init(open).lock().unwrap_or_else(PoisonError::into_inner);
    // Clears a fault that a failed test left, and the memory that the last test freed.
    gpu.take_fault();
    let _ = gpu.synchronize();
    gpu.trim();
    gpu
}

/// The folder of reference vectors.
pub fn vectors() -> PathBuf {
    std::env::var_os("TIEBEAM_VECTORS").map_or_else(|| root().join("tests/vectors"), PathBuf::from)
}

/// A file of the `matching` vectors in the repository. Tests have expectations that hold only for these.
pub fn matching_vectors(file: &str) -> PathBuf {
    root().join("tests/vectors/matching").join(file)
}

/// The elements of a tensor of any type as f64.
pub fn download(x: &Tensor) -> Vec<f64> {
    let ok = "readback";
    match x.dtype() {
        DType::F32 => x.to_vec::<f32>().expect(ok).into_iter().map(f64::from).collect(),
        DType::F16 => x.to_vec::<half::f16>().expect(ok).into_iter().map(f64::from).collect(),
        DType::Bf16 => x.to_vec::<half::bf16>().expect(ok).into_iter().map(f64::from).collect(),
        DType::U32 => x.to_vec::<u32>().expect(ok).into_iter().map(f64::from).collect(),
        DType::I32 => x.to_vec::<i32>().expect(ok).into_iter().map(f64::from).collect(),
        other => panic!("no test knows how to read {other:?}"),
    }
}

/// For each output element, the root of the sum of squares of its terms `x_j dy/dx_j`: the scale of its rounding error.
///
/// The terms of a dot product are its products, so the scale is `||a * b||_2`. A function of one element has one term.
pub struct Spread {
    /// The scale of each element.
    pub norm: Vec<f64>,
    /// The number of terms that are not zero, of each element.
    pub terms: Vec<f64>,
}

/// Derivatives of every output with respect to every element of every float input, by central differences in f64.
pub struct Jacobian {
    /// `columns[input][element][output]`; `None` for inputs that are not differentiated.
    pub columns: Vec<Option<Vec<Vec<f64>>>>,
}

pub fn jacobian(case: &Case, inputs: &[Array], wanted: impl Fn(&Input) -> bool) -> Jacobian {
    let mut at = inputs.to_vec();
    let columns = (0..inputs.len())
        .map(|i| {
            wanted(&case.inputs[i]).then(|| {
                (0..inputs[i].data.len())
                    .map(|e| {
                        let x = inputs[i].data[e];
                        let h = 2e-5 * x.abs().max(0.5);
                        at[i].data[e] = x + h;
                        let up = (case.reference)(&at).data;
                        at[i].data[e] = x - h;
                        let down = (case.reference)(&at).data;
                        at[i].data[e] = x;
                        up.iter().zip(&down).map(|(u, d)| (u - d) / (2.0 * h)).collect()
                    })
                    .collect()
            })
        })
        .collect();
    Jacobian { columns }
}

/// Panics unless every element is within its bound. The message names the worst element.
pub fn within(what: &str, got: &[f64], want: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}: {} elements, want {}", got.len(), want.len());
    let excess = |i: usize| {
        if got[i].is_nan() && want[i].is_nan() || got[i] == want[i] {
            return 0.0;
        }
        let over = (got[i] - want[i]).abs() / bound(i);
        if over.is_nan() { f64::INFINITY } else { over }
    };
    let worst = (0..got.len()).max_by(|&a, &b| excess(a).total_cmp(&excess(b)));
    if let Some(i) = worst.filter(|&i| excess(i) > 1.0) {
        panic!(
            "{what}: element {i}: got {:e}, want {:e}, off by {:e}, bound {:e} ({:.1} times) on {}",
            got[i],
            want[i],
            (got[i] - want[i]).abs(),
            bound(i),
            excess(i),
            gpu().adapter().name
        );
    }
}
