//! Rounds weights to a few bits, and writes them in the layouts of packed matrices, of GGUF and of Hugging Face's folders.
//!
//! [`round`] takes the nearest level of every weight, and for each group of weights the range of levels with the least error.
//! It needs no data and no device. [`Job`] rounds a whole model, from a folder of Hugging Face to a folder or a GGUF file, or from a
//! GGUF file to a GGUF file.
//!
//! ```
//! use tiebeam::quant::{Form, Rounding, round};
//!
//! let w: Vec<f32> = (0..64).map(|i| (i as f32 * 0.7).sin()).collect();
//! let rounded = round("w", &w, [2, 32], &Rounding::new(4, Form::Symmetric))?;
//! assert!(rounded.error / 64.0 < 0.003);
//! let (packing, words) = rounded.to_packing()?;
//! assert_eq!(packing.decode(&words, 32), rounded.values());
//! # Ok::<(), tiebeam::Error>(())
//! ```

mod encode;
mod job;
mod plan;
mod round;
mod search;
mod write;

pub use job::{Format, Item, Job, JobSettings};
pub use plan::{Part, Plan};
pub use round::{Rounded, round};
pub use search::{Form, POWER, Rounding, Stored};
pub use write::{Measured, Progress};
