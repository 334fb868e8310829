//! The device: adapter choice, features, limits, faults. Everything that talks to wgpu is below this module.

mod adapters;
pub mod buffer;
pub(crate) mod capture;
mod choices;
mod class;
mod command;
mod compile;
mod driver_cache;
mod findings;
mod inplace;
mod interface;
pub mod kernel;
mod launch;
mod measure;
mod memory;
mod open;
mod options;
mod pipeline;
pub mod plan;
mod profile;
pub mod readback;
mod record;
pub(crate) mod recording;
pub mod shader;
mod texel;
mod timer;
pub(crate) mod transpose;
pub(crate) mod value;
mod variants;
mod waiting;

use crate::error::{Error, Result};
use std::fmt;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

pub use adapters::AdapterSummary;
pub use buffer::MemoryStats;
pub use class::{DeviceClass, DeviceKind, Tiles};
pub use options::{Feature, Options, Tuning};
pub use profile::Profiled;

/// A handle to one device. Clones are cheap and refer to the same device, and threads may share it.
///
/// The last handle to go waits for kernels that are being compiled, because a process must not end while threads are
/// inside its driver. A handle in a `static` never goes: call [`Gpu::synchronize`] before the program ends. A program
/// that must end at once calls [`exit::at_once`](crate::exit::at_once).
///
/// ```no_run
/// let gpu = tiebeam::Gpu::open()?;
/// println!("{}", gpu.adapter());
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Gpu(pub(crate) Arc<Inner>);

/// Cooperative matrices, which a subgroup multiplies together: `size` x `size` of f16, summed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CoopMatrices {
    pub size: u32,
}

pub(crate) struct Inner {
    pub id: u64,
    /// Whether this handle only measures candidate kernels (`Gpu::beside`). Which candidates are compiled then depends
    /// on timing, so they are not checked against the list of variants.
    on_trial: bool,
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub limits: wgpu::Limits,
    pub features: wgpu::Features,
    pub checked: bool,
    /// The longest wait for the device, if there is a limit.
    wait: Option<Duration>,
    summary: AdapterSummary,
    class: DeviceClass,
    /// Whether the class was named by the user. Then all its numbers come from the table, whatever was measured.
    class_named: bool,
    texels: texel::Policy,
    coop: Option<CoopMatrices>,
    /// Whether cooperative matrices passed their test on this device.
    pub coop_proven: OnceLock<bool>,
    round_products: bool,
    pub choices: choices::Choices,
    fault: Arc<Mutex<Option<Error>>>,
    /// Number of the open batch.
    pub epoch: AtomicU64,
    /// The most bytes that this handle's buffers may have together. `u64::MAX` if there is no limit.
    most_memory: u64,
    /// Bytes of the buffers that are being created now, which the pools do not count yet.
    creating: Mutex<u64>,
    pub pool: Arc<Mutex<buffer::Pool>>,
    pub staging: Mutex<Vec<wgpu::Buffer>>,
    pub kernels: Mutex<pipeline::Cache>,
    compiler: Arc<compile::Compiler>,
    pub recorder: Mutex<record::Recorder>,
    pub pending: Mutex<inplace::Pending>,
    /// Held while tensors are changed in place. Taken before every other lock of the device.
    changing: Mutex<()>,
    /// Pools of recorded steps, with the numbers of their recordings.
    steps: Mutex<Vec<(u64, Weak<Mutex<buffer::Pool>>)>>,
    /// How many errors the driver has reported since the device was opened.
    losses: Arc<AtomicU64>,
    pub profile: Mutex<profile::Profile>,
    findings: Mutex<findings::Findings>,
    /// Whether the device may hold findings that no readback has copied yet.
    findings_written: Arc<AtomicBool>,
    /// The table that `randn` reads, uploaded at its first call.
    pub normal_table: Mutex<Option<Arc<buffer::Buffer>>>,
}

/// Returns the kernel of a line of `shaders/variants.txt`, for the test that translates them all. For a line that names
/// a piece of generated kernels, this is a kernel that contains the piece. `None` for any other line.
pub fn variant(line: &str) -> Option<shader::Source> {
    value::text::example(line).or_else(|| shader::Source::from_line(line))
}

/// Locks a mutex even if another thread panicked while holding it: the data that we guard is consistent between
/// statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` on a device and returns its result, unless the driver reports an error meanwhile. Such an error belongs
/// to the calling thread's work and is no fault of the device.
pub(crate) fn caught<T>(
    device: &wgpu::Device,
    work: impl FnOnce() -> T,
) -> std::result::Result<T, wgpu::Error> {
    let open = |filter| device.push_error_scope(filter);
    let validation = open(wgpu::ErrorFilter::Validation);
    let [memory, internal] = [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal].map(open);
    let made = work();
    // From the innermost outwards. What fails for want of memory makes invalid what is made of it.
    let [internal, memory, validation] =
        [internal, memory, validation].map(|scope| pollster::block_on(scope.pop()));
    internal.or(memory).or(validation).map_or(Ok(made), Err)
}

impl Gpu {
    fn on(inner: Inner) -> Gpu {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Gpu(Arc::new(Inner { id: NEXT.fetch_add(1, Ordering::Relaxed), ..inner }))
    }

    /// Returns a handle to the same device with its own recorder, memory pools, choices and faults. It is for work that
    /// must not mix with this handle's, such as measuring kernels while a step is recorded. Tensors of the two handles
    /// cannot be combined.
    pub(crate) fn beside(&self) -> Gpu {
        let inner = &self.0;
        Gpu::on(Inner {
            id: 0,
            on_trial: true,
            class: inner.class.clone(),
            class_named: inner.class_named,
            device: inner.device.clone(),
            queue: inner.queue.clone(),
            limits: inner.limits.clone(),
            features: inner.features,
            checked: inner.checked,
            wait: inner.wait,
            texels: inner.texels,
            coop: inner.coop,
            coop_proven: inner.coop_proven.clone(),
            round_products: inner.round_products,
            choices: choices::Choices::none(),
            summary: inner.summary.clone(),
            fault: Arc::default(),
            epoch: AtomicU64::new(0),
            // What is measured beside the work is held for a moment only, and must not fail because the work holds all.
            most_memory: u64::MAX,
            creating: Mutex::default(),
            pool: Arc::default(),
            staging: Mutex::default(),
            kernels: Mutex::default(),
            compiler: inner.compiler.clone(),
            recorder: Mutex::default(),
            pending: Mutex::default(),
            changing: Mutex::default(),
            steps: Mutex::default(),
            losses: Arc::default(),
            profile: Mutex::default(),
            findings: Mutex::default(),
            findings_written: Arc::default(),
            normal_table: Mutex::default(),
        })
    }

    /// The adapter that this device was opened on.
    pub fn adapter(&self) -> &AdapterSummary {
        &self.0.summary
    }

    /// The class by which kernels are chosen: the adapter's own, or the one that [`Options::device`] names.
    pub fn class(&self) -> &DeviceClass {
        &self.0.class
    }

    /// Whether [`Gpu::time`] works on this device.
    pub fn has_timestamps(&self) -> bool {
        self.0.features.contains(wgpu::Features::TIMESTAMP_QUERY)
    }

    /// Whether kernels may compute in f16.
    pub fn has_f16(&self) -> bool {
        self.0.features.contains(wgpu::Features::SHADER_F16)
    }

    /// Whether kernels run with bounds checks and ids are checked before they are used ([`Error::Outside`]).
    pub fn is_checked(&self) -> bool {
        self.0.checked
    }

    /// The cooperative matrices of this adapter (f16 operands, f32 sums), whether or not they passed their test.
    pub(crate) fn coop_matrices(&self) -> Option<CoopMatrices> {
        self.0.coop
    }

    /// Whether this adapter multiplies cooperative matrices of a size that WGSL has, f16 in and f32 out.
    pub fn has_coop_matrices(&self) -> bool {
        self.0.coop.is_some()
    }

    /// Whether products may round their operands to f16.
    pub(crate) fn rounds_products(&self) -> bool {
        self.0.round_products
    }

    pub(crate) fn limits(&self) -> &wgpu::Limits {
        &self.0.limits
    }

    /// The most storage buffers that one kernel may bind. One slot of the limit stays free, because Metal spends it on
    /// buffer sizes.
    pub(crate) fn max_bindings(&self) -> usize {
        (self.0.limits.max_storage_buffers_per_shader_stage as usize - 1).min(16)
    }

    /// Records a fault of the device and returns it. Only the first fault is kept. Later ops do nothing until it is
    /// taken.
    ///
    /// A fault is the loss of a pipeline, of a batch of work, or of the device itself. A limit that is known
    /// beforehand, or missing memory for one buffer, is not a fault: the op's results carry that error.
    ///
    /// It is public so that a program can test what it does after a fault.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// gpu.raise(tiebeam::Error::device("made by a test"));
    /// assert!(Tensor::ones(&gpu, [2]).scale(2.0).to_vec::<f32>().is_err());
    /// assert!(gpu.take_fault().is_some());
    /// assert_eq!(Tensor::ones(&gpu, [2]).scale(2.0).to_vec::<f32>()?, [2.0, 2.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn raise(&self, error: Error) -> Error {
        tracing::error!(%error, "fault");
        lock(&self.0.fault).get_or_insert(error.clone());
        error
    }

    /// Returns the device's standing fault, if any, as `Err`.
    pub(crate) fn check(&self) -> Result<()> {
        match &*lock(&self.0.fault) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Removes and returns the device's standing fault, so that work may go on with tensors made from now on.
    ///
    /// A fault is the loss of a pipeline, of a batch of work, or of the device itself. While it stands, every op is
    /// skipped. The results of skipped ops carry the fault from then on, and so does everything computed from them, but
    /// they do not put it back on the device. Tensors that existed before keep their elements: a skipped step changes
    /// no parameter, optimizer state or cache. If a batch was lost on its way, the tensors that it was to write carry
    /// the error until they are loaded or computed anew.
    ///
    /// An op above a limit, or a tensor that finds no memory, raises no fault: only the op's results and what depends
    /// on them carry that error.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// if let Some(fault) = gpu.take_fault() {
    ///     eprintln!("{fault}"); // tensors made from now on can be computed again
    /// }
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn take_fault(&self) -> Option<Error> {
        lock(&self.0.fault).take()
    }
}

// A panic in an op leaves the device as it was between two statements: see `lock`.
impl UnwindSafe for Gpu {}
impl RefUnwindSafe for Gpu {}

impl PartialEq for Gpu {
    fn eq(&self, other: &Gpu) -> bool {
        self.0.id == other.0.id
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({})", self.0.summary)
    }
}
