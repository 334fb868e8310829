//! Models made of the floors below.

pub mod recursive;
