//! Decoding: choosing tokens, measuring how well a model predicts a text, and serving models whose layers share weights.

mod depthwise;
mod generate;
mod perplexity;
mod sample;

pub use depthwise::{DepthBatch, Emitted, Exit, Oracle, Request, Scheduling};
pub use perplexity::{Windows, perplexity, perplexity_with};
pub use sample::{Sampler, SamplerOptions};
