//! The table of token vectors, which many models use as their output head too.

use crate::nn::{Embedding, Epilogue, Module, SiteEmbedding, Visit, VisitMut};
use crate::ops::product::site::Site;
use crate::share::{Packed, Tied};
use crate::tensor::Tensor;
use std::sync::Arc;

/// Token vectors, stored as a leaf or packed.
#[derive(Clone)]
#[non_exhaustive]
pub enum TokenTable {
    /// A leaf.
    Stored(Embedding),
    /// Rows are unpacked as they are looked up.
    Packed(Packed),
    /// Rows of a weight that is computed of something else.
    Made(SiteEmbedding),
}

impl TokenTable {
    /// `ids [..] -> [.., width]`
    #[track_caller]
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        match self {
            TokenTable::Stored(table) => table.forward(ids),
            TokenTable::Packed(table) => table.rows(ids),
            TokenTable::Made(table) => table.forward(ids),
        }
    }

    /// Scores against every row, `x [.., width] -> [.., rows]`.
    #[track_caller]
    pub fn logits(&self, x: &Tensor) -> Tensor {
        match self {
            TokenTable::Stored(table) => table.logits(x),
            TokenTable::Packed(table) => x.linear(&table.clone().shared(), Epilogue::default()),
            TokenTable::Made(table) => table.logits(x),
        }
    }

    /// The table as a weight.
    pub(crate) fn weight(&self) -> Arc<dyn Site> {
        match self {
            TokenTable::Stored(table) => Tied::new(&table.table).shared(),
            TokenTable::Packed(table) => table.clone().shared(),
            TokenTable::Made(table) => table.weight.clone(),
        }
    }

    /// A table of its own with the same vectors, as a leaf.
    pub(crate) fn copied(&self, copy: impl Fn(&Tensor) -> Tensor) -> TokenTable {
        match self {
            TokenTable::Stored(table) => TokenTable::Stored(Embedding { table: copy(&table.table) }),
            TokenTable::Packed(table) => TokenTable::Stored(Embedding { table: copy(&table.expand()) }),
            TokenTable::Made(table) => TokenTable::Stored(Embedding { table: copy(&table.weight.expand()) }),
        }
    }
}

impl Module for TokenTable {
    fn visit(&self, visit: &mut Visit) {
        match self {
            TokenTable::Stored(table) => table.visit(visit),
            TokenTable::Packed(table) => table.visit(visit),
            TokenTable::Made(table) => table.visit(visit),
        }
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        match self {
            TokenTable::Stored(table) => table.visit_mut(visit),
            TokenTable::Packed(table) => table.visit_mut(visit),
            TokenTable::Made(table) => table.visit_mut(visit),
        }
    }
}
