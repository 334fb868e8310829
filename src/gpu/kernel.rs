//! Pipelines by source, and the one way to launch them.

use super::buffer::Buffer;
use super::capture::{self, Live};
use super::shader::Source;
use super::texel::{self, Texel};
use super::{Gpu, lock};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Part of a buffer, bound at one slot of a kernel.
#[derive(Clone)]
pub(crate) struct Bind {
    pub binding: u32,
    pub buffer: Arc<Buffer>,
    pub offset: u64,
    pub size: u64,
    pub write: bool,
}

/// Turns that all loops of one thread may make together, where each loop takes one more to end and a turn that may `continue`
/// counts double; the few of a tree at the end come on top. Mesa's software driver up to 22.3, the one of Debian 12, ends a
/// thread's loops after 65 535 turns in all, without a word. Plans cut longer walks into several dispatches, on every adapter:
/// the same bits everywhere, and fewer kernels that run into a driver's watchdog. A launch above it fails with a sentence.
pub(crate) const MOST_TURNS: usize = 60_000;

/// One dispatch: what runs, on what, how wide.
pub(crate) struct Launch<'a> {
    pub op: &'a str,
    pub source: &'a Source,
    pub entry: &'a str,
    pub binds: Vec<Bind>,
    /// The kernel's `var<immediate> p`, as its bytes; at most 128.
    pub params: &'a [u8],
    pub grid: [u32; 3],
    /// The most turns that the loops of a thread make, up to [`MOST_TURNS`].
    pub turns: usize,
    /// Times that each element of an operand is loaded, roughly; 0 when most of a large operand is not.
    pub reuse: u32,
    /// What it computes, beside moving its operands.
    pub work: Work,
}

/// What a dispatch computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Work {
    /// Floating-point operations where they may take longer than moving the operands; else 0.
    pub flops: f64,
    /// Pieces of a summed axis that it leaves for a later pass to join.
    pub parts: usize,
}

impl Work {
    /// Nothing that takes longer than moving the operands.
    pub const MOVES: Work = Work { flops: 0.0, parts: 1 };

    /// So many operations, with whole results.
    pub fn flops(flops: f64) -> Work {
        Work { flops, parts: 1 }
    }
}

impl Launch<'_> {
    /// Bytes of its operands and results, each once; of an operand that is mostly not read as many as the results have.
    pub fn bytes(&self) -> f64 {
        let of = |write: bool| -> f64 {
            self.binds.iter().filter(|bind| bind.write == write).map(|bind| bind.size as f64).sum()
        };
        let (read, written) = (of(false), of(true));
        written + if self.reuse == 0 { read.min(written) } else { read }
    }

    /// How long it should take on this device.
    fn seconds(&self, gpu: &Gpu) -> f64 {
        // Where the op does not say: some operations a turn of each thread's loops.
        const EACH: f64 = 4.0 * 64.0;
        let groups: f64 = self.grid.iter().map(|&n| n as f64).product();
        let flops = if self.work.flops > 0.0 { self.work.flops } else { EACH * self.turns as f64 * groups };
        gpu.class().seconds(self.bytes(), flops)
    }

    /// Its results carry the error.
    fn fail(&self, error: &Error) {
        let written = self.binds.iter().filter(|bind| bind.write && !bind.buffer.is_spared());
        written.for_each(|bind| bind.buffer.fail(error));
    }
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    source: String,
    entry: String,
    binds: Vec<(u32, bool)>,
    texels: Vec<u32>,
    params: usize,
}

pub(super) struct Pipeline {
    id: u64,
    pub raw: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    /// Operands that it reads as textures.
    texels: Vec<(u32, Texel)>,
}

/// Pipelines made so far; a failed one is kept too, so that it is compiled once and fails every time.
#[derive(Default)]
pub(crate) struct Cache(HashMap<Key, Result<Arc<Pipeline>>>);

/// What a bind group depends on.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct GroupKey {
    pipeline: u64,
    binds: Vec<(u32, wgpu::Buffer, u64, u64)>,
}

impl GroupKey {
    fn new(pipeline: &Pipeline, binds: &[Bind], raws: &[&wgpu::Buffer]) -> GroupKey {
        let bind =
            |(bind, raw): (&Bind, &&wgpu::Buffer)| (bind.binding, (*raw).clone(), bind.offset, bind.size);
        GroupKey { pipeline: pipeline.id, binds: binds.iter().zip(raws).map(bind).collect() }
    }
}

/// Bind groups of the steady state, where the pool hands the same buffers to the same kernels again. They keep their
/// buffers alive, so all go when the pool gives buffers back, or when they are many.
#[derive(Default)]
pub(super) struct Groups {
    made: HashMap<GroupKey, wgpu::BindGroup>,
    trims: u64,
}

impl Groups {
    pub fn clear(&mut self) {
        self.made.clear();
    }

    fn get(&mut self, trims: u64, key: GroupKey, make: impl FnOnce() -> wgpu::BindGroup) -> wgpu::BindGroup {
        const MOST: usize = 2048;
        if self.trims != trims || self.made.len() >= MOST {
            self.made.clear();
            self.trims = trims;
        }
        self.made.entry(key).or_insert_with(make).clone()
    }
}

/// `groups` workgroups as a grid within the 65535 per axis that every adapter has: `x` fastest.
pub(crate) fn grid(groups: usize) -> [u32; 3] {
    const MOST: usize = 65535;
    if groups <= MOST {
        return [groups as u32, 1, 1];
    }
    let y = groups.div_ceil(MOST);
    [groups.div_ceil(y) as u32, y as u32, 1]
}

impl Gpu {
    /// Records one dispatch. After a fault of the device, above a limit, or on a buffer that carries an error, it only marks its
    /// outputs with the reason.
    pub(crate) fn launch(&self, launch: Launch) {
        self.launch_live(launch, None);
    }

    /// The same, and what changes in its parameters when a recorded step is replayed.
    pub(crate) fn launch_live(&self, launch: Launch, live: Option<Live>) {
        if launch.grid.contains(&0) {
            return;
        }
        let possible = self.check().and_then(|()| self.possible(&launch));
        if possible.is_ok() && self.only_plans() {
            return self.note_pass(&launch);
        }
        let prepared = possible.and_then(|()| self.prepared(&launch));
        if let Err(error) = prepared.and_then(|pipeline| self.encode(&launch, &pipeline, live)) {
            capture::failed(self, &error);
            launch.fail(&error);
        }
    }

    /// The pipeline of a launch that is possible: then nothing stands in the way of [`Gpu::encode`]. What fails before is only
    /// this op's, a pipeline the device's fault.
    pub(super) fn prepare(&self, launch: &Launch) -> Result<Arc<Pipeline>> {
        self.possible(launch)?;
        self.prepared(launch)
    }

    fn prepared(&self, launch: &Launch) -> Result<Arc<Pipeline>> {
        self.pipeline(launch).map_err(|error| self.raise(error))
    }

    /// Whether the operands all have data and nothing is above this adapter's limits.
    pub(super) fn possible(&self, launch: &Launch) -> Result<()> {
        debug_assert!(launch.params.len() <= 128 && launch.params.len().is_multiple_of(4));
        // An operand's error is the cause, whatever the result's size would say.
        let those = |write: bool| launch.binds.iter().filter(move |bind| bind.write == write);
        those(false).chain(those(true)).try_for_each(|bind| bind.buffer.data().map(drop))?;
        let within = |what: &str, need: u64, have: u32| match need > have as u64 {
            true => Err(Error::Limit { what: format!("{}: {what}", launch.op), need, have: have as u64 }),
            false => Ok(()),
        };
        let limits = self.limits();
        for n in launch.grid {
            within("workgroups along one axis", n as u64, limits.max_compute_workgroups_per_dimension)?;
        }
        within("turns of a thread's loops", launch.turns as u64, MOST_TURNS as u32)?;
        within("bytes of parameters", launch.params.len() as u64, limits.max_immediate_size)
    }

    /// Records a dispatch that was prepared; fails where an operand was lost since.
    pub(super) fn encode(&self, launch: &Launch, pipeline: &Arc<Pipeline>, live: Option<Live>) -> Result<()> {
        let mut recorder = lock(&self.0.recorder);
        // Only now: a recorded step's end may have moved what somebody holds of it.
        let raws = launch.binds.iter().map(|bind| bind.buffer.data()).collect::<Result<Vec<_>>>()?;
        let mut views: Vec<Option<wgpu::TextureView>> = Vec::with_capacity(raws.len());
        for (i, (bind, raw)) in launch.binds.iter().zip(&raws).enumerate() {
            let place = pipeline.texels.iter().position(|(binding, _)| *binding == bind.binding);
            // An operand that stands in for another is copied once.
            let texel = |bind: &Bind| pipeline.texels.iter().find(|t| t.0 == bind.binding).map(|t| t.1);
            let twin = launch.binds[..i].iter().position(|other| {
                Arc::ptr_eq(&other.buffer, &bind.buffer)
                    && (other.offset, other.size) == (bind.offset, bind.size)
                    && texel(other) == texel(bind)
            });
            views.push(match (place, twin) {
                (None, _) => None,
                (Some(_), Some(twin)) => views[twin].clone(),
                (Some(place), None) => {
                    Some(recorder.texels(self, bind, raw, pipeline.texels[place].1, place))
                }
            });
        }
        let entries: Vec<_> = launch
            .binds
            .iter()
            .zip(&raws)
            .zip(&views)
            .map(|((bind, raw), view)| wgpu::BindGroupEntry {
                binding: bind.binding,
                resource: match view {
                    Some(view) => wgpu::BindingResource::TextureView(view),
                    None => wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                        buffer: raw,
                        offset: bind.offset,
                        size: std::num::NonZeroU64::new(bind.size),
                    }),
                },
            })
            .collect();
        let make = || {
            self.0.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(launch.op),
                layout: &pipeline.layout,
                entries: &entries,
            })
        };
        // A recorded step has buffers of its own, and keeps its groups.
        let steady = launch.binds.iter().all(|bind| bind.buffer.is_of(&self.0.pool));
        let group = if pipeline.texels.is_empty() && steady {
            let trims = lock(&self.0.pool).trims();
            recorder.groups.get(trims, GroupKey::new(pipeline, &launch.binds, &raws), make)
        } else {
            make()
        };
        recorder.writes(launch.binds.iter().filter(|bind| bind.write).map(|bind| &bind.buffer));
        let pass = recorder.pass(self);
        pass.set_pipeline(&pipeline.raw);
        pass.set_bind_group(0, &group, &[]);
        if !launch.params.is_empty() {
            pass.set_immediates(0, launch.params);
        }
        let [x, y, z] = launch.grid;
        pass.dispatch_workgroups(x, y, z);
        let seconds = launch.seconds(self);
        recorder.dispatched(self, seconds);
        drop(recorder);
        capture::dispatch(self, pipeline, &group, launch, seconds, live);
        self.note_pass(launch);
        self.profiled(launch);
        Ok(())
    }

    fn pipeline(&self, launch: &Launch) -> Result<Arc<Pipeline>> {
        let key = Key {
            source: launch.source.key(),
            entry: launch.entry.to_string(),
            binds: launch.binds.iter().map(|b| (b.binding, b.write)).collect(),
            texels: self.texel_bindings(&launch.binds, launch.reuse),
            params: launch.params.len(),
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

    fn compile(&self, launch: &Launch, wanted: &[u32]) -> Result<Pipeline> {
        let started = std::time::Instant::now();
        let assembled = launch.source.assemble()?;
        let (text, texels) = texel::rewrite(assembled.text(), wanted);
        let file = || format!("{} ({})", assembled.name(), launch.op);
        let device = &self.0.device;
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let descriptor =
            wgpu::ShaderModuleDescriptor { label: Some(launch.op), source: wgpu::ShaderSource::Wgsl(text) };
        let module = if self.0.checked {
            device.create_shader_module(descriptor)
        } else {
            // SAFETY: our own kernels, which the tests run with checks on; every loop is bounded by its parameters.
            unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let entries: Vec<_> = launch
            .binds
            .iter()
            .map(|b| wgpu::BindGroupLayoutEntry {
                binding: b.binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: match texels.iter().find(|(binding, _)| *binding == b.binding) {
                    Some((_, texel)) => wgpu::BindingType::Texture {
                        sample_type: texel.sample_type(),
                        view_dimension: wgpu::TextureViewDimension::D2,
                        multisampled: false,
                    },
                    None => wgpu::BindingType::Buffer {
                        ty: wgpu::BufferBindingType::Storage { read_only: !b.write },
                        has_dynamic_offset: false,
                        min_binding_size: None,
                    },
                },
                count: None,
            })
            .collect();
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(launch.op),
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(launch.op),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: launch.params.len() as u32,
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
            // Naga's own report has line numbers in the file's terms; the driver's words come second.
            assembled.check(naga::valid::Capabilities::all())?;
            return Err(Error::Shader { file: file(), line: 0, message: error.to_string() });
        }
        tracing::debug!(op = launch.op, entry = launch.entry, ms = started.elapsed().as_millis(), "compiled");
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Ok(Pipeline { id: NEXT.fetch_add(1, Ordering::Relaxed), raw, layout, texels })
    }
}
