//! Reads and writes model files: safetensors, checkpoints, packed weights, GGUF and NumPy's arrays.
//!
//! * [`File`] maps a safetensors file, refuses an inconsistent header, and converts tensors to the engine's types.
//! * [`gguf::Gguf`] reads llama.cpp's files, including quantised weights and the tokenizer, and [`gguf::save`] writes them.
//! * [`QuantConfig`] reads the packed weights of compressed-tensors, GPTQ and AWQ.
//! * [`Weights`] is a model's named tensors, read one at a time. [`Shards`] is a model on disk, in one file or several.
//! * [`save`] writes a file atomically. Equal tensors give equal bytes.
//! * `load_npy`, `load_npz`, `save_npy` and `save_npz` exchange arrays with NumPy. They need the feature `npy`.
//!
//! The format of safetensors (<https://github.com/huggingface/safetensors>) has three parts. First comes the header's length, a
//! little-endian `u64`. The header is a JSON object `{"__metadata__": {string: string}, name: {"dtype", "shape", "data_offsets":
//! [begin, end]}, ...}`. The data are little-endian and row-major, and the tensors cover them without gaps.

mod bytes;
mod checkpoint;
mod dtype;
mod file;
mod fingerprint;
mod foreign;
pub mod gguf;
mod header;
mod hub;
#[cfg(feature = "npy")]
mod npy;
mod packed;
mod save;
mod settings;
mod sharding;
mod shards;
mod weights;

pub use bytes::bf16_bytes;
pub use checkpoint::{
    Checkpoint, load_checkpoint, load_tensors, load_tensors_as_stored, save_checkpoint, save_tensors,
};
pub(crate) use checkpoint::{OPTIMIZER, devices, overwrite, read_checkpoint, stored, write_params};
pub use dtype::FileDType;
pub use file::{File, Info};
pub(crate) use file::{nearest, some};
pub(crate) use fingerprint::fingerprint;
pub use hub::located;
pub(crate) use hub::{is_cached, missing, named};
#[cfg(feature = "npy")]
pub use npy::{load_npy, load_npz, save_npy, save_npz};
pub use packed::{PackedRows, QuantConfig};
pub use save::{Entry, save};
pub use settings::settings_in;
pub(crate) use settings::{is_tokenizer, others_in};
pub(crate) use sharding::{SHARD_BYTES, index_of, sharded};
pub use shards::Shards;
pub(crate) use shards::{INDEX, needs_folder, same_weights};
pub use weights::{Tracked, Weights};

// Slices of numbers are written with their bytes in memory, which must be little-endian as in the file. Every platform with a GPU
// is.
const _: () = assert!(cfg!(target_endian = "little"), "tiebeam::store needs a little-endian host");
