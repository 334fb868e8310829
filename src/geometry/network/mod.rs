//! PONITA: its settings, its separable convolution, the network, tables of its kernels, and files of its authors.

pub(super) mod config;
pub(super) mod conv;
mod import;
pub(super) mod ponita;
pub(super) mod tables;
mod tabulate;
