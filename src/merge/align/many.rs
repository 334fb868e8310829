//! Matches many models at once: each is matched to the mean of the others until none changes.

use super::matching::{MatchOptions, match_weights};
use super::permutation::Permutation;
use super::spec::Spec;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::rng::Rng;
use crate::store::Weights;
use crate::tape::no_grad;
use crate::tensor::Tensor;

/// The mean of several models. Each tensor is computed when it is read.
pub struct Mean<'a>(pub Vec<&'a dyn Weights>);

impl Weights for Mean<'_> {
    fn names(&self) -> Vec<String> {
        self.0.first().map_or(Vec::new(), |first| first.names())
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        match self.0.first() {
            Some(first) => first.shape(name),
            None => Err(Error::config("the mean of no models has no tensors")),
        }
    }

    fn is_float(&self, name: &str) -> bool {
        self.0.first().is_some_and(|first| first.is_float(name))
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for model in &self.0 {
            let x = model.read(gpu, name)?;
            if let Some(sum) = sum.as_ref().filter(|sum| sum.shape() != x.shape()) {
                let message =
                    format!("`{name}` is {} in one model and {} in another", sum.shape(), x.shape());
                return Err(Error::config(message));
            }
            sum = Some(no_grad(|| sum.map_or(x.clone(), |sum| sum.add(&x))));
        }
        let sum = sum.ok_or_else(|| Error::config("the mean of no models has no tensors"))?;
        Ok(no_grad(|| sum.scale(1.0 / self.0.len() as f32)))
    }
}

/// Permutations that align all models to the first.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ManyMatching {
    /// One per model. The first is the identity.
    pub permutations: Vec<Permutation>,
    /// `sum over pairs i < j of sum_k <model i, model j>`, before and after permuting.
    pub objective: [f64; 2],
    /// Rounds over all models, including the last one, which changes nothing unless `sweeps` ended the search.
    pub rounds: usize,
}

/// Matches every model to the mean of the others until a round changes none (MergeMany, Ainsworth et al. 2022, section 5.4).
/// Each round visits the models in a new random order. Each matching starts from the model's present permutation and takes
/// only better ones, so the summed inner product of all pairs never falls.
///
/// `options` are those of each matching. Its `start` is not used; its `sweeps` limits the rounds too.
///
/// # Errors
/// For fewer than two models, and as [`match_weights`].
pub fn match_many(
    gpu: &Gpu,
    spec: &Spec,
    models: &[&dyn Weights],
    options: &MatchOptions,
) -> Result<ManyMatching> {
    if models.len() < 2 {
        return Err(Error::config("matching many models needs two or more"));
    }
    let start = models.iter().map(|&model| Permutation::identity(spec, model)).collect::<Result<Vec<_>>>()?;
    let mut permutations = start.clone();
    let mut rng = Rng::new(options.seed);
    let mut sequence: Vec<usize> = (0..models.len()).collect();
    let mut rounds = 0;
    loop {
        rng.shuffle(&mut sequence);
        let mut changed = false;
        for &i in &sequence {
            let others: Vec<_> =
                (0..models.len()).filter(|&j| j != i).map(|j| permutations[j].permuted(models[j])).collect();
            let mean = Mean(others.iter().map(|other| other as &dyn Weights).collect());
            let own = MatchOptions { start: Some(permutations[i].clone()), ..options.clone() };
            let matching = match_weights(gpu, spec, &mean, models[i], &own)?;
            drop(mean);
            drop(others);
            if matching.permutation != permutations[i] {
                permutations[i] = matching.permutation;
                changed = true;
            }
        }
        rounds += 1;
        if !changed || rounds >= options.sweeps {
            break;
        }
    }
    // Follows every permutation by the inverse of the first, which becomes the identity.
    let back = permutations[0].inverse();
    let permutations = permutations.iter().map(|p| p.then(&back)).collect::<Result<Vec<_>>>()?;
    let objective = [pairs(gpu, spec, models, &start)?, pairs(gpu, spec, models, &permutations)?];
    Ok(ManyMatching { permutations, objective, rounds })
}

/// Returns the summed inner products of all pairs, from `||sum of all||^2 = sum ||each||^2 + 2 sum over pairs`.
fn pairs(gpu: &Gpu, spec: &Spec, models: &[&dyn Weights], permutations: &[Permutation]) -> Result<f64> {
    let placed: Vec<_> = models.iter().zip(permutations).map(|(&model, p)| p.permuted(model)).collect();
    let all: Vec<&dyn Weights> = placed.iter().map(|model| model as &dyn Weights).collect();
    let own = |model: &dyn Weights| super::matching::inner_product(gpu, spec, model, model);
    let n = models.len() as f64;
    let mean = own(&Mean(all.clone()))?;
    let each = all.iter().map(|&model| own(model)).sum::<Result<f64>>()?;
    Ok((n * n * mean - each) / 2.0)
}
