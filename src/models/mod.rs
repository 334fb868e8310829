//! Models, built of what the floors below provide.

pub mod convert;
pub mod foldgpt;
pub mod llama;
pub mod masa;
pub mod mor;
pub mod recursive;
pub mod sharing;
pub mod sret;
pub mod widenet;
