//! Serving models whose layers share weights, and measuring how well language models predict a text.

mod depthwise;
mod perplexity;

pub use depthwise::{DepthBatch, Emitted, Exit, Oracle, Request, Scheduling};
pub use perplexity::{Windows, perplexity, perplexity_with};
