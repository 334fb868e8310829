//! The `smollm` family: scores of a real model, SmolLM2-135M, by another implementation on the same GGUF file.
//! `scripts/peer-smollm.py` computed them.

use super::tying::{open, values};
use crate::support::{download, gpu};
use std::path::{Path, PathBuf};
use tiebeam::Tensor;
use tiebeam::models::lm::Lm;
use tiebeam::store::gguf::Gguf;

pub const FILES: &[(&str, super::Check)] = &[("smollm2_135m", smollm2)];

fn model() -> PathBuf {
    if let Some(path) = std::env::var_os("TIEBEAM_SMOLLM2") {
        return path.into();
    }
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).unwrap_or_default();
    cache.join("tiebeam/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// The reason why the family cannot be checked here, if any.
pub fn lacks() -> Option<String> {
    let path = model();
    (!path.is_file()).then(|| format!("no {}; scripts/fetch-smollm.sh obtains it", path.display()))
}

fn smollm2(path: &Path) {
    let file = open(path);
    let integers = |name: &str| file.tensor_i32(name).unwrap_or_else(|e| panic!("{e}"));
    let tokens: Vec<u32> = integers("tokens").into_iter().map(|t| t as u32).collect();
    let (ids, best) = (integers("ids"), integers("best"));
    let (want, sums) = (values(&file, "scores"), values(&file, "logsumexp"));
    let model = Gguf::open(model()).and_then(|f| Lm::from_gguf(gpu(), &f, tokens.len()));
    let model = model.unwrap_or_else(|e| panic!("{e}"));
    let x = Tensor::from_slice(gpu(), &tokens, [1, tokens.len()]);
    let scores = download(&tiebeam::no_grad(|| model.forward(&x)));
    let vocab = model.config.vocab;
    let mut worst = 0.0f64;
    for (t, row) in scores.chunks(vocab).enumerate() {
        for (i, &id) in ids.iter().enumerate() {
            worst = worst.max((row[id as usize] - want[t * ids.len() + i]).abs());
        }
        let most = row.iter().copied().fold(f64::MIN, f64::max);
        let sum = most + row.iter().map(|s| (s - most).exp()).sum::<f64>().ln();
        worst = worst.max((sum - sums[t]).abs());
        assert_eq!(row[best[t] as usize], most, "the best token behind token {t}");
    }
    // f32 through 30 blocks is compared with f64. The largest error so far was 6.5e-5.
    assert!(worst < 4e-4, "scores are off by {worst:e}");
}
