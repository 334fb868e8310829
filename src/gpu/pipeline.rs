//! Pipelines by source and entry. Each is compiled once, with the interface that its text declares.

use super::Gpu;
use super::interface::Interface;
use super::kernel::Launch;
use super::lock;
use super::shader::Name;
use super::texel::{self, Texel};
use super::variants;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(PartialEq, Eq, Hash)]
struct Key {
    source: String,
    entry: String,
    /// Operands that are to be read as textures.
    texels: Vec<Name>,
}

/// A compiled entry.
pub(super) struct Pipeline {
    pub id: u64,
    pub raw: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
    pub interface: Interface,
    /// Operands that it reads as textures, by their bindings.
    pub texels: Vec<(u32, Texel)>,
}

/// Pipelines made so far. A failed one is kept too, so that it is compiled once and fails every time.
#[derive(Default)]
pub(crate) struct Cache(HashMap<Key, Result<Arc<Pipeline>>>);

impl Gpu {
    /// The pipeline of a launch.
    ///
    /// # Errors
    /// If the kernel does not assemble, has no such entry, or is refused by the driver.
    pub(super) fn pipeline(&self, launch: &Launch) -> Result<Arc<Pipeline>> {
        let key = Key {
            source: launch.source.key(),
            entry: launch.entry.to_string(),
            texels: self.operands_as_textures(launch),
        };
        // Held while compiling: two threads that want the same kernel compile it once.
        let mut cache = lock(&self.0.kernels);
        if let Some(pipeline) = cache.0.get(&key) {
            return pipeline.clone();
        }
        let made = self.compile(launch, &key.texels).map(Arc::new);
        cache.0.insert(key, made.clone());
        made
    }

    fn operands_as_textures(&self, launch: &Launch) -> Vec<Name> {
        let read = launch.binds.iter().filter(|bind| !bind.write);
        let chosen = self.0.texels.chooses(self, read.clone().map(|bind| bind.part.size), launch.reuse);
        read.filter(|bind| chosen(bind.part.size)).map(|bind| bind.name.clone()).collect()
    }

    fn compile(&self, launch: &Launch, as_textures: &[Name]) -> Result<Pipeline> {
        let started = std::time::Instant::now();
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
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let descriptor =
            wgpu::ShaderModuleDescriptor { label: Some(launch.op), source: wgpu::ShaderSource::Wgsl(text) };
        let module = if self.0.checked {
            device.create_shader_module(descriptor)
        } else {
            // SAFETY: these are our own kernels, which the tests run with checks on. Every loop is bounded by its
            // parameters.
            unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(launch.op),
            entries: &entries(&interface, &texels),
        });
        let immediates = interface.params.as_ref().filter(|params| params.uniform.is_none());
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(launch.op),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: immediates.map_or(0, |params| params.bytes as u32),
        });
        let raw = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(launch.op),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(launch.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        let error = pollster::block_on(internal.pop()).or(pollster::block_on(scope.pop()));
        if let Some(error) = error {
            // Naga's own check, which reports lines of the file, found nothing. This message is the driver's.
            let file = format!("{} ({})", assembled.name(), launch.op);
            return Err(Error::shader(file, 0, error.to_string()).because_of(error));
        }
        tracing::debug!(op = launch.op, entry = launch.entry, ms = started.elapsed().as_millis(), "compiled");
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Ok(Pipeline { id: NEXT.fetch_add(1, Ordering::Relaxed), raw, layout, interface, texels })
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
