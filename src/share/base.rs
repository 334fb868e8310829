//! The weight of any kind to which a part is added as it is read: what the sites of such parts have in common.

use super::{LeafGrads, Load, Site};
use crate::tensor::Tensor;
use std::sync::{Arc, Mutex, PoisonError};

/// A site's base. Its leaves and buffers stand before those of the part, so that its adjoint finds them where it expects them.
#[derive(Clone)]
pub(super) struct Base(pub Arc<dyn Site>);

impl Base {
    /// The position of the part's first leaf.
    pub fn first(&self) -> usize {
        self.0.leaves().len()
    }

    /// The base's leaves and these.
    pub fn leaves<const N: usize>(&self, own: [&Tensor; N]) -> Vec<Tensor> {
        self.0.leaves().into_iter().chain(own.map(Tensor::clone)).collect()
    }

    /// The names of the base's leaves and these.
    pub fn names(&self, own: &'static [&'static str]) -> &'static [&'static str] {
        // They live as long as the program. There are only as many as pairs of kinds.
        static JOINED: Mutex<Vec<&'static [&'static str]>> = Mutex::new(Vec::new());
        let base = self.0.leaf_names();
        if base.is_empty() {
            return own;
        }
        let mut known = JOINED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(names) = known.iter().find(|names| names.iter().eq(base.iter().chain(own))) {
            return names;
        }
        let names: &[&str] = Vec::leak(base.iter().chain(own).copied().collect());
        known.push(names);
        names
    }

    /// A base of the first of these leaves and buffers, and the others.
    pub fn split<'a>(&self, leaves: &'a [Tensor], buffers: &'a [Tensor]) -> (Base, [&'a [Tensor]; 2]) {
        let (base, leaves) = leaves.split_at(self.first());
        let (stored, buffers) = buffers.split_at(self.0.buffers().len());
        (Base(self.0.with_tensors(base, stored)), [leaves, buffers])
    }

    /// A load to which a private part can be added: the base's own, or that of the weight that it makes.
    pub fn load(&self) -> Load {
        let load = self.0.load();
        if load.takes_private() { load } else { Load::stored(self.0.expand()) }
    }

    fn needs(&self, grads: &LeafGrads) -> bool {
        (0..self.first()).any(|i| grads.needs(i))
    }

    /// The base's [`Site::reduce`], if it is trained.
    pub fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        if self.needs(grads) {
            self.0.reduce(dw, grads);
        }
    }

    /// The base's [`Site::backward`], if it is trained.
    pub fn backward(&self, x: &Tensor, dy: &Tensor, grads: &mut LeafGrads) {
        if self.needs(grads) {
            self.0.backward(x, dy, grads);
        }
    }
}
