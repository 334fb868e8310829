//! A recorded step: the commands that a thread launched, which replays encode again without running the code.

use super::buffer::{Buffer, Pool};
use super::command::{Command, Now};
use super::readback::Reading;
use super::recording::{self, Recording};
use super::value::Place;
use super::{Gpu, lock};
use crate::error::{Error, Result};
use crate::rng;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// Something that is read in the middle of a replay, because no later command changes it.
pub(crate) struct Tap {
    /// The number of commands that make it.
    pub after: usize,
    pub place: Place,
    pub bytes: u64,
}

/// A thread's commands from the beginning to the end of its recording.
pub(crate) struct Capture {
    gpu: Gpu,
    recording: Recording,
    /// Where replays write the step's outputs.
    results: Vec<Arc<Buffer>>,
    /// The step's draws from random generators.
    draws: rng::Drawn,
}

/// Stops noting draws even if the recorded code panics.
struct Drawing;

impl Drop for Drawing {
    fn drop(&mut self) {
        rng::drawn();
    }
}

impl Gpu {
    /// Runs `work` and records what it launches on this device. Its buffers come from `pool`.
    ///
    /// # Errors
    /// The error of `work`, a recording inside a recording, or something in `work` that cannot be replayed.
    pub(crate) fn capture<T>(
        &self,
        (number, pool): (u64, Arc<Mutex<Pool>>),
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Capture)> {
        let guard = recording::begin(self, number, pool)?;
        rng::draw_from_here();
        let drawing = Drawing;
        let made = work()?;
        let draws = rng::drawn();
        drop(drawing);
        let mut recording = recording::end(guard).expect("begun above");
        // A replay must not come before the compiler, and cannot lack a kernel.
        lock(&self.0.recorder).finish(self)?;
        let failed = recording.commands.iter().find_map(Command::refused);
        match recording.refused.take().or(failed) {
            Some(error) => Err(error),
            None => Ok((made, Capture { gpu: self.clone(), recording, results: vec![], draws })),
        }
    }
}

impl Capture {
    /// Sets where replays write the step's outputs.
    pub fn set_results(&mut self, results: Vec<Arc<Buffer>>) {
        self.results = results;
    }

    /// Where replays write the step's outputs. Outputs that only return a tensor from outside are not included.
    pub fn results(&self) -> &[Arc<Buffer>] {
        &self.results
    }

    /// The rates of the recorded run.
    pub fn rates(&self) -> &[f32] {
        &self.recording.rates
    }

    /// The number of dispatches in one replay.
    pub fn dispatches(&self) -> usize {
        self.recording.commands.iter().filter(|c| matches!(c, Command::Dispatch(_))).count()
    }

    /// Encodes all commands again, with optimizers stepping at `rates`, and begins to read what `taps` name, which are sorted by the
    /// command before. The device goes on while the host has the first of them.
    ///
    /// # Errors
    /// An error that a tensor from outside carries, a tensor from outside whose elements have moved, or the device's
    /// fault. Then nothing runs, and no generator or optimizer advances.
    pub fn replay(&self, rates: &[f32], taps: &[Tap]) -> Result<Vec<Reading>> {
        let (gpu, Recording { outside, changed, .. }) = (&self.gpu, &self.recording);
        gpu.unchanged(|| {
            // What was recorded before may end with an error that counts.
            gpu.compiled()?;
            for buffer in outside.iter().chain(changed) {
                buffer.data()?;
            }
            for buffer in outside.iter().chain(changed).chain(&self.results) {
                if buffer.is_left() {
                    return Err(Error::config(
                        "Step: a parameter that it uses was taken by an optimizer after the recording and has its elements \
                         elsewhere; record the step again",
                    ));
                }
            }
            gpu.settle(changed);
            let readings = self.encode(rates, taps)?;
            changed.iter().chain(&self.results).for_each(|buffer| buffer.touch());
            Ok(readings)
        })
    }

    fn encode(&self, rates: &[f32], mut taps: &[Tap]) -> Result<Vec<Reading>> {
        let (gpu, mut readings) = (&self.gpu, Vec::new());
        let mut recorder = lock(&gpu.0.recorder);
        recorder.finish(gpu)?;
        let now = Now { rates, shifts: &self.draws.again() };
        // A replay writes all of each output, so errors of the last run no longer count.
        self.results.iter().for_each(|buffer| buffer.heal());
        // The batch for which the written buffers were last noted. A long step spans several batches.
        let mut noted = None;
        for (done, command) in self.recording.commands.iter().enumerate() {
            while let Some((tap, rest)) = taps.split_first().filter(|(tap, _)| tap.after <= done) {
                drop(recorder);
                readings.push(gpu.start_read(&tap.place.buffer, tap.place.offset, tap.bytes)?);
                recorder = lock(&gpu.0.recorder);
                taps = rest;
            }
            let epoch = gpu.0.epoch.load(Ordering::Acquire);
            if noted != Some(epoch) {
                recorder.writes(self.recording.changed.iter().chain(&self.results));
                noted = Some(epoch);
            }
            recorder.replay(gpu, command, &now);
        }
        drop(recorder);
        for tap in taps {
            readings.push(gpu.start_read(&tap.place.buffer, tap.place.offset, tap.bytes)?);
        }
        Ok(readings)
    }
}
