//! A model's tensors in several files, as Hugging Face's folders have them.

use serde_json::json;
use std::collections::BTreeMap;

/// Bytes of a file in folders, if nothing else is asked for: 5 GB, as in most models that are published.
pub(crate) const SHARD_BYTES: u64 = 5_000_000_000;

/// Distributes tensors of so many bytes, in their order, over files of up to `most` bytes. A larger tensor has a file of its own.
/// Returns each file's name and the numbers of its tensors.
pub(crate) fn sharded(bytes: impl IntoIterator<Item = u64>, most: u64) -> Vec<(String, Vec<usize>)> {
    let mut shards: Vec<Vec<usize>> = vec![Vec::new()];
    let mut size = 0u64;
    for (i, bytes) in bytes.into_iter().enumerate() {
        if size > 0 && size.saturating_add(bytes) > most {
            shards.push(Vec::new());
            size = 0;
        }
        size = size.saturating_add(bytes);
        shards.last_mut().expect("never empty").push(i);
    }
    let n = shards.len();
    let name = |i: usize| match n {
        1 => "model.safetensors".to_string(),
        _ => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
    };
    shards.into_iter().enumerate().map(|(i, all)| (name(i), all)).collect()
}

/// The text of [`INDEX`](super::INDEX): which file each tensor is in, and the bytes of all tensors.
pub(crate) fn index_of(places: BTreeMap<&str, &str>, bytes: u64) -> String {
    format!("{:#}\n", json!({"metadata": {"total_size": bytes}, "weight_map": places}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_filled_in_order() {
        let all = |bytes: &[u64], most| sharded(bytes.iter().copied(), most);
        let names = |shards: &[(String, Vec<usize>)]| -> Vec<Vec<usize>> {
            shards.iter().map(|(_, all)| all.clone()).collect()
        };
        assert_eq!(all(&[], 10), [("model.safetensors".to_string(), vec![])]);
        assert_eq!(all(&[3, 3, 4], 10), [("model.safetensors".to_string(), vec![0, 1, 2])]);
        let two = all(&[3, 3, 5], 10);
        assert_eq!(two[1], ("model-00002-of-00002.safetensors".to_string(), vec![2]));
        assert_eq!(names(&two), [vec![0, 1], vec![2]]);
        // A tensor that is larger than a file, and one without bytes before it.
        assert_eq!(names(&all(&[0, 20, 1, u64::MAX], 10)), [vec![0, 1], vec![2], vec![3]]);
    }
}
