//! Methods that merge by more than weights alone: by data, by trade-offs, reversibly, for robustness.

pub mod learned;
pub mod pareto;
pub mod pleas;
pub mod reversible;
pub mod signature;
