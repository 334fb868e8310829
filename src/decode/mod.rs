//! Serving models whose layers share weights.

mod depthwise;

pub use depthwise::{DepthBatch, Emitted, Exit, Oracle, Request, Scheduling};
