//! Ops that compare elements: sorting, ranks and assignments.

pub mod assignment;
pub mod rank;
pub mod sort;

crate::ops::listed!(sort, rank, assignment);
