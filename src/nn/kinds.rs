//! The sharing kinds that are held as such, and not as a weight, as modules.

use super::{Module, Visit, VisitMut, module};
use crate::ops::product::site::Site;
use crate::ops::sequence::rope::Rope;
use crate::share::{CoefficientNet, Dictionary, Packed, ShardPool, UnifiedEmbedding};

/// Sites make weights of the atoms, so these count as stored and not as used.
impl Module for Dictionary {
    fn visit(&self, visit: &mut Visit) {
        visit.store("atoms", &self.atoms);
        visit.store("coefficients", &self.coefficients);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.atoms);
        visit.field(&mut self.coefficients);
    }
}

/// As [`Dictionary`]. Its sites list the pools too, with the layer's indices, so a model whose layers hold them needs no field for it.
impl Module for ShardPool {
    fn visit(&self, visit: &mut Visit) {
        visit.store("pool_a", &self.pool_a);
        visit.store("pool_b", &self.pool_b);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.pool_a);
        visit.field(&mut self.pool_b);
    }
}

module!(CoefficientNet { embedding, layers, base });
module!(UnifiedEmbedding { table, chunks: _ });

impl Module for Packed {
    fn visit(&self, visit: &mut Visit) {
        visit.site(self);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        let mut words = self.buffers().remove(0).1;
        visit.field(&mut words);
        *self = self.with_words(&words);
    }
}

/// The angles follow from the settings, so no file has them.
impl Module for Rope {
    fn visit(&self, visit: &mut Visit) {
        visit.constant("table", &self.table);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.table);
    }
}
