//! Models made of the floors below.

pub mod mor;
pub mod recursive;
