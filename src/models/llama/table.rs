//! The table of token vectors, which many models use as their output head too.

use crate::gpu::Gpu;
use crate::nn::{Embedding, Epilogue, Module, Visit, VisitMut};
use crate::ops::product::site::Site;
use crate::share::Packed;
use crate::tensor::Tensor;

/// Token vectors, stored as a leaf or packed.
#[derive(Clone)]
#[non_exhaustive]
pub enum TokenTable {
    /// A leaf.
    Stored(Embedding),
    /// Rows are unpacked as they are looked up.
    Packed(Packed),
}

impl TokenTable {
    /// `ids [..] -> [.., width]`
    #[track_caller]
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        match self {
            TokenTable::Stored(table) => table.forward(ids),
            TokenTable::Packed(table) => table.rows(ids),
        }
    }

    /// Scores against every row, `x [.., width] -> [.., rows]`.
    #[track_caller]
    pub fn logits(&self, x: &Tensor) -> Tensor {
        match self {
            TokenTable::Stored(table) => table.logits(x),
            TokenTable::Packed(table) => x.linear(&table.clone().shared(), Epilogue::default()),
        }
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        match self {
            TokenTable::Stored(table) => table.table.gpu(),
            TokenTable::Packed(table) => table.gpu(),
        }
    }

    /// A table of its own with the same vectors, as a leaf.
    pub(super) fn copied(&self, copy: impl Fn(&Tensor) -> Tensor) -> TokenTable {
        match self {
            TokenTable::Stored(table) => TokenTable::Stored(Embedding { table: copy(&table.table) }),
            TokenTable::Packed(table) => TokenTable::Stored(Embedding { table: copy(&table.expand()) }),
        }
    }
}

impl Module for TokenTable {
    fn visit(&self, visit: &mut Visit) {
        match self {
            TokenTable::Stored(table) => table.visit(visit),
            TokenTable::Packed(table) => table.visit(visit),
        }
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        match self {
            TokenTable::Stored(table) => table.visit_mut(visit),
            TokenTable::Packed(table) => table.visit_mut(visit),
        }
    }
}
