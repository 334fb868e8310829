//! Modules that run on other tensors than their own.

use super::module::{Module, VisitMut};
use super::parameters::{Identity, Item, Role};
use crate::error::{Error, Result};
use crate::store::Weights;
use crate::tensor::Tensor;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Runs a module with `weights` in the place of its parameters and buffers of the same names, as `torch.func.functional_call` does.
/// Weights that are tracked are tracked by what `run` computes: coefficients of which they were made can be trained through any
/// module. The module has its own tensors again behind the call, also if `run` panics.
///
/// A tensor with several names may have any of them in `weights`. What `weights` lacks stays the module's own.
///
/// ```
/// use std::collections::BTreeMap;
/// use tiebeam::nn::{Init, Linear, functional};
/// use tiebeam::store::Tracked;
/// use tiebeam::{Gpu, Rng, Tensor};
/// let gpu = Gpu::open()?;
/// let mut layer = Linear::new(&gpu, 3, 2, true, Init::KaimingUniform, &mut Rng::new(1));
/// // theta = base + c tau, with one coefficient to train.
/// let c = Tensor::scalar(&gpu, 0.5).requires_grad();
/// let [base, tau] = [1.0, 4.0].map(|value| Tensor::full(&gpu, [2, 3], value));
/// let weights = BTreeMap::from([("weight".to_string(), base.add(&tau.mul(&c)))]);
/// let x = Tensor::ones(&gpu, [1, 3]);
/// let y = functional(&mut layer, &Tracked(&weights), |layer| layer.forward(&x))?;
/// assert_eq!(y.to_vec::<f32>()?, [9.0, 9.0]);
/// assert_eq!(y.sum_all().backward()?.get(&c).expect("a gradient").item()?, 24.0);
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// # Errors
/// When `weights` have a name that the module lacks, or another shape; when a tensor cannot be read; when the module holds a tensor
/// that is computed from a leaf, which would go on to read the old one.
pub fn functional<M: Module, T>(
    module: &mut M,
    weights: &dyn Weights,
    run: impl FnOnce(&M) -> T,
) -> Result<T> {
    let all = module.parameters();
    if let Some((name, _)) = all.computed.first() {
        return Err(Error::config(format!(
            "`{name}` is computed from a leaf; compute it in forward instead"
        )));
    }
    let given: BTreeSet<String> = weights.names().into_iter().collect();
    let kept: Vec<&Item> = all.items.iter().filter(|item| item.role != Role::Constant).collect();
    let known = |name: &String| kept.iter().any(|item| item.names.contains(name));
    if let Some(name) = given.iter().find(|name| !known(name)) {
        let all: Vec<&str> = kept.iter().map(|item| item.names[0].as_str()).collect();
        let near = crate::store::nearest(name, all.iter().copied());
        return Err(Error::config(format!("the module has no tensor `{name}`; near: {near}")));
    }
    // The way back is found by identity, so each new tensor must be one that the module does not hold elsewhere.
    let mut held: HashSet<_> = all.items.iter().map(|item| Identity::of(&item.tensor)).collect();
    let (mut there, mut back) = (HashMap::new(), HashMap::new());
    for item in kept {
        let Some(name) = item.names.iter().find(|name| given.contains(*name)) else { continue };
        let old = &item.tensor;
        let mut new = weights.read(old.gpu(), name)?;
        if new.shape() != old.shape() {
            let message =
                format!("`{name}` is {} in the module, the weights have {}", old.shape(), new.shape());
            return Err(Error::config(message));
        }
        if !held.insert(Identity::of(&new)) {
            new = new.affine(1.0, 0.0);
            new.evaluate();
        }
        there.insert(Identity::of(old), (old.clone(), new.clone()));
        back.insert(Identity::of(&new), (new, old.clone()));
    }
    module.visit_mut(&mut VisitMut::new(&there));
    let swapped = Swapped { module, back };
    Ok(run(swapped.module))
}

/// A module on borrowed tensors, which has its own again when this is dropped.
struct Swapped<'a, M: Module> {
    module: &'a mut M,
    back: HashMap<Identity, (Tensor, Tensor)>,
}

impl<M: Module> Drop for Swapped<'_, M> {
    fn drop(&mut self) {
        self.module.visit_mut(&mut VisitMut::new(&self.back));
    }
}
