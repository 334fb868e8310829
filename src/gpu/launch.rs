//! The one way to launch a kernel: names and limits are checked, the pipeline is found, the commands are recorded.

use super::buffer::Buffer;
use super::command::{Command, Dispatch, GroupKey};
use super::kernel::{Bind, Launch, MOST_TURNS};
use super::pipeline::Pipeline;
use super::record::Recorder;
use super::{Gpu, lock, recording, texel};
use crate::error::{Error, Result};
use std::num::NonZeroU64;
use std::sync::Arc;

impl Gpu {
    /// Records one dispatch. If the device has a fault, a limit is exceeded, or a buffer carries an error, it only
    /// marks the outputs with that error. A kernel that does not compile, or a launch that does not fit its kernel, is a fault
    /// of the device, which [`Gpu::take_fault`] removes: see [`op`](crate::op).
    ///
    /// # Panics
    /// When somebody else holds a tensor that was bound by [`Launch::output`].
    #[track_caller]
    pub fn launch(&self, launch: Launch) {
        // The tensor is one holder, and the launch the other.
        let alone = launch.outputs.iter().all(|value| Arc::strong_count(value) <= 2);
        assert!(alone, "{}: an output is in use elsewhere; launch before it is used", launch.op);
        if launch.grid.contains(&0) {
            return;
        }
        let possible = self.check().and_then(|()| self.possible(&launch));
        if possible.is_ok() && self.plan_number().is_some() {
            return self.note_pass(&launch);
        }
        let prepared = possible.and_then(|()| self.prepared(&launch));
        if let Err(error) = prepared.and_then(|prepared| self.encode(&launch, prepared, &[])) {
            recording::failed(self, &error);
            launch.fail(&error);
        }
    }

    /// Checks a launch and returns its pipeline and parameters, so that nothing but a lost operand can stop
    /// [`Gpu::encode`]. A failed check concerns this op only, but a pipeline that cannot be made is a fault of the
    /// device.
    pub(super) fn prepare(&self, launch: &Launch) -> Result<Prepared> {
        self.possible(launch)?;
        self.prepared(launch)
    }

    fn prepared(&self, launch: &Launch) -> Result<Prepared> {
        let pipeline = self.pipeline(launch).map_err(|error| self.raise(error))?;
        let named = |message: String| {
            let (file, entry) = (launch.source.name(), launch.entry);
            let message = format!("{}: the launch of {entry} {message}", launch.op);
            self.raise(Error::shader(format!("{file}.wgsl"), 0, message))
        };
        let numbers = pipeline.interface.numbers(&launch.binds).map_err(named)?;
        if launch.source.is_foreign() {
            overlap(&launch.binds).map_or(Ok(()), Err).map_err(named)?;
            pipeline.interface.check_types(&launch.binds).map_err(named)?;
        }
        let params = match &pipeline.interface.params {
            Some(params) => params.pack(&launch.params, launch.grid[0]).map_err(named)?,
            None if launch.params.is_empty() => Vec::new(),
            None => return Err(named(format!("sets {}, but it has no parameters", launch.params[0].0))),
        };
        Ok(Prepared { pipeline, numbers, params })
    }

    /// Checks that all operands have data and that nothing exceeds this adapter's limits.
    pub(super) fn possible(&self, launch: &Launch) -> Result<()> {
        // Operands first: an operand's error is the cause, even if the result is too large as well.
        let those = |write: bool| launch.binds.iter().filter(move |bind| bind.write == write);
        if let Some(bind) = launch.binds.iter().find(|bind| !bind.part.buffer.is_on(self)) {
            let message = format!("{}: `{}` is on another device; copy it with to_gpu", launch.op, bind.name);
            return Err(Error::config(message));
        }
        those(false).chain(those(true)).try_for_each(|bind| bind.part.buffer.data().map(drop))?;
        let within = |what: &str, need: u64, have: u32| match need > have as u64 {
            true => Err(Error::Limit { what: format!("{}: {what}", launch.op), need, have: have as u64 }),
            false => Ok(()),
        };
        if launch.source.is_listed() {
            let message =
                format!("{}: a kernel of the list of variants cannot be launched from outside", launch.op);
            return Err(Error::config(message));
        }
        let limits = self.limits();
        for n in launch.grid {
            within("workgroups along one axis", n as u64, limits.max_compute_workgroups_per_dimension)?;
        }
        if let Some((name, size)) = launch.too_large() {
            within(name, size, u32::MAX)?;
        }
        let Some(turns) = launch.turns else {
            let message = format!(
                "{}: a launch states the turns of its loops: Launch::turns(0) if it has none",
                launch.op
            );
            return Err(Error::config(message));
        };
        within("turns of a thread's loops", turns as u64, MOST_TURNS as u32)
    }

    /// Records a prepared dispatch, which may be part of a change in place of the buffers `changed`. Fails if an
    /// operand was lost in the meantime.
    pub(super) fn encode(&self, launch: &Launch, prepared: Prepared, changed: &[Arc<Buffer>]) -> Result<()> {
        let Prepared { pipeline, numbers, params } = prepared;
        let mut recorder = lock(&self.0.recorder);
        // Only now, because the end of a recording may have moved buffers of that step.
        let raws = launch.binds.iter().map(|bind| bind.part.buffer.data()).collect::<Result<Vec<_>>>()?;
        let (views, copies) = self.textures(&mut recorder, &pipeline, &launch.binds, &numbers, &raws);
        let group = self.group(&mut recorder, launch, &pipeline, &numbers, &raws, &views);
        let (grid, seconds, live) = (launch.grid, launch.seconds(self), launch.live.clone());
        let dispatch = Command::Dispatch(Dispatch { pipeline, group, params, grid, seconds, live });
        for command in copies.into_iter().map(Command::Texels).chain([dispatch]) {
            recording::command(self, || command.clone());
            recorder.record(self, command, launch, changed);
        }
        drop(recorder);
        recording::binds(self, launch.binds.iter().map(|bind| &bind.part.buffer));
        self.note_pass(launch);
        self.profiled(launch);
        Ok(())
    }

    /// Returns the textures through which operands are read, and the copies that fill them.
    fn textures(
        &self,
        recorder: &mut Recorder,
        pipeline: &Pipeline,
        binds: &[Bind],
        numbers: &[u32],
        raws: &[&wgpu::Buffer],
    ) -> (Vec<Option<wgpu::TextureView>>, Vec<texel::Copy>) {
        let mut views: Vec<Option<wgpu::TextureView>> = vec![None; binds.len()];
        let mut copies = Vec::new();
        let place = |i: usize| pipeline.texels.iter().position(|(number, _)| *number == numbers[i]);
        let texel = |i: usize| place(i).map(|place| pipeline.texels[place].1);
        for i in (0..binds.len()).filter(|_| !pipeline.texels.is_empty()) {
            let (Some(at), Some(texel_of)) = (place(i), texel(i)) else { continue };
            let part = &binds[i].part;
            // Two bindings of the same part share one copy.
            let twin = (0..i).find(|&other| {
                let same = &binds[other].part;
                Arc::ptr_eq(&same.buffer, &part.buffer)
                    && (same.offset, same.size) == (part.offset, part.size)
                    && texel(other) == texel(i)
            });
            views[i] = match twin {
                Some(twin) => views[twin].clone(),
                None => {
                    let (texture, view) = recorder.scratch.get(self, part.size, texel_of, at);
                    let (from, offset, bytes) = (raws[i].clone(), part.offset, part.size);
                    copies.push(texel::Copy { from, offset, bytes, texel: texel_of, texture });
                    Some(view)
                }
            };
        }
        (views, copies)
    }

    fn group(
        &self,
        recorder: &mut Recorder,
        launch: &Launch,
        pipeline: &Pipeline,
        numbers: &[u32],
        raws: &[&wgpu::Buffer],
        views: &[Option<wgpu::TextureView>],
    ) -> wgpu::BindGroup {
        let uniform =
            pipeline.interface.params.as_ref().and_then(|params| Some((params.uniform?, params.bytes)));
        let uniforms = uniform.map(|_| recorder.uniforms(self).clone());
        let range = |buffer, offset, size| {
            wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: NonZeroU64::new(size) })
        };
        let make = || {
            let mut entries = Vec::with_capacity(raws.len() + 1);
            for (i, bind) in launch.binds.iter().enumerate() {
                let resource = match &views[i] {
                    Some(view) => wgpu::BindingResource::TextureView(view),
                    None => range(raws[i], bind.part.offset, bind.part.size),
                };
                entries.push(wgpu::BindGroupEntry { binding: numbers[i], resource });
            }
            if let (Some((binding, bytes)), Some(buffer)) = (uniform, &uniforms) {
                entries.push(wgpu::BindGroupEntry { binding, resource: range(buffer, 0, bytes as u64) });
            }
            self.0.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(launch.op),
                layout: &pipeline.layout,
                entries: &entries,
            })
        };
        // Buffers of a recorded step are not in this pool, and its commands keep their groups anyway.
        let steady = launch.binds.iter().all(|bind| bind.part.buffer.is_of(&self.0.pool));
        if pipeline.texels.is_empty() && steady {
            let trims = lock(&self.0.pool).trims();
            recorder.groups.get(trims, GroupKey::new(pipeline, &launch.binds, numbers, raws), make)
        } else {
            make()
        }
    }
}

/// Returns what is wrong if a buffer is written by one binding and used by another, which no driver allows in one dispatch.
fn overlap(binds: &[Bind]) -> Option<String> {
    binds.iter().enumerate().filter(|(_, bind)| bind.write).find_map(|(i, written)| {
        let root = written.part.buffer.root();
        let other = |(j, bind): &(usize, &Bind)| *j != i && Arc::ptr_eq(bind.part.buffer.root(), root);
        let (_, bind) = binds.iter().enumerate().find(other)?;
        Some(format!("writes {} and binds the same memory as {}", written.name, bind.name))
    })
}

/// A launch that is checked and ready to be recorded.
pub(super) struct Prepared {
    pub pipeline: Arc<Pipeline>,
    /// The numbers of the bindings, in the launch's order.
    numbers: Vec<u32>,
    /// The bytes of the parameters.
    params: Vec<u8>,
}
