//! Tests of the code base: the floors and circular uses of its files, its public pages, its kernels on every target, and plans for
//! devices that are not present. They need no device.

mod docs;
mod floors;
mod law;
mod plans;
mod shaders;
#[path = "../support/mod.rs"]
mod support;
