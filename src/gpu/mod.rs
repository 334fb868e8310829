//! The device: adapter choice, features, limits, faults. Everything that talks to wgpu is below this module.

pub mod buffer;
pub(crate) mod capture;
mod choices;
pub mod fuse;
pub mod inplace;
pub mod kernel;
mod profile;
pub mod record;
pub mod shader;
mod texel;
pub mod timer;
pub(crate) mod transpose;

use crate::error::{Error, Result};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

pub use buffer::MemoryStats;
pub use choices::Tuning;
pub use profile::Profiled;

/// How to choose an adapter; the environment (`TIEBEAM_ADAPTER`, `TIEBEAM_BACKEND`) fills what is left open.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Index in [`Gpu::adapters`], or part of the adapter's name, any case.
    pub adapter: Option<String>,
    /// `vulkan`, `metal`, `dx12` or `gl`; comma separated for several.
    pub backend: Option<String>,
    /// Runs kernels with bounds checks and bounded loops even in release builds (`TIEBEAM_CHECKED=1`).
    pub checked: bool,
    /// Whether to read operands through textures: never, or wherever it can be done. By default on llvmpipe where it pays:
    /// its loads from storage buffers are ten times slower. The bits do not depend on it.
    pub texels: Option<bool>,
    /// Whether measured choices of kernels are used (`TIEBEAM_TUNE`, by default `read`).
    pub tuning: Option<Tuning>,
    /// Folder of measured choices (`TIEBEAM_CACHE`, by default in the user's cache folder).
    pub cache: Option<std::path::PathBuf>,
    /// Whether matrix products may round f32 operands to f16, on adapters with cooperative matrices: several times faster,
    /// relative errors near 2^-11 an operand (`TIEBEAM_ROUND_PRODUCTS=1`). Sums stay f32. Off by default.
    pub round_products: bool,
    /// Whether to choose kernels as for a driver that runs on the CPU; by default as the adapter says. For tests.
    #[doc(hidden)]
    pub software: Option<bool>,
}

/// One adapter that this machine offers.
#[derive(Clone, Debug)]
pub struct AdapterSummary {
    /// Position in [`Gpu::adapters`], usable as `TIEBEAM_ADAPTER`.
    pub index: usize,
    /// The adapter's name.
    pub name: String,
    /// `Vulkan`, `Metal`, `Dx12` or `Gl`.
    pub backend: String,
    /// Discrete, integrated, virtual, software or other.
    pub kind: &'static str,
    /// Driver name and version.
    pub driver: String,
    /// Largest single buffer in bytes.
    pub max_buffer: u64,
    /// Largest part of a buffer that one kernel can see, in bytes.
    pub max_binding: u64,
    /// Optional features that the engine uses and this adapter has.
    pub features: Vec<&'static str>,
}

impl fmt::Display for AdapterSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} ({}, {}, {}), buffer {} MiB, binding {} MiB, {}",
            self.index,
            self.name,
            self.backend,
            self.kind,
            self.driver,
            self.max_buffer >> 20,
            self.max_binding >> 20,
            if self.features.is_empty() { "no optional features".into() } else { self.features.join(" ") }
        )
    }
}

/// A handle to one device. Cloning is cheap, every clone is the same device, threads may share it.
///
/// ```no_run
/// let gpu = tiebeam::Gpu::open()?;
/// println!("{}", gpu.adapter());
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Gpu(pub(crate) Arc<Inner>);

/// Matrices that a subgroup multiplies together: `size` x `size` of f16, summed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CoopMatrices {
    pub size: u32,
}

pub(crate) struct Inner {
    pub id: u64,
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub limits: wgpu::Limits,
    pub features: wgpu::Features,
    pub checked: bool,
    summary: AdapterSummary,
    software: bool,
    texels: texel::Policy,
    /// The most lanes that a subgroup may have.
    lanes: u32,
    coop: Option<CoopMatrices>,
    /// Whether cooperative matrices passed their test on this device.
    pub coop_proven: OnceLock<bool>,
    round_products: bool,
    pub choices: choices::Choices,
    fault: Arc<Mutex<Option<Error>>>,
    /// Number of the open batch.
    pub epoch: AtomicU64,
    pub pool: Arc<Mutex<buffer::Pool>>,
    pub staging: Mutex<Vec<wgpu::Buffer>>,
    pub kernels: Mutex<kernel::Cache>,
    pub recorder: Mutex<record::Recorder>,
    pub pending: Mutex<inplace::Pending>,
    pub profile: Mutex<profile::Profile>,
    /// What `randn` reads, uploaded at its first call.
    pub normal_table: Mutex<Option<Arc<buffer::Buffer>>>,
}

/// A lock whose data stays usable after a panic elsewhere: what we guard is consistent between statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const USEFUL: [(wgpu::Features, &str); 4] = [
    (wgpu::Features::SHADER_F16, "f16"),
    (wgpu::Features::SUBGROUP, "subgroups"),
    (wgpu::Features::TIMESTAMP_QUERY, "timestamps"),
    (wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, "cooperative-matrix"),
];

fn kind(device: wgpu::DeviceType) -> &'static str {
    match device {
        wgpu::DeviceType::DiscreteGpu => "discrete",
        wgpu::DeviceType::IntegratedGpu => "integrated",
        wgpu::DeviceType::VirtualGpu => "virtual",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    }
}

fn summarize(index: usize, adapter: &wgpu::Adapter) -> AdapterSummary {
    let info = adapter.get_info();
    let limits = adapter.limits();
    AdapterSummary {
        index,
        name: info.name.clone(),
        backend: format!("{:?}", info.backend),
        kind: kind(info.device_type),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
        max_buffer: limits.max_buffer_size,
        max_binding: limits.max_storage_buffer_binding_size,
        features: USEFUL.iter().filter(|(f, _)| adapter.features().contains(*f)).map(|(_, n)| *n).collect(),
    }
}

fn backends(name: Option<&str>) -> Result<wgpu::Backends> {
    let Some(name) = name else {
        return Ok(wgpu::Backends::VULKAN
            | wgpu::Backends::METAL
            | wgpu::Backends::DX12
            | wgpu::Backends::GL);
    };
    let mut all = wgpu::Backends::empty();
    for part in name.split(',').map(str::trim) {
        all |= match part.to_ascii_lowercase().as_str() {
            "vulkan" | "vk" => wgpu::Backends::VULKAN,
            "metal" => wgpu::Backends::METAL,
            "dx12" | "d3d12" => wgpu::Backends::DX12,
            "gl" | "gles" | "opengl" => wgpu::Backends::GL,
            other => {
                return Err(Error::config(format!(
                    "TIEBEAM_BACKEND: '{other}' is no backend; use vulkan, metal, dx12 or gl"
                )));
            }
        };
    }
    Ok(all)
}

fn list(backends: wgpu::Backends) -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = backends;
    let instance = wgpu::Instance::new(descriptor);
    pollster::block_on(instance.enumerate_adapters(backends))
}

/// Discrete before integrated before virtual before software; a native interface before OpenGL.
fn rank(adapter: &wgpu::Adapter) -> (u8, bool) {
    let info = adapter.get_info();
    let device = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    (device, info.backend == wgpu::Backend::Gl)
}

/// The largest square matrices of f16 with f32 sums, where the adapter has any: WGSL has only these two sizes.
fn coop_matrices(adapter: &wgpu::Adapter, features: wgpu::Features) -> Option<CoopMatrices> {
    if !features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16) {
        return None;
    }
    let all = adapter.cooperative_matrix_properties();
    let has = |size: u32| {
        all.iter().any(|p| {
            [p.m_size, p.n_size, p.k_size] == [size; 3]
                && p.ab_type == wgpu::CooperativeScalarType::F16
                && p.cr_type == wgpu::CooperativeScalarType::F32
        })
    };
    [16, 8].into_iter().find(|&size| has(size)).map(|size| CoopMatrices { size })
}

fn choose(adapters: &[wgpu::Adapter], wanted: Option<&str>) -> Result<usize> {
    let names = || {
        let lines: Vec<String> =
            adapters.iter().enumerate().map(|(i, a)| format!("  {}", summarize(i, a))).collect();
        lines.join("\n")
    };
    if adapters.is_empty() {
        return Err(Error::NoAdapter {
            message: "this machine offers none. Install your GPU's Vulkan driver, or a software one: \
                      'make test' does that, or install mesa-vulkan-drivers (Debian, Fedora) by hand"
                .into(),
        });
    }
    let Some(wanted) = wanted else {
        return Ok((0..adapters.len()).min_by_key(|&i| rank(&adapters[i])).unwrap_or(0));
    };
    if let Ok(index) = wanted.parse::<usize>() {
        return if index < adapters.len() {
            Ok(index)
        } else {
            Err(Error::NoAdapter { message: format!("index {index} is not in the list:\n{}", names()) })
        };
    }
    let lower = wanted.to_lowercase();
    (0..adapters.len())
        .filter(|&i| adapters[i].get_info().name.to_lowercase().contains(&lower))
        .min_by_key(|&i| rank(&adapters[i]))
        .ok_or_else(|| Error::NoAdapter {
            message: format!("no adapter's name contains '{wanted}'. There are:\n{}", names()),
        })
}

impl Gpu {
    /// Opens the best adapter: discrete, then integrated, virtual, software.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is none, [`Error::Unsupported`] where it lacks immediates,
    /// [`Error::Device`] where the driver refuses.
    pub fn open() -> Result<Gpu> {
        Gpu::open_with(Options::default())
    }

    /// Opens the adapter that `options` name.
    ///
    /// # Errors
    /// As [`Gpu::open`]; a name that matches nothing lists the adapters that there are.
    pub fn open_with(mut options: Options) -> Result<Gpu> {
        let variable = |name| std::env::var(name).ok().filter(|v: &String| !v.is_empty());
        let flag = |name| variable(name).is_some_and(|v| v != "0");
        let backend = options.backend.take().or_else(|| variable("TIEBEAM_BACKEND"));
        let wanted = options.adapter.take().or_else(|| variable("TIEBEAM_ADAPTER"));
        options.checked |= cfg!(debug_assertions) || flag("TIEBEAM_CHECKED");
        options.round_products |= flag("TIEBEAM_ROUND_PRODUCTS");
        if options.tuning.is_none() {
            options.tuning = variable("TIEBEAM_TUNE").map(|word| Tuning::parse(&word)).transpose()?;
        }
        let adapters = list(backends(backend.as_deref())?);
        let index = choose(&adapters, wanted.as_deref())?;
        Gpu::from_adapter(index, &adapters[index], options)
    }

    /// Every adapter that this machine offers, in the order that `TIEBEAM_ADAPTER` counts.
    ///
    /// # Errors
    /// When `TIEBEAM_BACKEND` names no backend.
    pub fn adapters() -> Result<Vec<AdapterSummary>> {
        let backend = std::env::var("TIEBEAM_BACKEND").ok().filter(|v| !v.is_empty());
        Ok(list(backends(backend.as_deref())?).iter().enumerate().map(|(i, a)| summarize(i, a)).collect())
    }

    fn from_adapter(index: usize, adapter: &wgpu::Adapter, options: Options) -> Result<Gpu> {
        let summary = summarize(index, adapter);
        let texels = match options.texels {
            Some(true) => texel::Policy::Always,
            None if summary.name.contains("llvmpipe") => texel::Policy::Worth,
            Some(false) | None => texel::Policy::Never,
        };
        let have = adapter.features();
        if !have.contains(wgpu::Features::IMMEDIATES) {
            return Err(Error::Unsupported {
                need: format!("{} has no immediates (push constants), which every kernel uses", summary.name),
            });
        }
        let wanted = USEFUL.iter().fold(wgpu::Features::IMMEDIATES, |all, (f, _)| all | *f) & have;
        let limits = adapter.limits();
        let experimental = if wanted.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
            // SAFETY: only promises that we know the feature may misbehave; its kernels are gated by a self-test.
            unsafe { wgpu::ExperimentalFeatures::enabled() }
        } else {
            wgpu::ExperimentalFeatures::disabled()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("tiebeam"),
            required_features: wanted,
            required_limits: limits.clone(),
            experimental_features: experimental,
            memory_hints: wgpu::MemoryHints::Performance,
            trace: wgpu::Trace::Off,
        }))
        .map_err(|e| Error::device(format!("{} refused to open: {e}", summary.name)))?;
        tracing::info!(adapter = %summary, "opened");

        let fault: Arc<Mutex<Option<Error>>> = Arc::default();
        let raise = |fault: &Arc<Mutex<Option<Error>>>, error: Error| {
            lock(fault).get_or_insert(error);
        };
        let slot = fault.clone();
        device.on_uncaptured_error(Arc::new(move |e| raise(&slot, Error::device(e.to_string()))));
        let slot = fault.clone();
        device.set_device_lost_callback(move |reason, message| {
            // Dropping the last handle also arrives here; nobody is left to ask then.
            if reason != wgpu::DeviceLostReason::Destroyed {
                lock(&slot)
                    .get_or_insert(Error::device(format!("the device was lost ({message}); open it again")));
            }
        });
        let info = adapter.get_info();
        Ok(Gpu::on(Inner {
            id: 0,
            software: options.software.unwrap_or(info.device_type == wgpu::DeviceType::Cpu),
            device,
            queue,
            limits,
            features: wanted,
            checked: options.checked,
            texels,
            lanes: info.subgroup_max_size,
            coop: coop_matrices(adapter, wanted),
            coop_proven: OnceLock::new(),
            round_products: options.round_products,
            choices: choices::Choices::open(options.tuning.unwrap_or_default(), options.cache, &summary),
            summary,
            fault,
            epoch: AtomicU64::new(0),
            pool: Arc::default(),
            staging: Mutex::default(),
            kernels: Mutex::default(),
            recorder: Mutex::default(),
            pending: Mutex::default(),
            profile: Mutex::default(),
            normal_table: Mutex::default(),
        }))
    }

    fn on(inner: Inner) -> Gpu {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Gpu(Arc::new(Inner { id: NEXT.fetch_add(1, Ordering::Relaxed), ..inner }))
    }

    /// The same device with nothing recorded, measured or at fault: for work that must not mix with this one's, such as
    /// measuring kernels while a step is recorded. Tensors of the two do not meet.
    pub(crate) fn beside(&self) -> Gpu {
        let inner = &self.0;
        Gpu::on(Inner {
            id: 0,
            software: inner.software,
            device: inner.device.clone(),
            queue: inner.queue.clone(),
            limits: inner.limits.clone(),
            features: inner.features,
            checked: inner.checked,
            texels: inner.texels,
            lanes: inner.lanes,
            coop: inner.coop,
            coop_proven: inner.coop_proven.clone(),
            round_products: inner.round_products,
            choices: choices::Choices::none(),
            summary: inner.summary.clone(),
            fault: Arc::default(),
            epoch: AtomicU64::new(0),
            pool: Arc::default(),
            staging: Mutex::default(),
            kernels: Mutex::default(),
            recorder: Mutex::default(),
            pending: Mutex::default(),
            profile: Mutex::default(),
            normal_table: Mutex::default(),
        })
    }

    /// The adapter that this device was opened on.
    pub fn adapter(&self) -> &AdapterSummary {
        &self.0.summary
    }

    /// Whether kernels run on the CPU: then large register tiles beat workgroup memory.
    pub fn is_software(&self) -> bool {
        self.0.software
    }

    /// Whether [`Gpu::time`] works here.
    pub fn has_timestamps(&self) -> bool {
        self.0.features.contains(wgpu::Features::TIMESTAMP_QUERY)
    }

    /// Whether kernels may compute in f16.
    pub fn has_f16(&self) -> bool {
        self.0.features.contains(wgpu::Features::SHADER_F16)
    }

    /// The most lanes that a subgroup may have.
    pub(crate) fn lanes(&self) -> u32 {
        self.0.lanes
    }

    /// Matrix units that multiply f16 and sum f32, whether or not they passed their test.
    pub(crate) fn coop_matrices(&self) -> Option<CoopMatrices> {
        self.0.coop
    }

    /// Whether this adapter multiplies cooperative matrices of a size that WGSL has, f16 in and f32 out.
    #[doc(hidden)]
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

    /// Storage buffers that one kernel may bind; Metal spends one argument slot on buffer sizes.
    pub(crate) fn max_bindings(&self) -> usize {
        (self.0.limits.max_storage_buffers_per_shader_stage as usize - 1).min(16)
    }

    /// Keeps the first fault of the device; later ops do nothing until it is taken.
    ///
    /// For what the device lost: memory, a pipeline, itself. A limit known beforehand is no fault: the op's results carry it.
    #[doc(hidden)]
    pub fn raise(&self, error: Error) -> Error {
        tracing::error!(%error, "fault");
        lock(&self.0.fault).get_or_insert(error.clone());
        error
    }

    /// The device's fault that stands, if any, as `Err`.
    pub(crate) fn check(&self) -> Result<()> {
        match &*lock(&self.0.fault) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Takes the device's standing fault away, so that work may go on with tensors made from here on.
    ///
    /// A fault is what the device itself lost: memory, a pipeline, the device. While it stands every op is skipped. Tensors
    /// made by the ops that were skipped carry it from then on, and so does what is made of them; it does not come back to
    /// the device. A limit that an op would pass is no fault: only its results and what depends on them carry that.
    pub fn take_fault(&self) -> Option<Error> {
        lock(&self.0.fault).take()
    }
}

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
