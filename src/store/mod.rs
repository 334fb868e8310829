//! Files: safetensors in and out, at host level.
//!
//! * [`File`] maps a file, refuses a header that lies, and converts tensors to what the engine computes in.
//! * [`gguf::Gguf`] reads llama.cpp's files, quantised weights and tokenizer included.
//! * [`Weights`] is a model's named tensors, read one at a time; [`Shards`] one on disk, in one file or several.
//! * [`save`] writes a file whole or not at all, the same bytes for the same tensors.
//!
//! The format (<https://github.com/huggingface/safetensors>): a little-endian `u64`, the header's length; the
//! header, a JSON object `{"__metadata__": {string: string}, name: {"dtype", "shape", "data_offsets": [begin,
//! end]}, ...}`; the data, little-endian and row-major, which the tensors cover without holes.

mod bytes;
mod checkpoint;
mod dtype;
mod file;
pub mod gguf;
mod header;
mod save;
mod weights;

pub use bytes::bf16_bytes;
pub use checkpoint::{Checkpoint, load_checkpoint, load_tensors, save_checkpoint, save_tensors};
pub use dtype::FileDType;
pub(crate) use file::nearest;
pub use file::{File, Info};
pub use save::{Entry, save};
pub(crate) use weights::INDEX;
pub use weights::{Shards, Weights};

// Slices of numbers are written as the bytes that they are in memory; every platform with a GPU is
// little-endian.
const _: () = assert!(cfg!(target_endian = "little"), "tiebeam::store needs a little-endian host");
