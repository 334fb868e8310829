//! Pipelines by source and entry. The interface that a text declares is read at once. The driver compiles each entry
//! once, on a thread (`compile.rs`), while the host goes on.

use super::Gpu;
use super::interface::Interface;
use super::kernel::Launch;
use super::shader::Name;
use super::texel::{self, Texel};
use super::variants;
use super::{caught, lock};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

#[derive(PartialEq, Eq, Hash)]
struct Key {
    source: String,
    /// Whether it runs with bounds checks, whatever the device does.
    foreign: bool,
    entry: String,
    /// Operands that are to be read as textures.
    texels: Vec<Name>,
}

/// An entry that is compiled or will be.
pub(super) struct Pipeline {
    pub id: u64,
    pub layout: wgpu::BindGroupLayout,
    pub interface: Interface,
    /// Operands that it reads as textures, by their bindings.
    pub texels: Vec<(u32, Texel)>,
    /// The kernel and its op, for messages.
    name: String,
    /// What the driver has made of it, once it has.
    made: Made,
    /// How long to wait for the driver, if there is a limit.
    limit: Option<Duration>,
    /// Whether a dispatch of it was encoded.
    used: AtomicBool,
}

impl Pipeline {
    /// What the driver has made of it, or `None` while it is at work.
    pub fn made(&self) -> Option<&Result<wgpu::ComputePipeline>> {
        self.made.value.get()
    }

    /// Waits for the driver, at most as long as `Options::wait`. A kernel that it refuses is the inner error, the same
    /// each time.
    ///
    /// # Errors
    /// [`Error::Timeout`]. The driver goes on, and a later call may find the kernel.
    pub fn wait(&self) -> Result<&Result<wgpu::ComputePipeline>> {
        self.made.wait(self.limit).ok_or_else(|| {
            let (seconds, name) = (self.limit.unwrap_or_default().as_secs_f64(), &self.name);
            let message = format!(
                "waited {seconds} s for the driver to compile {name} and stopped: its compiler hangs, or takes longer. Allow \
                 more by TIEBEAM_WAIT (seconds, 0 for no limit)"
            );
            Error::Timeout { message }
        })
    }

    /// Whether this is the first dispatch that is encoded.
    pub fn is_new(&self) -> bool {
        !self.used.load(Ordering::Relaxed) && !self.used.swap(true, Ordering::Relaxed)
    }
}

/// What a compiling thread leaves for those that wait.
#[derive(Default)]
struct Made {
    value: OnceLock<Result<wgpu::ComputePipeline>>,
    /// Locked between setting the value and signalling, so that nobody begins to wait in between.
    waiting: Mutex<()>,
    changed: Condvar,
}

impl Made {
    fn set(&self, made: Result<wgpu::ComputePipeline>) {
        let _ = self.value.set(made);
        drop(lock(&self.waiting));
        self.changed.notify_all();
    }

    fn wait(&self, limit: Option<Duration>) -> Option<&Result<wgpu::ComputePipeline>> {
        if self.value.get().is_none() {
            let (waiting, absent) = (lock(&self.waiting), |_: &mut ()| self.value.get().is_none());
            match limit {
                Some(limit) => {
                    let waited = self.changed.wait_timeout_while(waiting, limit, absent);
                    drop(waited.unwrap_or_else(PoisonError::into_inner));
                }
                None => {
                    drop(self.changed.wait_while(waiting, absent).unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
        self.value.get()
    }
}

/// Pipelines made so far. A refused one is kept too, so that it is compiled once and fails every time. One for which
/// there was no memory is made anew, because later there may be.
#[derive(Default)]
pub(crate) struct Cache(HashMap<Key, Result<Arc<Pipeline>>>);

impl Gpu {
    /// The pipeline of a launch, which the driver may still be compiling.
    ///
    /// # Errors
    /// If the kernel does not assemble, has no such entry, or was refused by the driver before.
    pub(super) fn pipeline(&self, launch: &Launch) -> Result<Arc<Pipeline>> {
        let key = Key {
            source: launch.source.key(),
            foreign: launch.source.is_foreign(),
            entry: launch.entry.to_string(),
            texels: self.operands_as_textures(launch),
        };
        // Held while the text is read: two threads that want the same kernel compile it once.
        let mut cache = lock(&self.0.kernels);
        if let Some(known) = cache.0.get(&key) {
            let kept = known.clone().and_then(|pipeline| match pipeline.made() {
                Some(Err(error)) => Err(error.clone()),
                _ => Ok(pipeline),
            });
            if !matches!(kept, Err(Error::OutOfMemory { .. })) {
                return kept;
            }
        }
        let made = self.begin(launch, &key.texels);
        cache.0.insert(key, made.clone());
        made
    }

    fn operands_as_textures(&self, launch: &Launch) -> Vec<Name> {
        // The rewriting knows how our own kernels are written, and no others.
        if launch.source.is_foreign() {
            return Vec::new();
        }
        let read = launch.binds.iter().filter(|bind| !bind.write);
        let chosen = self.0.texels.chooses(self, read.clone().map(|bind| bind.part.size), launch.reuse);
        read.filter(|bind| chosen(bind.part.size)).map(|bind| bind.name.clone()).collect()
    }

    /// Reads a kernel's interface and gives it to a thread that compiles it.
    fn begin(&self, launch: &Launch, as_textures: &[Name]) -> Result<Arc<Pipeline>> {
        if !self.0.on_trial {
            variants::check(launch.source)?;
        }
        if let Some(name) = launch.source.foreign_matrices() {
            let message = "cooperative matrices are not checked for bounds, so only our own kernels use them";
            return Err(Error::shader(name, 0, message));
        }
        let assembled = launch.source.assemble()?;
        let interface = Interface::of(&assembled, launch.entry)?;
        let (text, texels) = texel::rewrite(assembled.text(), as_textures);
        let texels: Vec<_> =
            texels.into_iter().filter(|(at, _)| interface.bindings.iter().any(|b| b.number == *at)).collect();
        let device = &self.0.device;
        let name = format!("{} ({})", assembled.name(), launch.op);
        let entries = entries(&interface, &texels);
        let descriptor = wgpu::BindGroupLayoutDescriptor { label: Some(launch.op), entries: &entries };
        let layout = caught(device, || device.create_bind_group_layout(&descriptor));
        let layout = layout.map_err(|error| failed(&name, error))?;
        let immediates = interface.params.as_ref().filter(|params| params.uniform.is_none());
        let recipe = Recipe {
            device: device.clone(),
            cache: self.0.compiler.cache().map(|cache| cache.raw().clone()),
            checked: self.0.checked || launch.source.is_foreign(),
            zeroed: launch.source.is_foreign(),
            op: launch.op.to_string(),
            name: name.clone(),
            entry: launch.entry.to_string(),
            text: text.into_owned(),
            layout: layout.clone(),
            immediates: immediates.map_or(0, |params| params.bytes as u32),
        };
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let (made, used, limit) = (Made::default(), AtomicBool::new(false), self.0.wait);
        let pipeline = Arc::new(Pipeline { id, layout, interface, texels, name, made, limit, used });
        let slot = pipeline.clone();
        self.0.compiler.run(move || {
            // Whoever waits must not wait in vain.
            let made = catch_unwind(AssertUnwindSafe(|| recipe.compile()));
            let panicked = |_| Err(Error::shader(&recipe.name, 0, "a panic in the driver's layer"));
            slot.made.set(made.unwrap_or_else(panicked));
        });
        Ok(pipeline)
    }
}

/// All that the driver needs to compile an entry.
struct Recipe {
    device: wgpu::Device,
    cache: Option<wgpu::PipelineCache>,
    checked: bool,
    /// Whether workgroup memory begins as zeros, as WGSL has it. Our own kernels write it before they read it.
    zeroed: bool,
    op: String,
    /// The kernel and its op, for messages.
    name: String,
    entry: String,
    text: String,
    layout: wgpu::BindGroupLayout,
    /// Bytes of parameters.
    immediates: u32,
}

impl Recipe {
    /// Compiles the entry.
    fn compile(&self) -> Result<wgpu::ComputePipeline> {
        let started = Instant::now();
        let made = caught(&self.device, || self.pipeline()).map_err(|error| failed(&self.name, error))?;
        tracing::debug!(op = self.op, entry = self.entry, ms = started.elapsed().as_millis(), "compiled");
        Ok(made)
    }

    fn pipeline(&self) -> wgpu::ComputePipeline {
        let (device, label) = (&self.device, Some(&*self.op));
        let source = wgpu::ShaderSource::Wgsl(self.text.as_str().into());
        let descriptor = wgpu::ShaderModuleDescriptor { label, source };
        let module = if self.checked {
            device.create_shader_module(descriptor)
        } else {
            // SAFETY: these are our own kernels, which the tests run with checks on. Every loop is bounded by its
            // parameters.
            unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&self.layout)],
            immediate_size: self.immediates,
        });
        device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&layout),
            module: &module,
            entry_point: Some(&self.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                zero_initialize_workgroup_memory: self.zeroed,
            },
            cache: self.cache.as_ref(),
        })
    }
}

/// The error of a kernel in which naga's own check, which reports lines of the file, found nothing. The message is the
/// driver's.
fn failed(name: &str, error: wgpu::Error) -> Error {
    match error {
        wgpu::Error::OutOfMemory { .. } => {
            let message = "the driver had none to compile this kernel".into();
            Error::OutOfMemory { op: name.into(), bytes: 0, message }
        }
        error => Error::shader(name, 0, error.to_string()).because_of(error),
    }
}

/// Returns the layout: which bindings are buffers, textures and the uniform.
fn entries(interface: &Interface, texels: &[(u32, Texel)]) -> Vec<wgpu::BindGroupLayoutEntry> {
    let entry = |binding, ty| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty,
        count: None,
    };
    let buffer =
        |ty, has_dynamic_offset| wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: None };
    let storage = interface.bindings.iter().map(|binding| {
        let ty = match texels.iter().find(|(number, _)| *number == binding.number) {
            Some((_, texel)) => wgpu::BindingType::Texture {
                sample_type: texel.sample_type(),
                view_dimension: wgpu::TextureViewDimension::D2,
                multisampled: false,
            },
            None => buffer(wgpu::BufferBindingType::Storage { read_only: !binding.write }, false),
        };
        entry(binding.number, ty)
    });
    let uniform = interface.params.as_ref().and_then(|params| params.uniform);
    let uniform = uniform.map(|number| entry(number, buffer(wgpu::BufferBindingType::Uniform, true)));
    storage.chain(uniform).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::kernel::Part;
    use crate::gpu::shader::Source;

    #[test]
    fn a_kernel_for_which_there_was_no_memory_is_made_anew() {
        let gpu = Gpu::open().unwrap();
        let source = Source::text(
            "fill",
            "@group(0) @binding(0) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) { y[id.x] = 5u; }
"
            .to_string(),
        );
        let y = gpu.alloc("test", 256);
        let part = || Part::first(&y, 256);
        let launch = || Launch::new("test", &source, "main", [1; 3]).bind_mut("y", part()).turns(0);
        // The threads are held while the test answers in the driver's place.
        let Some(held) = gpu.hold_compiler() else { return };
        let first = gpu.pipeline(&launch()).unwrap();
        let error = failed("fill (test)", wgpu::Error::OutOfMemory { source: "none left".into() });
        assert!(error.to_string().starts_with("fill (test): out of device memory"), "{error}");
        first.made.set(Err(error));
        drop(held);
        let second = gpu.pipeline(&launch()).unwrap();
        assert!(first.id != second.id && second.wait().unwrap().is_ok());
        gpu.launch(launch());
        assert_eq!(gpu.read(&y, 0, 4).unwrap(), 5u32.to_le_bytes());
    }
}
