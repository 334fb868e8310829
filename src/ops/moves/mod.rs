//! Ops that only move elements: layouts, rows gathered by ids, and the check of ids.

pub mod check_ids;
pub mod embedding;
pub mod embedding_sum;
pub mod layout;

crate::ops::listed!(layout, embedding, check_ids);
