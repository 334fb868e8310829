//! The maps from stored leaves to the weights that are used. Each kind is a [`Site`]: one load, one adjoint.
//!
//! | kind | weight | stored |
//! |---|---|---|
//! | [`Tied`] | `W_s = theta`, the same at every site | `theta` |
//! | [`LowRank`] | `W_s = theta + scale * B_s A_s` | `theta`, and `A_s`, `B_s` per site |
//! | [`Factored`] | `W = B A` | `A`, `B` |
//! | [`Dictionary`] | `W_l = sum_s c[l, s] D_s` | atoms `D`, coefficients `c` |
//! | [`Hashed`] | `W[i] = scale sign(i) omega[position(i)]` | `omega` |
//! | [`ShardPool`] | `W + scale B_k A_k`, with the rows of both assembled from shards | two pools |
//! | [`Miss`] | `W[i, j] + d[j mod r, i mod m]` | `d` |
//! | [`Bone`] | `W + W_blocks B + B` | blocks `B` |
//! | [`Packed`] | `W = scale q + offset`, alone or with trained scales | levels `q` of a few bits, scales, offsets |
//!
//! The weight of [`LowRank`], [`ShardPool`], [`Miss`] and [`Bone`] is stored, or of another kind: their `over` takes any site. All but
//! `Bone` also take packed weights, which is QLoRA's layer with other adapters.
//!
//! [`DepthLora`] and [`Dictionary::mixed`] multiply rows at different depths in one product. [`UnifiedEmbedding`] is one
//! table for many features.

mod base;
pub mod dictionary;
pub mod hashed;
pub mod law;
pub mod mixed;
pub mod packed;
pub mod shards;
pub mod tied;

pub use crate::ops::product::site::{LeafGrads, Load, Site};
pub use dictionary::{CoefficientNet, Dictionary, matrix_pca};
pub use hashed::{Draw, Hashed, Mapping, UnifiedEmbedding};
pub use law::{Reduced, check_law};
pub use mixed::DepthLora;
pub use packed::{Packed, PackedScales, Packing, Scales};
pub use shards::{Bone, Miss, ShardConfig, ShardPool};
pub use tied::{Factored, LowRank, Tied};

use crate::ops::case::Case;

/// Every test case of every sharing kind, with the kind's name, for the tests and the benchmark.
pub fn cases() -> Vec<(&'static str, Vec<Case>)> {
    let tied = |w: &crate::Tensor| Tied::new(w).shared();
    vec![
        ("tied", tied::cases()),
        ("routed", crate::ops::product::routed::cases(tied)),
        ("dictionary", dictionary::cases()),
        ("hashed", hashed::cases()),
        ("shards", shards::cases()),
        ("mixed", mixed::cases()),
        ("packed", packed::cases()),
    ]
}
