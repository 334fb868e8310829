//! The table of token vectors, which many models use as their output head too.

use crate::gpu::Gpu;
use crate::nn::{Embedding, Epilogue, Module, Parameters};
use crate::ops::product::site::Site;
use crate::share::Packed;
use crate::tensor::Tensor;
use std::sync::Arc;

/// Token vectors, stored as a leaf or packed.
#[derive(Clone)]
#[non_exhaustive]
pub enum TokenTable {
    /// A leaf.
    Stored(Embedding),
    /// Rows are unpacked as they are looked up.
    Packed(Packed, Gpu),
}

impl TokenTable {
    /// `ids [..] -> [.., width]`
    #[track_caller]
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        match self {
            TokenTable::Stored(table) => table.forward(ids),
            TokenTable::Packed(table, _) => table.rows(ids),
        }
    }

    /// Scores against every row, `x [.., width] -> [.., rows]`.
    #[track_caller]
    pub fn logits(&self, x: &Tensor) -> Tensor {
        match self {
            TokenTable::Stored(table) => table.logits(x),
            TokenTable::Packed(table, _) => {
                x.linear(&(Arc::new(table.clone()) as Arc<dyn Site>), Epilogue::default())
            }
        }
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        match self {
            TokenTable::Stored(table) => table.table.gpu(),
            TokenTable::Packed(_, gpu) => gpu,
        }
    }

    /// A table with a copy of the leaf, or of the packed table, which nothing changes.
    pub(super) fn copied(&self, copy: impl Fn(&Tensor) -> Tensor) -> TokenTable {
        match self {
            TokenTable::Stored(table) => TokenTable::Stored(Embedding { table: copy(&table.table) }),
            TokenTable::Packed(table, gpu) => {
                let table = copy(&table.expand());
                debug_assert_eq!(table.gpu().adapter().name, gpu.adapter().name);
                TokenTable::Stored(Embedding { table })
            }
        }
    }
}

impl Module for TokenTable {
    fn parameters(&self, path: &str, all: &mut Parameters) {
        match self {
            TokenTable::Stored(table) => table.parameters(path, all),
            TokenTable::Packed(table, _) => all.add_site(path, table),
        }
    }
}
