//! Published language models of the Llama type, read as [`Lm`](crate::models::lm::Lm)s: RMS norms, rotary positions, grouped-query
//! attention, SwiGLU.
//!
//! Weights come from llama.cpp's GGUF files or from safetensors with the names of Hugging Face ([`Published`]), as leaves in f32 or as
//! they are stored: packed, or in 16 bits. Llama 2 and 3, Mistral, Qwen2 and SmolLM have this form. They differ in biases, in the width
//! of heads, in how rotary angles are scaled, in which elements of a head are rotated together, and in how far back attention
//! reaches.

mod config;
mod convert;
mod gguf;
mod published;
mod read;
mod write;

pub use config::LlamaSettings;
pub use published::Published;
pub use read::Form;
pub(crate) use read::PATHS;
pub(crate) use write::half_row;
