//! The house itself: floors and circles of its files, its kernels on every target, plans for devices that are not here. No device
//! needed.

mod floors;
mod plans;
mod shaders;
#[path = "../support/mod.rs"]
mod support;
