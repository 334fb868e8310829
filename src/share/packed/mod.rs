//! Packed weights: few bits for each weight and a scale for each group of columns, unpacked as they are read.

pub mod format;

pub use format::{Packing, Scales};
