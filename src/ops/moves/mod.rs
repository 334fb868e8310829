//! Elements that only move: layouts, gathered rows and the ids that they are gathered by.

pub mod check_ids;
pub mod embedding;
pub mod layout;

crate::ops::listed!(layout, embedding, check_ids);
