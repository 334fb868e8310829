//! Ops that make or only move elements: patterns of positions, layouts, rows gathered by ids, and the check of ids.

pub mod check_ids;
pub mod create;
pub mod embedding;
pub mod embedding_sum;
pub mod layout;
pub mod rearrange;
pub(crate) mod running;

crate::ops::listed!(layout, create, rearrange, embedding, check_ids);
