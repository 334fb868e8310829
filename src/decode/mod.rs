//! Decoding: choosing tokens, and serving models whose layers share weights.

mod depthwise;
mod sample;

pub use depthwise::{DepthBatch, Emitted, Exit, Oracle, Request, Scheduling};
pub use sample::{Sampler, SamplerOptions};
