//! Record now, submit late: one open encoder and compute pass that every op writes into.

use super::buffer::Buffer;
use super::command::{Command, Dispatch, Groups, Now};
use super::interface::MOST_UNIFORM;
use super::texel::Scratches;
use super::{Gpu, lock};
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

/// Dispatches in one submit, however short they are: small uploads for them keep their buffers until then.
const MOST: usize = 256;
/// Bytes between the parameters of two dispatches in the buffer of uniforms, which is every adapter's alignment.
const UNIFORM: usize = MOST_UNIFORM as usize;
/// Submits that the host may run ahead of the device.
const IN_FLIGHT: usize = 4;
/// Uploaded bytes in one submit: wgpu keeps a copy of each until then, and their buffers wait too.
const UPLOADS: u64 = 64 << 20;

/// The open batch. One a device, behind a mutex: each op's commands go in as a whole.
#[derive(Default)]
pub(crate) struct Recorder {
    // Declared before the encoder: a pass must end first.
    pass: Option<wgpu::ComputePass<'static>>,
    encoder: Option<wgpu::CommandEncoder>,
    /// How long the open batch should take on this device.
    seconds: f64,
    dispatches: usize,
    /// Dispatches of all batches.
    total: u64,
    uploaded: u64,
    pub(super) groups: Groups,
    /// Where kernels whose parameters are too many for immediates find them; one place a dispatch of the batch.
    uniforms: Option<wgpu::Buffer>,
    /// What goes there with the open batch.
    staged: Vec<u8>,
    /// What the open batch writes.
    written: Vec<Weak<Buffer>>,
    /// Errors of the driver that were seen at the last submit.
    losses: u64,
    flights: VecDeque<wgpu::SubmissionIndex>,
    /// Operands as textures, where those are faster to read.
    pub(super) scratch: Scratches,
}

impl Recorder {
    /// The encoder with no pass open: for copies.
    pub fn encoder(&mut self, gpu: &Gpu) -> &mut wgpu::CommandEncoder {
        self.pass = None;
        self.encoder.get_or_insert_with(|| {
            gpu.0.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("batch") })
        })
    }

    /// The open compute pass.
    pub fn pass(&mut self, gpu: &Gpu) -> &mut wgpu::ComputePass<'static> {
        if self.pass.is_none() {
            let descriptor = wgpu::ComputePassDescriptor::default();
            let pass = self.encoder(gpu).begin_compute_pass(&descriptor).forget_lifetime();
            self.pass = Some(pass);
        }
        self.pass.as_mut().expect("opened above")
    }

    /// Encodes a command: the one place where this is done. Replays give what they go by `now`, and run hooks.
    pub(super) fn encode(&mut self, gpu: &Gpu, command: &Command, now: Option<&Now>) {
        match command {
            Command::Dispatch(dispatch) => self.dispatch(gpu, dispatch, now),
            Command::Texels(copy) => copy.encode(self.encoder(gpu)),
            Command::Hook(hook) => hook(),
        }
    }

    fn dispatch(&mut self, gpu: &Gpu, dispatch: &Dispatch, now: Option<&Now>) {
        let params = dispatch.params(now);
        let interface = &dispatch.pipeline.interface;
        let in_uniform = interface.params.as_ref().is_some_and(|params| params.uniform.is_some());
        let place = in_uniform.then(|| {
            let place = self.staged.len();
            self.staged.extend_from_slice(&params);
            self.staged.resize(place + params.len().next_multiple_of(UNIFORM), 0);
            place as u32
        });
        let pass = self.pass(gpu);
        pass.set_pipeline(&dispatch.pipeline.raw);
        pass.set_bind_group(0, &dispatch.group, place.as_slice());
        if !in_uniform && !params.is_empty() {
            pass.set_immediates(0, &params);
        }
        let [x, y, z] = dispatch.grid;
        pass.dispatch_workgroups(x, y, z);
        self.dispatched(gpu, dispatch.seconds);
    }

    /// The buffer of uniforms.
    pub(super) fn uniforms(&mut self, gpu: &Gpu) -> &wgpu::Buffer {
        self.uniforms.get_or_insert_with(|| {
            gpu.0.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("parameters"),
                size: (MOST * UNIFORM) as u64,
                usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })
    }

    /// Counts a dispatch that should take so long; hands the batch over when there is enough work in it to hide what a submit costs,
    /// and long before a driver's watchdog takes it for hung.
    fn dispatched(&mut self, gpu: &Gpu, seconds: f64) {
        self.seconds += seconds;
        self.total += 1;
        self.dispatches += 1;
        if self.seconds >= gpu.class().submit || self.dispatches >= MOST {
            self.submit(gpu);
        }
    }

    /// Counts bytes uploaded for this batch; hands it over when they are many.
    pub fn uploaded(&mut self, gpu: &Gpu, bytes: u64) {
        self.uploaded += bytes;
        if self.uploaded >= UPLOADS {
            self.submit(gpu);
        }
    }

    /// Hands the batch to the device, if there is anything in it.
    pub fn submit(&mut self, gpu: &Gpu) -> Option<wgpu::SubmissionIndex> {
        self.pass = None;
        self.seconds = 0.0;
        self.dispatches = 0;
        self.uploaded = 0;
        let commands = self.encoder.take().map(|e| e.finish());
        if let Some(uniforms) = self.uniforms.as_ref().filter(|_| !self.staged.is_empty()) {
            // Before this batch's commands and after those of the last: the queue is in order.
            gpu.0.queue.write_buffer(uniforms, 0, &self.staged);
            self.staged.clear();
        }
        let index = gpu.0.queue.submit(commands);
        self.look_for_losses(gpu);
        // After the submit: an upload that sees the new number may overwrite what the submitted commands read.
        gpu.0.epoch.fetch_add(1, Ordering::AcqRel);
        self.flights.push_back(index.clone());
        if self.flights.len() > IN_FLIGHT {
            let oldest = self.flights.pop_front();
            if let Err(error) = gpu.wait_for(oldest, "a batch of work before the next") {
                gpu.raise(error);
            }
        }
        Some(index)
    }
}

impl Recorder {
    /// Notes that the command that follows writes these.
    pub fn writes<'a>(&mut self, buffers: impl IntoIterator<Item = &'a Arc<Buffer>>) {
        self.written.extend(buffers.into_iter().map(Arc::downgrade));
    }

    /// Where the driver refused something of this batch, nobody knows how far it came.
    fn look_for_losses(&mut self, gpu: &Gpu) {
        let losses = gpu.0.losses.load(Ordering::Acquire);
        if self.losses != losses {
            self.losses = losses;
            let why = gpu.check().err().map_or("an error of the driver".into(), |error| error.to_string());
            let error = Error::device(format!(
                "the batch that was to write this was lost; compute or load it anew ({why})"
            ));
            let written = self.written.iter().filter_map(Weak::upgrade);
            written.filter(|buffer| !buffer.is_spared()).for_each(|buffer| buffer.fail(&error));
        }
        self.written.clear();
    }
}

impl Gpu {
    /// Kernels recorded since this device was opened: what fusion saves shows here.
    #[doc(hidden)]
    pub fn dispatches(&self) -> u64 {
        lock(&self.0.recorder).total
    }

    /// Submits since this device was opened.
    #[doc(hidden)]
    pub fn submits(&self) -> u64 {
        self.0.epoch.load(Ordering::Acquire)
    }

    /// Submits everything recorded so far, without waiting.
    ///
    /// # Errors
    /// The device's fault, if one stands; not the errors that single tensors carry.
    pub fn flush(&self) -> Result<()> {
        lock(&self.0.recorder).submit(self);
        self.check()
    }

    /// Submits everything and waits until the device is idle.
    ///
    /// # Errors
    /// The device's fault, if one stands; not the errors that single tensors carry. [`Error::Timeout`] when the device takes
    /// longer than `Options::wait`: its work goes on, and a later call may find it done.
    /// [`Error::Outside`] where the device checks ids and found some.
    pub fn synchronize(&self) -> Result<()> {
        let index = self.submit_with_findings(|_| ());
        self.wait_for(index, "all submitted work")?;
        self.check()?;
        self.findings()
    }

    /// The same, but leaves what was found in ids for the next readback.
    pub(super) fn wait_idle(&self) -> Result<()> {
        let index = lock(&self.0.recorder).submit(self);
        self.wait_for(index, "all submitted work")?;
        self.check()
    }

    /// Waits for a submit, at most as long as the options say.
    pub(super) fn wait_for(&self, index: Option<wgpu::SubmissionIndex>, what: &str) -> Result<()> {
        let wait = wgpu::PollType::Wait { submission_index: index, timeout: self.0.wait };
        match self.0.device.poll(wait) {
            Ok(_) => Ok(()),
            Err(wgpu::PollError::Timeout) => Err(self.waited(what)),
            Err(error) => Err(Error::device(format!("waiting for {what}: {error}")).because_of(error)),
        }
    }

    /// That the device did not answer in time.
    pub(super) fn waited(&self, what: &str) -> Error {
        let seconds = self.0.wait.unwrap_or_default().as_secs_f64();
        let message = format!(
            "waited {seconds} s for {what} and stopped: the driver hangs, or the work takes longer. Allow more by TIEBEAM_WAIT \
             (seconds, 0 for no limit), or do less between readbacks"
        );
        Error::Timeout { message }
    }
}
