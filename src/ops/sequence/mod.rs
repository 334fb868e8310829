//! Ops of transformers over tokens: attention, its cache of keys and values, rotary positions.

pub mod attention;
pub mod cache;
pub mod rope;

crate::ops::listed!(attention, cache, rope);
