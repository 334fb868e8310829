//! The engine: device, tensors, tape, recorded steps, optimizers, sharing, files.

mod adapters;
mod assignment;
mod averages;
mod data;
mod depthwise;
mod device;
mod files;
mod folders;
mod graphs;
mod law;
mod modules;
mod ndarray;
mod npy;
mod optim;
mod optimizers;
mod overflow;
mod packed;
mod precision;
mod random;
mod ranks;
mod scalars;
mod shards;
mod sharing;
#[path = "../support/mod.rs"]
mod support;
mod trainer;
mod training;
