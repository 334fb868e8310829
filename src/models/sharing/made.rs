//! Weights that a pass computes for many depths at once.

use crate::nn::{Module, Visit, VisitMut};
use crate::ops::product::site::Site;
use crate::share::{CoefficientNet, Dictionary, LowRank};
use crate::tensor::Tensor;
use std::ops::Range;
use std::sync::Arc;

/// One matrix of neighbouring blocks, computed from a dictionary (MASA).
#[derive(Clone)]
pub struct Made {
    /// Its name, as in [`Matrix`](super::Matrix).
    pub matrix: &'static str,
    /// The blocks.
    pub layers: Range<usize>,
    /// The dictionary, which has one layer for each block.
    pub dictionary: Dictionary,
    /// Where the coefficients come from, if a network makes them. Those in `dictionary` are then its base, `C0`.
    pub net: Option<CoefficientNet>,
    /// `A [rank, in]` and `B [out, rank]` of each block, whose product is added. Empty if there are none.
    pub own: Vec<[Tensor; 2]>,
}

impl Made {
    /// The weights of all blocks, computed in one pass. Their gradients are computed in one pass too.
    pub fn sites(&self) -> Vec<Arc<dyn Site>> {
        let dictionary = match &self.net {
            Some(net) => Dictionary::new(&self.dictionary.atoms, &net.forward()),
            None => self.dictionary.clone(),
        };
        if self.own.is_empty() {
            return dictionary.weights();
        }
        let all = dictionary.atoms.combine(&dictionary.coefficients);
        let with = |(w, [a, b]): (&Tensor, &[Tensor; 2])| LowRank::new(w, a, b, 1.0).shared();
        all.iter().zip(&self.own).map(with).collect()
    }

    /// What stands in a block in the place of a weight that is made: the dictionary's own site, which computes the weight as it is
    /// read. Low-rank parts and what a network adds are not in it.
    pub fn place(&self, layer: usize) -> Arc<dyn Site> {
        self.dictionary.site(layer)
    }
}

/// Weights are made of the dictionary and of the low-rank parts, so these count as stored and not as used.
impl Module for Made {
    fn visit(&self, visit: &mut Visit) {
        match &self.net {
            Some(net) => {
                visit.store("atoms", &self.dictionary.atoms);
                visit.store("net.embedding", &net.embedding);
                for (i, [weight, bias]) in net.layers.iter().enumerate() {
                    visit.store(&format!("net.{i}.weight"), weight);
                    visit.store(&format!("net.{i}.bias"), bias);
                }
                net.base.iter().for_each(|base| visit.store("net.base", base));
            }
            None => self.dictionary.visit(visit),
        }
        for (l, [a, b]) in self.own.iter().enumerate() {
            visit.store(&format!("{l}.a"), a);
            visit.store(&format!("{l}.b"), b);
        }
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.dictionary);
        visit.field(&mut self.net);
        visit.field(&mut self.own);
    }
}
