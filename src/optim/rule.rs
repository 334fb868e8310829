//! What distinguishes one optimizer from another: its settings, the state that it keeps, and the kernel of its update.

use crate::error::{Error, Result};
use crate::gpu::shader::Source;

/// The settings of an optimizer, which say what a step computes: [`SgdConfig`](super::SgdConfig),
/// [`AdamConfig`](super::AdamConfig), [`AdamWConfig`](super::AdamWConfig), [`RmsPropConfig`](super::RmsPropConfig) and
/// [`LionConfig`](super::LionConfig). Types outside this crate cannot implement it.
pub trait Rule: Planned + Clone + Send + Sync + 'static {}

/// What only this crate can implement.
pub trait Planned {
    /// Checks the settings, and returns what the arenas need to know of them.
    fn plan(&self) -> Result<Plan>;
}

/// The update of one optimizer, as its settings make it.
pub struct Plan {
    /// The optimizer's name in messages.
    pub(super) op: &'static str,
    /// The base learning rate.
    pub(super) lr: f32,
    pub(super) clip: Option<f32>,
    /// The most bytes of one arena.
    pub(super) arena_limit: Option<u64>,
    /// The numbers that are kept for each element between steps: their name in files, and in the kernel.
    pub(super) moments: Vec<[&'static str; 2]>,
    /// The decays of the two moments, if the kernel corrects them for their start at 0.
    pub(super) decays: Option<[f64; 2]>,
    pub(super) source: Source,
    pub(super) entry: &'static str,
    /// The kernel's constants, apart from the learning rate.
    pub(super) numbers: Vec<(&'static str, f32)>,
}

impl Plan {
    /// An update without state: `entry` of `source` with these numbers.
    pub(super) fn new(
        op: &'static str,
        source: Source,
        entry: &'static str,
        numbers: Vec<(&'static str, f32)>,
    ) -> Plan {
        Plan {
            op,
            lr: 0.0,
            clip: None,
            arena_limit: None,
            moments: Vec::new(),
            decays: None,
            source,
            entry,
            numbers,
        }
    }

    /// Checks what every optimizer has, and sets it.
    pub(super) fn settings(self, lr: f32, clip: Option<f32>, arena_limit: Option<u64>) -> Result<Plan> {
        at_least_zero(self.op, "lr", lr.into())?;
        match clip {
            Some(clip) if !(clip.is_finite() && clip > 0.0) => Err(Error::config(format!(
                "{}: clip is {clip}; use a finite number above 0, or None",
                self.op
            ))),
            _ => Ok(Plan { lr, clip, arena_limit, ..self }),
        }
    }
}

/// Checks the setting `name`, which must be finite and at least 0.
pub(super) fn at_least_zero(op: &str, name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::config(format!("{op}: {name} is {value}; use a finite number, 0 or more")))
}

/// Checks a share that a step keeps.
pub(super) fn below_one(op: &str, name: &str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::config(format!("{op}: {name} is {value}; use a number from 0 up to but not 1, such as 0.9")))
}

/// Checks the number that keeps a division from dividing by 0.
pub(super) fn above_zero(op: &str, name: &str, value: f32) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::config(format!("{op}: {name} is {value}; use a finite number above 0, such as 1e-8")))
}
