//! A hash that tells the weights of models apart.

use crate::error::Result;
use twox_hash::XxHash3_128;

/// The hash of named tensors, each with its shape and bytes, in the order in which they come.
pub(crate) fn fingerprint<'a>(
    tensors: impl Iterator<Item = Result<(String, Vec<usize>, &'a [u8])>>,
) -> Result<u128> {
    let mut hasher = XxHash3_128::new();
    for tensor in tensors {
        let (name, shape, bytes) = tensor?;
        hasher.write(name.as_bytes());
        for size in shape.iter().chain([&bytes.len()]) {
            hasher.write(&(*size as u64).to_le_bytes());
        }
        hasher.write(bytes);
    }
    Ok(hasher.finish_128())
}
