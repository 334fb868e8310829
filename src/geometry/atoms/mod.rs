//! Atoms: elements, files of atoms, a potential with forces, a calculator for simulations, dynamics.

pub(super) mod calculator;
pub mod dynamics;
pub mod elements;
pub(super) mod forces;
pub mod nbody;
pub(super) mod parts;
pub(super) mod potential;
pub mod xyz;
