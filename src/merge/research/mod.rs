//! Merging that looks at data, and other sets of models: what each method computes.

pub mod cma;
pub mod extract;
pub mod fisher;
pub mod learn;
pub mod learned;
pub mod map;
pub mod pareto;
pub mod partial;
pub mod pleas;
pub mod reversible;
pub mod signature;
pub mod store;
