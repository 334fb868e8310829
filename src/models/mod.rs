//! Models, built of what the floors below provide.

pub mod adapter;
pub mod conversion;
pub mod convert;
pub mod experts;
pub mod foldgpt;
pub mod llama;
pub mod lm;
pub mod masa;
pub mod mor;
pub mod network;
pub mod sharing;
pub mod sret;
