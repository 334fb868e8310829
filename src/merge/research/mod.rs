//! Research methods of merging: learned from data, by trade-offs between tasks, reversible, and for robustness.

pub mod learned;
pub mod pareto;
pub mod pleas;
pub mod reversible;
pub mod signature;
