//! Training language models on text: what `tiebeam train` does.
//!
//! A [`Corpus`] is a text as tokens, of which a part is held out. A [`Training`] takes an [`Lm`](crate::models::lm::Lm) through it: batches,
//! schedule, validation, a checkpoint at each point of its curve, and the same bits if it was stopped and goes on. It prints nothing.

mod corpus;
mod curve;
mod data;
#[cfg(feature = "text")]
mod examples;
mod gates;
mod training;

pub use crate::models::lm::{evaluate, evaluate_on};
pub use corpus::Corpus;
pub use curve::Point;
pub use data::{Data, Part};
#[cfg(feature = "text")]
pub use examples::Examples;
pub use gates::{GateOptions, GateTraining};
pub use training::{Progress, Training, TrainingOptions};
