//! What happened in an optimizer's steps: gradients that overflowed, and changes of the loss scale. The device keeps a log,
//! so that no step waits for the host, and nothing is lost that a replay does.

use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::buffer::Buffer;
use crate::gpu::readback::Reading;
use std::fmt;
use std::sync::{Arc, Mutex};

/// Slots of the device's log. One is always free, for the next event.
const SLOTS: usize = 64;
/// Words of an event, before the bits of the parameters.
const ENTRY: usize = 4;
/// Words before the first slot: steps without a finite norm, steps, events, and one that is not used.
const COUNTS: usize = 4;
/// The place of the count of steps, in bytes.
pub(super) const STEPS: u64 = 4;

/// Something that happened in a step. `to_string` says it in one line.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum StepEvent {
    /// The norm of the gradients was not finite. The step changed neither parameters nor state.
    Overflow {
        /// The step, counted from 1 as [`AdamW::steps`](super::AdamW::steps) counts.
        step: u64,
        /// The loss scale of this step's gradients, 1 without one.
        scale: f32,
        /// The loss scale from then on.
        next: f32,
        /// The parameters whose gradients overflowed: they have a NaN, an infinity, or squares whose sum is beyond f32.
        /// Empty if only the sum over all parameters is.
        names: Vec<String>,
    },
    /// Enough steps in a row had finite gradients, and the loss scale was raised.
    Raised {
        /// The step after which it was raised, counted from 1.
        step: u64,
        /// The loss scale up to this step.
        scale: f32,
        /// The loss scale from then on.
        next: f32,
    },
    /// More events than the log holds came since it was last read, and the oldest of them are gone.
    Missed {
        /// How many.
        count: u64,
    },
}

impl fmt::Display for StepEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StepEvent::Overflow { step, scale, next, names } => {
                let of = if names.is_empty() { "all parameters together".into() } else { names.join(", ") };
                write!(
                    f,
                    "step {step} changed nothing: at loss scale {scale}, gradients overflowed of {of}"
                )?;
                if next == scale { Ok(()) } else { write!(f, "; the scale is {next} now") }
            }
            StepEvent::Raised { step, scale, next } => {
                write!(f, "the loss scale was raised from {scale} to {next} after step {step}")
            }
            StepEvent::Missed { count } => write!(f, "{count} earlier events of steps were not read in time"),
        }
    }
}

/// The log of an optimizer.
pub(super) struct Log {
    pub buffer: Arc<Buffer>,
    names: Arc<[String]>,
    /// Number of events that were reported.
    seen: Arc<Mutex<u32>>,
}

/// Words with a bit for each of so many parameters.
pub(super) fn words(leaves: usize) -> usize {
    leaves.div_ceil(32)
}

impl Log {
    /// Bytes of the log of so many parameters.
    pub fn bytes(leaves: usize) -> u64 {
        (4 * (COUNTS + SLOTS * (ENTRY + words(leaves)))).next_multiple_of(16) as u64
    }

    /// A log in this buffer, which holds zeros.
    pub fn new(buffer: Arc<Buffer>, names: Vec<String>) -> Log {
        Log { buffer, names: names.into(), seen: Arc::default() }
    }

    /// Starts to read it, without waiting for the device.
    pub fn watch(&self, gpu: &Gpu) -> Result<Watch> {
        let reading = gpu.start_read(&self.buffer, 0, self.buffer.size)?;
        Ok(Watch { reading, names: self.names.clone(), seen: self.seen.clone() })
    }
}

/// A reading of an optimizer's events that is on its way.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::optim::{Group, Sgd, SgdConfig};
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
/// let mut sgd = Sgd::new(&gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
/// sgd.step(&w.scale(f32::INFINITY).sum_all().backward()?, 0.1)?; // changes nothing
/// for event in sgd.watch()?.events()? {
///     assert!(event.to_string().contains("w"));
/// }
/// assert_eq!(sgd.skipped()?, 1);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct Watch {
    reading: Reading,
    names: Arc<[String]>,
    seen: Arc<Mutex<u32>>,
}

impl Watch {
    /// Returns what happened up to the moment of the reading and has not been returned yet, oldest first. Waits for the
    /// device.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn events(self) -> Result<Vec<StepEvent>> {
        let log: Vec<u32> = bytemuck::pod_collect_to_vec(&self.reading.wait()?);
        let mut seen = crate::gpu::lock(&self.seen);
        let total = log[2];
        // Another reading may have been started later and waited for earlier.
        let new = total.wrapping_sub(*seen);
        if new > u32::MAX / 2 {
            return Ok(Vec::new());
        }
        *seen = total;
        let kept = new.min(SLOTS as u32 - 1);
        let missed = (new > kept).then(|| StepEvent::Missed { count: (new - kept).into() });
        let each = ENTRY + words(self.names.len());
        let event = |number: u32| {
            let slot = &log[COUNTS + number as usize % SLOTS * each..][..each];
            let (step, scale, next) = (slot[0].into(), f32::from_bits(slot[1]), f32::from_bits(slot[2]));
            if slot[3] == 0 {
                return StepEvent::Raised { step, scale, next };
            }
            let is_marked = |leaf: usize| slot[ENTRY + leaf / 32] >> (leaf % 32) & 1 == 1;
            let marked = (0..self.names.len()).filter(|&leaf| is_marked(leaf));
            let names = marked.map(|leaf| self.names[leaf].clone()).collect();
            StepEvent::Overflow { step, scale, next, names }
        };
        let recent = (0..kept).map(|i| event(total.wrapping_sub(kept).wrapping_add(i)));
        Ok(missed.into_iter().chain(recent).collect())
    }
}
