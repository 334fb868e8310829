//! Batches for training: datasets on the host, and a loader that shuffles them, stacks them and reads ahead.
//!
//! * [`Dataset`] is anything with numbered items: a `Vec`, a tuple of columns of equal length, [`Rows`] of an array, or a type of
//!   yours that reads files.
//! * [`DataLoader`] takes its items in batches, in order or shuffled by a seed, and makes them on a thread of its own while the
//!   device trains.
//! * [`Stack`] makes tensors of a batch of items. A loader with a function of yours makes anything else.
//!
//! The order of an epoch is a function of seed, number of the epoch and number of items, and is the same on every platform. Reading
//! ahead changes no batch. So a run that continues with [`DataLoader::iter_from`] sees what it would have seen without the stop.
//!
//! ```
//! use tiebeam::data::DataLoader;
//! use tiebeam::nn::{Init, Linear, Parameters};
//! use tiebeam::optim::{Group, Sgd, SgdConfig};
//! use tiebeam::{Gpu, Rng};
//!
//! let gpu = Gpu::open()?;
//! // The line y = 2 x + 1, at eight points.
//! let x: Vec<[f32; 1]> = (0..8).map(|i| [i as f32 / 8.0]).collect();
//! let y: Vec<[f32; 1]> = x.iter().map(|[x]| [2.0 * x + 1.0]).collect();
//! let loader = DataLoader::new(&gpu, (x, y)).batch_size(4).shuffle(7);
//!
//! let model = Linear::new(&gpu, 1, 1, true, Init::Zeros, &mut Rng::new(1));
//! let parameters = Parameters::of(&model);
//! let group = Group::new(parameters.named().iter().map(|(name, p)| (name, p)));
//! let mut sgd = Sgd::new(&gpu, vec![group], SgdConfig::default())?;
//! let mut last = f32::INFINITY;
//! for epoch in 0..10 {
//!     for batch in loader.iter(epoch) {
//!         let (x, y) = batch?;
//!         let loss = model.forward(&x).sub(&y).square().mean_all();
//!         sgd.step(&loss.backward()?, 0.3)?;
//!         last = loss.item()?;
//!     }
//! }
//! assert!(last < 0.1, "{last}");
//! # Ok::<(), tiebeam::Error>(())
//! ```

mod batches;
mod dataset;
mod loader;
mod stack;

pub use batches::Batches;
pub use dataset::{Dataset, Rows};
pub use loader::DataLoader;
pub use stack::{Row, Stack};
