//! Commands as values, which are recorded once and encoded again at every replay of a step.

use super::kernel::{Bind, Live, Param};
use super::pipeline::Pipeline;
use super::texel;
use crate::error::Error;
use crate::rng;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

/// A command that a recorder encodes.
#[derive(Clone)]
pub(super) enum Command {
    Dispatch(Dispatch),
    /// Copies an operand into the texture from which the next dispatch reads it.
    Texels(texel::Copy),
    /// Runs code on the host at this place of a replay.
    Hook(Arc<dyn Fn() + Send + Sync>),
}

impl Command {
    /// Whether nothing keeps it from being encoded: neither the compiler, nor a kernel that the driver refused.
    pub fn is_ready(&self) -> bool {
        match self {
            Command::Dispatch(dispatch) => matches!(dispatch.pipeline.made(), Some(Ok(_))),
            Command::Texels(_) | Command::Hook(_) => true,
        }
    }

    /// Returns the error of a kernel that the driver refused, or has not compiled in time. Waits for the compiler.
    pub fn refused(&self) -> Option<Error> {
        match self {
            Command::Dispatch(dispatch) => match dispatch.pipeline.wait() {
                Ok(made) => made.as_ref().err().cloned(),
                Err(late) => Some(late),
            },
            Command::Texels(_) | Command::Hook(_) => None,
        }
    }
}

/// A pipeline with its bindings, parameters and grid.
#[derive(Clone)]
pub(super) struct Dispatch {
    pub pipeline: Arc<Pipeline>,
    pub group: wgpu::BindGroup,
    /// The bytes of the parameters as they were recorded.
    pub params: Vec<u8>,
    pub grid: [u32; 3],
    /// Estimated seconds on this device.
    pub seconds: f64,
    pub live: Option<Live>,
}

/// The values that change between replays: the optimizers' rates, and how far random generators have advanced.
pub(super) struct Now<'a> {
    pub rates: &'a [f32],
    pub shifts: &'a rng::Shifts<'a>,
}

impl Dispatch {
    /// Returns the parameters with the values of `now`, or as they were recorded.
    pub fn params(&self, now: Option<&Now>) -> Cow<'_, [u8]> {
        let (Some(live), Some(now), Some(layout)) = (&self.live, now, &self.pipeline.interface.params) else {
            return Cow::Borrowed(&self.params);
        };
        let mut bytes = self.params.clone();
        let mut replace = |name: &str, param: Param| {
            layout.replace(&mut bytes, name, &param).expect("the launch has set the same parameters");
        };
        match live {
            Live::Stream { generator } => {
                let [low, high] = layout.words(&self.params, "stream").expect("the launch has set it");
                if let Some(stream) = now.shifts.stream(*generator, low as u64 | (high as u64) << 32) {
                    replace("key", stream.key.into());
                    replace("stream", stream.id.into());
                }
            }
            Live::Numbers(make) => {
                make(now.rates).into_iter().for_each(|(name, number)| replace(name, number.into()));
            }
        }
        Cow::Owned(bytes)
    }
}

/// The key of a bind group: everything that it depends on.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct GroupKey {
    pipeline: u64,
    binds: Vec<(u32, wgpu::Buffer, u64, u64)>,
}

impl GroupKey {
    pub fn new(pipeline: &Pipeline, binds: &[Bind], numbers: &[u32], raws: &[&wgpu::Buffer]) -> GroupKey {
        let bind = |((bind, number), raw): ((&Bind, &u32), &&wgpu::Buffer)| {
            (*number, (*raw).clone(), bind.part.offset, bind.part.size)
        };
        GroupKey { pipeline: pipeline.id, binds: binds.iter().zip(numbers).zip(raws).map(bind).collect() }
    }
}

/// A cache of bind groups, for the steady state in which the pool hands the same buffers to the same kernels again.
/// Bind groups keep their buffers alive, so the cache is cleared when the pool gives buffers back to the driver, or
/// when it is full.
#[derive(Default)]
pub(super) struct Groups {
    made: HashMap<GroupKey, wgpu::BindGroup>,
    trims: u64,
}

impl Groups {
    pub fn clear(&mut self) {
        self.made.clear();
    }

    pub fn get(
        &mut self,
        trims: u64,
        key: GroupKey,
        make: impl FnOnce() -> wgpu::BindGroup,
    ) -> wgpu::BindGroup {
        const MOST: usize = 2048;
        if self.trims != trims || self.made.len() >= MOST {
            self.made.clear();
            self.trims = trims;
        }
        self.made.entry(key).or_insert_with(make).clone()
    }
}
