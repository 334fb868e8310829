//! Record now, submit late: one open encoder and compute pass that every op writes into.
//!
//! A dispatch whose pipeline is still being compiled waits, and with it all that is recorded after it. A batch that is
//! full is sent without them. Who needs everything, such as a readback, waits for the compiler.

#[cfg(test)]
mod tests;

use super::buffer::Buffer;
use super::command::{Command, Dispatch, Groups, Now};
use super::interface::MOST_UNIFORM;
use super::kernel::Launch;
use super::texel::Scratches;
use super::waiting::{Entry, Next, Waiting};
use super::{Gpu, lock};
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The most dispatches in one submit, however short they are, because small uploads keep their buffers until the
/// submit.
const MOST: usize = 256;
/// Bytes between the parameters of two dispatches in the uniform buffer. Every adapter's alignment divides this number.
const UNIFORM: usize = MOST_UNIFORM as usize;
/// Commands that may wait for the compiler. More would only take memory.
const MOST_WAITING: usize = 1 << 14;
/// Submits that the host may run ahead of the device.
const IN_FLIGHT: usize = 4;
/// The most uploaded bytes in one submit. Until the submit, wgpu keeps a copy of each upload, and buffers that were
/// released in this batch cannot be uploaded to.
const UPLOADS: u64 = 64 << 20;

/// The open batch of commands. Each device has one, behind a mutex, so that each op's commands stay together.
#[derive(Default)]
pub(crate) struct Recorder {
    // Declared before the encoder, because the pass must end first.
    pass: Option<wgpu::ComputePass<'static>>,
    encoder: Option<wgpu::CommandEncoder>,
    /// Estimated seconds of the open batch on this device.
    seconds: f64,
    dispatches: usize,
    /// Dispatches of all batches.
    total: u64,
    uploaded: u64,
    pub(super) groups: Groups,
    /// The parameters of kernels that have too many for immediates, with one place per dispatch of the batch.
    uniforms: Option<wgpu::Buffer>,
    /// The bytes that the open batch's submit writes to `uniforms`.
    staged: Vec<u8>,
    /// The buffers that the open batch writes.
    written: Vec<Weak<Buffer>>,
    /// The number of driver errors at the last submit.
    losses: u64,
    flights: VecDeque<wgpu::SubmissionIndex>,
    /// Textures for operands that are faster to read that way.
    pub(super) scratch: Scratches,
    /// What comes after the encoder's commands, once its pipelines are compiled.
    waiting: Waiting,
}

impl Recorder {
    /// Returns the encoder with no pass open, for copies. All that was recorded before is encoded: this waits for the
    /// compiler.
    ///
    /// # Errors
    /// [`Error::Timeout`] if the compiler takes too long.
    pub fn encoder(&mut self, gpu: &Gpu) -> Result<&mut wgpu::CommandEncoder> {
        self.finish(gpu)?;
        Ok(self.open(gpu))
    }

    fn open(&mut self, gpu: &Gpu) -> &mut wgpu::CommandEncoder {
        self.pass = None;
        self.encoder.get_or_insert_with(|| {
            gpu.0.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("batch") })
        })
    }

    /// The open compute pass.
    fn pass(&mut self, gpu: &Gpu) -> &mut wgpu::ComputePass<'static> {
        if self.pass.is_none() {
            let descriptor = wgpu::ComputePassDescriptor::default();
            let pass = self.open(gpu).begin_compute_pass(&descriptor).forget_lifetime();
            self.pass = Some(pass);
        }
        self.pass.as_mut().expect("opened above")
    }

    /// Records a command of a launch: encodes it, or lets it wait for its turn. If the launch is part of a change in
    /// place, all buffers `changed` are marked if its batch is lost.
    pub(super) fn record(&mut self, gpu: &Gpu, command: Command, launch: &Launch, changed: &[Arc<Buffer>]) {
        let dispatches = matches!(command, Command::Dispatch(_));
        self.total += u64::from(dispatches);
        if self.waiting.is_empty() && command.is_ready() {
            self.writes(launch.written().filter(|_| dispatches).chain(changed));
            return self.encode(gpu, &command, None);
        }
        self.waiting.push(Entry::new(command, dispatches.then_some(launch), changed));
        // If the compiler takes too long, whoever needs the elements will find that out.
        let _ = self.advance(gpu, self.waiting.len() > MOST_WAITING);
    }

    /// Encodes a command of a replay with the values that have changed, or runs its hook. Nothing may be waiting.
    pub(super) fn replay(&mut self, gpu: &Gpu, command: &Command, now: &Now) {
        self.total += u64::from(matches!(command, Command::Dispatch(_)));
        self.encode(gpu, command, Some(now));
    }

    /// Encodes everything that was recorded. Waits for the compiler.
    ///
    /// # Errors
    /// [`Error::Timeout`] if the compiler takes longer than `Options::wait` for one kernel. What waits for that kernel
    /// goes on waiting.
    pub(super) fn finish(&mut self, gpu: &Gpu) -> Result<()> {
        self.advance(gpu, true)
    }

    /// Encodes what waits, from the front, up to the first command whose pipeline is being compiled. Unless it is to
    /// `wait` for that.
    fn advance(&mut self, gpu: &Gpu, wait: bool) -> Result<()> {
        while let Some(next) = self.waiting.next(wait)? {
            match next {
                Next::Ready(entry) => {
                    self.written.extend(entry.at_stake().cloned());
                    self.encode(gpu, &entry.command, None);
                }
                Next::Refused(error) => drop(gpu.raise(error)),
                Next::LeftOut => {}
            }
        }
        Ok(())
    }

    fn encode(&mut self, gpu: &Gpu, command: &Command, now: Option<&Now>) {
        match command {
            Command::Dispatch(dispatch) => self.dispatch(gpu, dispatch, now),
            Command::Texels(copy) => copy.encode(self.open(gpu)),
            Command::Hook(hook) => hook(),
        }
    }

    fn dispatch(&mut self, gpu: &Gpu, dispatch: &Dispatch, now: Option<&Now>) {
        // Only a compiled one is ever here.
        let Some(Ok(pipeline)) = dispatch.pipeline.made() else { return };
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
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &dispatch.group, place.as_slice());
        if !in_uniform && !params.is_empty() {
            pass.set_immediates(0, &params);
        }
        let [x, y, z] = dispatch.grid;
        pass.dispatch_workgroups(x, y, z);
        let sent = self.dispatched(gpu, dispatch.seconds);
        // llvmpipe translates a kernel when it first runs it, on a thread of its own. So it is sent at once.
        if dispatch.pipeline.is_new() && !sent && gpu.adapter().is_software() && self.has_room(gpu) {
            self.send(gpu);
        }
    }

    /// Whether a submit now does not wait for an earlier one.
    fn has_room(&mut self, gpu: &Gpu) -> bool {
        let Some(oldest) = self.flights.front().filter(|_| self.flights.len() >= IN_FLIGHT) else {
            return true;
        };
        let now =
            wgpu::PollType::Wait { submission_index: Some(oldest.clone()), timeout: Some(Duration::ZERO) };
        let done = gpu.0.device.poll(now).is_ok();
        if done {
            self.flights.pop_front();
        }
        done
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

    /// Counts a dispatch of this many estimated seconds. Submits the batch when it has enough work to hide the cost of
    /// a submit, long before a driver's watchdog takes it for hung. Returns whether it did.
    fn dispatched(&mut self, gpu: &Gpu, seconds: f64) -> bool {
        self.seconds += seconds;
        self.dispatches += 1;
        let full = self.seconds >= gpu.class().submit || self.dispatches >= MOST;
        if full {
            self.send(gpu);
        }
        full
    }

    /// Counts bytes uploaded for this batch, and submits it when they are many.
    pub fn uploaded(&mut self, gpu: &Gpu, bytes: u64) {
        self.uploaded += bytes;
        if self.uploaded >= UPLOADS {
            self.send(gpu);
        }
    }

    /// Submits everything that was recorded to the device, which may be nothing. Waits for the compiler.
    ///
    /// # Errors
    /// [`Error::Timeout`] if the compiler takes too long. Then nothing is submitted.
    pub fn submit(&mut self, gpu: &Gpu) -> Result<wgpu::SubmissionIndex> {
        self.finish(gpu)?;
        Ok(self.send(gpu))
    }

    /// Submits what is encoded.
    fn send(&mut self, gpu: &Gpu) -> wgpu::SubmissionIndex {
        self.pass = None;
        self.seconds = 0.0;
        self.dispatches = 0;
        self.uploaded = 0;
        let commands = self.encoder.take().map(|e| e.finish());
        if let Some(uniforms) = self.uniforms.as_ref().filter(|_| !self.staged.is_empty()) {
            // The queue is in order, so this write comes after the last batch's commands and before this one's.
            gpu.0.queue.write_buffer(uniforms, 0, &self.staged);
            self.staged.clear();
        }
        let index = gpu.0.queue.submit(commands);
        self.look_for_losses(gpu);
        // After the submit: an upload that sees the new number may overwrite what the submitted commands read. As long
        // as commands wait, which may read the same buffers, the batch does not count as ended.
        if self.waiting.is_empty() {
            gpu.0.epoch.fetch_add(1, Ordering::AcqRel);
        }
        self.flights.push_back(index.clone());
        if self.flights.len() > IN_FLIGHT {
            let oldest = self.flights.pop_front();
            if let Err(error) = gpu.wait_for(oldest, "a batch of work before the next") {
                gpu.raise(error);
            }
        }
        index
    }
}

impl Recorder {
    /// Notes that the next command writes these buffers.
    pub fn writes<'a>(&mut self, buffers: impl IntoIterator<Item = &'a Arc<Buffer>>) {
        self.written.extend(buffers.into_iter().map(Arc::downgrade));
    }

    /// If the driver has reported an error since the last submit, marks all buffers that this batch writes: nobody
    /// knows how far the batch came.
    fn look_for_losses(&mut self, gpu: &Gpu) {
        let losses = gpu.0.losses.load(Ordering::Acquire);
        if self.losses != losses {
            self.losses = losses;
            let why = gpu.check().err().map_or("an error of the driver".into(), |error| error.to_string());
            let error = Error::device(format!(
                "the batch that was to write this was lost; compute or load it anew ({why})"
            ));
            let written: Vec<Arc<Buffer>> = self.written.iter().filter_map(Weak::upgrade).collect();
            let marked = || written.iter().filter(|buffer| !buffer.is_spared());
            marked().for_each(|buffer| buffer.fail(&error));
            self.waiting.lose(marked(), &error);
        }
        self.written.clear();
    }
}

impl Gpu {
    /// Returns the number of dispatches since this device was opened, which shows what fusion saves.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let before = gpu.dispatches();
    /// Tensor::ones(&gpu, [5]).scale(2.0).exp().square().evaluate();
    /// assert_eq!(gpu.dispatches() - before, 1); // one kernel for the whole chain
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn dispatches(&self) -> u64 {
        lock(&self.0.recorder).total
    }

    /// Returns the number of submits since this device was opened: how often recorded work was handed to the driver.
    pub fn submits(&self) -> u64 {
        self.0.epoch.load(Ordering::Acquire)
    }

    /// Submits everything recorded so far, without waiting for the device. Kernels that are used for the first time must
    /// have been compiled, which this waits for.
    ///
    /// # Errors
    /// The device's fault, if one stands. The errors that single tensors carry are not reported. [`Error::Timeout`] if
    /// the driver takes longer than `Options::wait` to compile a kernel: a later call may find it done.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let y = Tensor::ones(&gpu, [2]).scale(2.0);
    /// y.evaluate();
    /// gpu.flush()?; // the device begins, while the host goes on
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn flush(&self) -> Result<()> {
        lock(&self.0.recorder).submit(self)?;
        self.check()
    }

    /// Submits everything and waits until the device is idle.
    ///
    /// # Errors
    /// The device's fault, if one stands. The errors that single tensors carry are not reported. [`Error::Timeout`] if
    /// the device or its compiler takes longer than `Options::wait`: the work goes on, and a later call may find it
    /// done.
    /// [`Error::Outside`] if the device checks ids and found some outside their range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let y = Tensor::ones(&gpu, [2]).scale(2.0);
    /// y.evaluate();
    /// gpu.synchronize()?; // all of it is done
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn synchronize(&self) -> Result<()> {
        let index = self.submit_with_findings(|_| Ok(()))?;
        self.wait_for(Some(index), "all submitted work")?;
        self.check()?;
        self.findings()
    }

    /// Like `synchronize`, but leaves findings about ids to the next readback.
    pub(super) fn wait_idle(&self) -> Result<()> {
        let index = lock(&self.0.recorder).submit(self)?;
        self.wait_for(Some(index), "all submitted work")?;
        self.check()
    }

    /// Waits for a submit, at most as long as `Options::wait`.
    pub(super) fn wait_for(&self, index: Option<wgpu::SubmissionIndex>, what: &str) -> Result<()> {
        let wait = wgpu::PollType::Wait { submission_index: index, timeout: self.0.wait };
        match self.0.device.poll(wait) {
            Ok(_) => Ok(()),
            Err(wgpu::PollError::Timeout) => Err(self.waited(what)),
            Err(error) => Err(Error::device(format!("waiting for {what}: {error}")).because_of(error)),
        }
    }

    /// Returns the error for a device that did not answer in time.
    pub(super) fn waited(&self, what: &str) -> Error {
        let seconds = self.0.wait.unwrap_or_default().as_secs_f64();
        let message = format!(
            "waited {seconds} s for {what} and stopped: the driver hangs, or the work takes longer. Allow more by TIEBEAM_WAIT \
             (seconds, 0 for no limit), or do less between readbacks"
        );
        Error::Timeout { message }
    }
}
