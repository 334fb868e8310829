//! The maps from what is stored to what is used. Each kind is a [`Site`]: one load, one adjoint.
//!
//! | kind | weight | stored |
//! |---|---|---|
//! | [`Tied`] | `W_s = theta`, the same at every site | `theta` |
//! | [`LowRank`] | `W_s = theta + scale * B_s A_s` | `theta`, and `A_s`, `B_s` a site |

pub mod tied;

pub use crate::ops::site::{LeafGrads, Load, Site};
pub use tied::{LowRank, Tied};

use crate::ops::case::Case;

/// Every test case of every sharing kind.
#[doc(hidden)]
pub fn cases() -> Vec<(&'static str, Vec<Case>)> {
    let tied = |w: &crate::Tensor| std::sync::Arc::new(Tied::new(w)) as std::sync::Arc<dyn Site>;
    vec![("tied", tied::cases()), ("routed", crate::ops::matmul::routed::cases(tied))]
}
