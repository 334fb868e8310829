//! How each method merges one tensor.

pub use super::arguments::{Arguments, Lookup};
use super::global::{Each, Pcb, TiesGlobal};
use super::methods::{self, Rescale};
pub use super::table::Method;
use crate::error::{Error, Result};
use crate::ops::order::consensus::{self, Vote};
use crate::ops::order::narrow;
use crate::ops::order::rank::{self, Kept};
use crate::tensor::Tensor;

pub use super::inputs::{EachInputs, Inputs, Merged, SampleInputs};

/// The result of the passes over all tensors, for methods that need any.
#[derive(Debug)]
#[non_exhaustive]
pub enum Measured {
    /// Nothing.
    None,
    /// Magnitudes at which the whole task vectors are cut.
    Ties(TiesGlobal),
    /// Limits of magnitudes and balances.
    Pcb(Pcb),
    /// L2 norms of the Fisher diagonals.
    Norms(Vec<f64>),
}

/// Statistics of one whole tensor, computed before its parts are merged.
#[derive(Debug)]
#[non_exhaustive]
pub enum Statistics {
    /// Nothing.
    None,
    /// The factors of two tensors.
    Mix([f32; 2]),
    /// The weight of the models' mean; the base has the rest.
    Share(f32),
    /// Which elements of each task vector are kept.
    Kept(Vec<Kept>),
    /// The factor of each thinned task vector.
    Scales(Vec<f32>),
    /// How much of the clean model's change is in each robust model's.
    Along(Vec<f32>),
}

impl Method {
    /// Whether the merge of equal tensors is that tensor.
    pub(super) fn keeps_equal(self, arguments: &Arguments) -> bool {
        match self {
            Method::Passthrough => false,
            Method::Linear => arguments.normalize,
            // Task vectors of 0 leave the base, which is the same tensor.
            _ => true,
        }
    }

    /// Number of passes over all tensors, which have so many elements, before the first one can be merged.
    pub fn passes(self, arguments: &Arguments, elements: u64) -> u64 {
        match self {
            Method::TiesGlobal if TiesGlobal::cut(elements, arguments.densities[0]).is_none() => 0,
            Method::TiesGlobal => 3,
            Method::Pcb if elements == 0 => 0,
            Method::Pcb => 6,
            Method::Fisher if arguments.normalize => 1,
            _ => 0,
        }
    }

    /// Makes the passes over all tensors that come before the merge. `each` makes one pass over the inputs of all tensors.
    ///
    /// # Errors
    /// The errors of `each`, and when the device fails.
    pub fn measure(
        self,
        arguments: &Arguments,
        models: usize,
        elements: u64,
        each: &mut EachInputs,
    ) -> Result<Measured> {
        let deltas: &mut Each = &mut |visit| {
            each(&mut |inputs| match &inputs.base {
                Some(base) => visit(base, &inputs.models),
                None => Ok(()),
            })
        };
        match self {
            Method::TiesGlobal => {
                let density = arguments.densities[0];
                TiesGlobal::measure(models, elements, density, deltas).map(Measured::Ties)
            }
            Method::Pcb => Pcb::measure(models, elements, arguments.ratio, deltas).map(Measured::Pcb),
            Method::Fisher if arguments.normalize => {
                let norms =
                    super::global::l2_norms(models, |visit| each(&mut |inputs| visit(&inputs.others)))?;
                let has_say = norms.iter().zip(&arguments.weights).any(|(&norm, &w)| norm > 0.0 && w != 0.0);
                match has_say {
                    true => Ok(Measured::Norms(norms)),
                    false => Err(Error::config(
                        "`fisher`: the Fisher diagonals are 0 everywhere, so that no weight is known better than another; make \
                         others, or set `normalize: false`",
                    )),
                }
            }
            _ => Ok(Measured::None),
        }
    }

    /// Computes the statistics of a whole tensor that the merge of its parts needs. `each` makes one pass over its parts, in
    /// order, and is called up to four times, or once in most cases if `sample` has a sample. A sample is only an estimate and
    /// changes no result.
    ///
    /// # Errors
    /// The errors of `each` and `sample`, and when the device fails.
    pub fn statistics(
        self,
        name: &str,
        count: usize,
        a: &Arguments,
        models: usize,
        each: &mut EachInputs,
        sample: &SampleInputs,
    ) -> Result<Statistics> {
        let counts = vec![count; models];
        match self {
            Method::Slerp | Method::NuSlerp | Method::ModelStock => {
                let mut sums = Vec::new();
                each(&mut |x| add_to(&mut sums, methods::products(&self.compared(x))?))?;
                Ok(match self {
                    Method::ModelStock => Statistics::Share(methods::stock_share(&sums, models)),
                    Method::Slerp => Statistics::Mix(methods::slerp_weights(&sums, a.t)),
                    _ => Statistics::Mix(methods::slerp_weights(&sums, second_share(&a.weights))),
                })
            }
            Method::Signature if !a.is_norm => {
                let mut sums = Vec::new();
                each(&mut |x| add_to(&mut sums, methods::products(&x.changes(a))?))?;
                Ok(Statistics::Along(methods::along(&sums, models)))
            }
            Method::Ties | Method::Breadcrumbs | Method::BreadcrumbsTies if a.row == 0 => {
                let range = |(i, &share): (usize, &f64)| match self {
                    Method::Ties => methods::trimmed(count, share),
                    _ => methods::middle(count, share, a.gammas[i]),
                };
                let ranks: Vec<_> = a.densities.iter().enumerate().map(range).collect();
                let (length, starts) = narrow::pieces(count);
                if let Some([base, models]) = sample(length, &starts)? {
                    let delta = |m: &Vec<f32>| m.iter().zip(&base[0]).map(|(m, b)| m - b).collect();
                    let deltas: Vec<Vec<f32>> = models.iter().map(delta).collect();
                    let found = narrow::ranges(count, &ranks, &deltas, |visit| {
                        each(&mut |x| x.base.as_ref().map_or(Ok(()), |base| visit(base, &x.models)))
                    })?;
                    if let Some(kept) = found {
                        return Ok(Statistics::Kept(kept));
                    }
                }
                let kept = rank::ranges(&counts, &ranks, |visit| each(&mut |x| visit(&x.deltas())))?;
                Ok(Statistics::Kept(kept))
            }
            Method::DareLinear | Method::DareTies => {
                let scales = a.densities.iter().map(|&share| match a.rescale {
                    Some(Rescale::None) => 1.0 - methods::drop_rate(share),
                    _ => 1.0,
                });
                let mut scales: Vec<f32> = scales.collect();
                if matches!(a.rescale, None | Some(Rescale::L1)) {
                    let (mut sums, mut part) = (Vec::new(), 0);
                    each(&mut |x| {
                        let deltas = x.deltas();
                        let kept = a.dropped(name, part, &deltas);
                        part += 1;
                        let sizes: Vec<Tensor> =
                            deltas.iter().chain(&kept).map(|d| d.abs().sum_all().reshape([1])).collect();
                        let sizes = Tensor::concat(&sizes.iter().collect::<Vec<_>>(), 0).to_vec::<f32>()?;
                        add_to(&mut sums, sizes.into_iter().map(f64::from).collect())
                    })?;
                    let (all, kept) = sums.split_at(models);
                    let ratio =
                        |(all, kept): (&f64, &f64)| if *kept > 0.0 { (all / kept) as f32 } else { 1.0 };
                    scales = all.iter().zip(kept).map(ratio).collect();
                }
                Ok(Statistics::Scales(scales))
            }
            _ => Ok(Statistics::None),
        }
    }

    /// Returns the tensors whose inner products the method needs.
    fn compared(self, x: &Inputs) -> Vec<Tensor> {
        match (self, &x.base) {
            (Method::Slerp, Some(base)) => vec![base.clone(), x.models[0].clone()],
            (_, Some(_)) => x.deltas(),
            (_, None) => x.models.clone(),
        }
    }

    /// Merges part number `part` of a tensor. Parts must be merged in order.
    ///
    /// # Errors
    /// When the device fails, for methods that read something back.
    pub fn merge(
        self,
        name: &str,
        part: usize,
        a: &Arguments,
        x: &Inputs,
        statistics: &mut Statistics,
        measured: &mut Measured,
    ) -> Result<Merged> {
        let models = &x.models[..];
        let base = x.base.as_ref().filter(|_| self.has_task_vectors());
        let Some(base) = base else { return Ok(self.merge_models(a, x, statistics, measured).into()) };
        let votes = matches!(self, Method::Ties | Method::BreadcrumbsTies);
        if votes
            && let Statistics::Kept(kept) = statistics
            && consensus::takes(base.gpu(), models.len())
        {
            let vote = Vote { weights: &a.weights, normalize: a.normalize, lambda: a.lambda };
            let (tensor, finite) = consensus::consensus(base, models, kept, vote)?;
            return Ok(Merged { tensor, finite: Some(finite) });
        }
        let deltas = match statistics {
            Statistics::Kept(kept) => {
                let all = x.deltas();
                kept.iter_mut().zip(&all).map(|(kept, d)| kept.keep(d)).collect::<Result<_>>()?
            }
            Statistics::Scales(scales) => {
                let dropped = a.dropped(name, part, &x.deltas());
                dropped.iter().zip(scales).map(|(d, &mut s)| d.scale(s)).collect()
            }
            _ if a.row > 0 => {
                let all = x.deltas();
                let one = |(i, d): (usize, &Tensor)| {
                    methods::breadcrumbs_rows(d, a.row, a.densities[i], a.gammas[i])
                };
                all.iter().enumerate().map(one).collect()
            }
            _ => x.deltas(),
        };
        let (weights, normalize, lambda) = (&a.weights[..], a.normalize, a.lambda);
        let merged = match (self, statistics, measured) {
            (Method::Slerp, Statistics::Mix(mix), _) => {
                methods::weighted(&[base.clone(), models[0].clone()], &mix[..])
            }
            (Method::NuSlerp, Statistics::Mix(mix), _) => base.add(&methods::weighted(&deltas, &mix[..])),
            (Method::ModelStock, Statistics::Share(t), _) => methods::stock(base, models, *t),
            (Method::TiesGlobal, _, Measured::Ties(ties)) => ties.merge(base, models, lambda)?,
            (Method::Pcb, _, Measured::Pcb(pcb)) => pcb.merge(base, models, weights, lambda),
            (Method::Signature, Statistics::Along(along), _) => {
                methods::patched(base, &x.changes(a), along, weights)
            }
            (Method::Signature, ..) => methods::average(models),
            (Method::Ties | Method::DareTies | Method::BreadcrumbsTies, ..) => {
                methods::sign_consensus(base, &deltas, weights, normalize, lambda)
            }
            _ => methods::task_arithmetic(base, &deltas, weights, normalize, lambda),
        };
        Ok(merged.into())
    }

    fn merge_models(self, a: &Arguments, x: &Inputs, statistics: &Statistics, measured: &Measured) -> Tensor {
        let models = &x.models[..];
        match (self, statistics) {
            (Method::Average, _) => methods::average(models),
            (Method::NuSlerp, Statistics::Mix(mix)) => methods::weighted(models, &mix[..]),
            (Method::Fisher, _) => {
                let mut weights = a.weights.clone();
                if let Measured::Norms(norms) = measured {
                    // A model whose Fisher values are all 0 has no say.
                    let divided = |(w, &n): (&f32, &f64)| if n > 0.0 { f64::from(*w) / n } else { 0.0 };
                    let all: Vec<f64> = weights.iter().zip(norms).map(divided).collect();
                    // A common factor changes nothing, and norms may be beyond f32.
                    let most = all.iter().fold(0.0, |most: f64, w| most.max(w.abs()));
                    weights.iter_mut().zip(all).for_each(|(w, x)| *w = (x / most) as f32);
                }
                methods::fisher(models, &x.others, &weights, a.floor)
            }
            (Method::Passthrough, _) => models[0].scale(a.scale),
            (Method::MetricsWeighted, _) => methods::linear(models, &a.weights, false),
            _ => methods::linear(models, &a.weights, a.normalize),
        }
    }

    /// The most ranks at which each model's tensor is cut.
    pub(super) fn cuts(self) -> usize {
        match self {
            Method::Ties => 1,
            Method::Breadcrumbs | Method::BreadcrumbsTies => 2,
            _ => 0,
        }
    }

    /// Number of temporary tensors, each as large as a part, that a merge holds at once in addition to its inputs.
    pub fn temporaries(self, models: usize) -> usize {
        match self {
            Method::Ties | Method::BreadcrumbsTies | Method::DareTies | Method::TiesGlobal | Method::Pcb => {
                3 * models + 4
            }
            Method::Breadcrumbs | Method::DareLinear | Method::ModelStock => 2 * models + 2,
            Method::Signature => 2 * models + 4,
            _ => 3,
        }
    }
}

impl Arguments {
    /// Whether [`Method::Passthrough`] changes nothing.
    pub(super) fn keeps(&self) -> bool {
        self.scale == 1.0
    }

    /// Returns each delta with elements dropped at random and the others divided by the density.
    fn dropped(&self, name: &str, part: usize, deltas: &[Tensor]) -> Vec<Tensor> {
        let one = |(i, d)| methods::drop_part(d, self.densities[i], self.seed, name, [i, part]);
        deltas.iter().enumerate().map(one).collect()
    }
}

/// Adds numbers to running sums.
fn add_to(sums: &mut Vec<f64>, numbers: Vec<f64>) -> Result<()> {
    sums.resize(numbers.len(), 0.0);
    sums.iter_mut().zip(numbers).for_each(|(sum, x)| *sum += x);
    Ok(())
}

/// Returns the second of two weights as a fraction of their sum, or a half if the sum is below 1e-6, as mergekit does.
fn second_share(weights: &[f32]) -> f32 {
    let sum = weights[0] + weights[1];
    if sum.abs() < 1e-6 { 0.5 } else { weights[1] / sum }
}
