//! Shared by the tests: devices, comparison under a derived bound, numerical gradients of f64 references.
#![allow(dead_code)]

pub mod folder;
pub mod potentials;
pub mod ranks;

use folder::root;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use tiebeam::ops::case::Array;
use tiebeam::ops::check;
use tiebeam::{Gpu, Options, Tensor};

/// f32 unit roundoff.
pub const U: f64 = check::U;

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
    Array::read(x).expect("readback").data
}

/// Panics unless every element is within its bound. The message names the worst element.
pub fn within(what: &str, got: &[f64], want: &[f64], bound: impl Fn(usize) -> f64) {
    if let Err(mismatch) = check::within(what, got, want, bound) {
        panic!("{mismatch} on {}", gpu().adapter().name);
    }
}
