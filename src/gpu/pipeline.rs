//! Pipelines by source and entry. The interface that a text declares is read at once. The driver compiles each entry
//! once, on a thread (`compile.rs`), while the host goes on.

use super::Gpu;
use super::interface::Interface;
use super::kernel::Launch;
use super::lock;
use super::shader::Name;
use super::texel::{self, Texel};
use super::variants;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

#[derive(PartialEq, Eq, Hash)]
struct Key {
    source: String,
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
    /// What the driver has made of it, once it has.
    made: OnceLock<Result<wgpu::ComputePipeline>>,
    /// Whether a dispatch of it was encoded.
    used: AtomicBool,
}

impl Pipeline {
    /// What the driver has made of it, or `None` while it is at work.
    pub fn made(&self) -> Option<&Result<wgpu::ComputePipeline>> {
        self.made.get()
    }

    /// Waits for the driver. A kernel that it refuses is an error, the same each time.
    pub fn wait(&self) -> &Result<wgpu::ComputePipeline> {
        self.made.wait()
    }

    /// Whether this is the first dispatch that is encoded.
    pub fn is_new(&self) -> bool {
        !self.used.load(Ordering::Relaxed) && !self.used.swap(true, Ordering::Relaxed)
    }
}

/// Pipelines made so far. A failed one is kept too, so that it is compiled once and fails every time.
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
            entry: launch.entry.to_string(),
            texels: self.operands_as_textures(launch),
        };
        // Held while the text is read: two threads that want the same kernel compile it once.
        let mut cache = lock(&self.0.kernels);
        if let Some(known) = cache.0.get(&key) {
            let pipeline = known.clone()?;
            return match pipeline.made() {
                Some(Err(error)) => Err(error.clone()),
                _ => Ok(pipeline),
            };
        }
        let made = self.begin(launch, &key.texels);
        cache.0.insert(key, made.clone());
        made
    }

    fn operands_as_textures(&self, launch: &Launch) -> Vec<Name> {
        let read = launch.binds.iter().filter(|bind| !bind.write);
        let chosen = self.0.texels.chooses(self, read.clone().map(|bind| bind.part.size), launch.reuse);
        read.filter(|bind| chosen(bind.part.size)).map(|bind| bind.name.clone()).collect()
    }

    /// Reads a kernel's interface and gives it to a thread that compiles it.
    fn begin(&self, launch: &Launch, as_textures: &[Name]) -> Result<Arc<Pipeline>> {
        if !self.0.on_trial {
            variants::check(launch.source)?;
        }
        let assembled = launch.source.assemble()?;
        let interface = Interface::of(&assembled, launch.entry)?;
        let (text, texels) = texel::rewrite(assembled.text(), as_textures);
        let texels: Vec<_> =
            texels.into_iter().filter(|(at, _)| interface.bindings.iter().any(|b| b.number == *at)).collect();
        let device = &self.0.device;
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(launch.op),
            entries: &entries(&interface, &texels),
        });
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(refused(assembled.name(), launch.op, error.to_string()).because_of(error));
        }
        let immediates = interface.params.as_ref().filter(|params| params.uniform.is_none());
        let recipe = Recipe {
            device: device.clone(),
            cache: self.0.compiler.cache().map(|cache| cache.raw().clone()),
            checked: self.0.checked,
            op: launch.op.to_string(),
            kernel: assembled.name().to_string(),
            entry: launch.entry.to_string(),
            text: text.into_owned(),
            layout: layout.clone(),
            immediates: immediates.map_or(0, |params| params.bytes as u32),
        };
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let (made, used) = (OnceLock::new(), AtomicBool::new(false));
        let pipeline = Arc::new(Pipeline { id, layout, interface, texels, made, used });
        let slot = pipeline.clone();
        self.0.compiler.run(move || {
            // Whoever waits must not wait in vain.
            let made = catch_unwind(AssertUnwindSafe(|| recipe.compile()));
            let panicked =
                |_| Err(refused(&recipe.kernel, &recipe.op, "a panic in the driver's layer".into()));
            let _ = slot.made.set(made.unwrap_or_else(panicked));
        });
        Ok(pipeline)
    }
}

/// All that the driver needs to compile an entry.
struct Recipe {
    device: wgpu::Device,
    cache: Option<wgpu::PipelineCache>,
    checked: bool,
    op: String,
    kernel: String,
    entry: String,
    text: String,
    layout: wgpu::BindGroupLayout,
    /// Bytes of parameters.
    immediates: u32,
}

impl Recipe {
    /// Compiles the entry. Error scopes belong to the thread that opens them.
    fn compile(&self) -> Result<wgpu::ComputePipeline> {
        let started = Instant::now();
        let (device, label) = (&self.device, Some(&*self.op));
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
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
        let made = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&layout),
            module: &module,
            entry_point: Some(&self.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                zero_initialize_workgroup_memory: false,
            },
            cache: self.cache.as_ref(),
        });
        if let Some(error) = pollster::block_on(internal.pop()).or(pollster::block_on(scope.pop())) {
            return Err(refused(&self.kernel, &self.op, error.to_string()).because_of(error));
        }
        tracing::debug!(op = self.op, entry = self.entry, ms = started.elapsed().as_millis(), "compiled");
        Ok(made)
    }
}

/// The error of a kernel in which naga's own check, which reports lines of the file, found nothing. The message is the
/// driver's.
fn refused(kernel: &str, op: &str, message: String) -> Error {
    Error::shader(format!("{kernel} ({op})"), 0, message)
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
