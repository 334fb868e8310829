//! Methods that merge one tensor at a time, on the device in f32. A caller may use different weights for each tensor.
//!
//! `m_i` are the models' tensors and `base` is the model that they were trained from. The task vectors are `tau_i = m_i - base`.
//! A method may thin them out first ([`trim`], [`breadcrumbs`], [`dare`]). It then sums them, with ([`sign_consensus`]) or
//! without ([`task_arithmetic`]) a vote about signs.

use crate::dtype::DType;
use crate::error::Result;
use crate::ops::order::rank;
use crate::rng::Rng;
use crate::tensor::Tensor;
use std::ops::Range;

/// Two vectors with a cosine above this count as parallel.
const PARALLEL: f64 = 0.9995;

/// Checks the arguments of a method.
///
/// # Panics
/// When there are no tensors, their number is not `numbers`, or shapes differ.
#[track_caller]
fn check(op: &str, tensors: &[Tensor], numbers: Option<usize>) {
    assert!(!tensors.is_empty(), "{op}: there are no models");
    let n = numbers.unwrap_or(tensors.len());
    assert!(n == tensors.len(), "{op}: {n} weights for {} models", tensors.len());
    for x in tensors {
        assert!(
            x.shape() == tensors[0].shape(),
            "{op}: shapes differ: {}, {}",
            tensors[0].shape(),
            x.shape()
        );
    }
}

/// Returns `sum w_i x_i`.
pub(in crate::merge) fn weighted(tensors: &[Tensor], weights: &[f32]) -> Tensor {
    let mut terms = tensors.iter().zip(weights).map(|(x, &w)| x.scale(w));
    let first = terms.next().expect("checked: at least one");
    terms.fold(first, |sum, x| sum.add(&x))
}

/// Whether the sum of weights is 0 up to rounding.
pub(in crate::merge) fn cancels(weights: &[f32]) -> bool {
    weights.iter().sum::<f32>().abs() < 1e-8
}

/// Returns the sum of weights, or 1 if it is close to 0, as mergekit does for task vectors.
fn divisor(weights: &[f32]) -> f32 {
    if cancels(weights) { 1.0 } else { weights.iter().sum() }
}

/// Returns `1/n sum m_i`.
///
/// # Panics
/// When there are no models or shapes differ, as in every method here.
#[track_caller]
pub fn average(models: &[Tensor]) -> Tensor {
    linear(models, &vec![1.0; models.len()], true)
}

/// Returns `sum w_i m_i`, divided by `sum w_i` if `normalize`. Source: Wortsman et al. 2022, "Model soups".
///
/// # Panics
/// When weights that are to be normalised sum to 0 (below 1e-8), and as every method here.
#[track_caller]
pub fn linear(models: &[Tensor], weights: &[f32], normalize: bool) -> Tensor {
    check("linear", models, Some(weights.len()));
    let sum = weighted(models, weights);
    if !normalize {
        return sum;
    }
    assert!(!cancels(weights), "linear: the weights {weights:?} sum to 0, by which nothing can be divided");
    sum.scale(1.0 / weights.iter().sum::<f32>())
}

/// Spherical interpolation of the flattened tensors: with `c = <x, y> / (|x| |y|)` and `th = acos c`,
/// `(sin((1 - t) th) x + sin(t th) y) / sin th`. It is linear interpolation if `|c| > 0.9995`. Source: Shoemake 1985.
///
/// # Errors
/// When the device fails, since three sums are read back.
#[track_caller]
pub fn slerp(x: &Tensor, y: &Tensor, t: f32) -> Result<Tensor> {
    let pair = [x.clone(), y.clone()];
    check("slerp", &pair, None);
    Ok(weighted(&pair, &slerp_weights(&products(&pair)?, t)))
}

/// The mean square from which on the squares of typical elements keep their digits in f32.
const SQUARE: f64 = 1e-30;

/// Returns `<x_i, x_j>` for `j <= i`, row by row. Products that overflow or vanish in f32 are computed again of tensors that are
/// scaled to a largest element near 1.
pub(in crate::merge) fn products(tensors: &[Tensor]) -> Result<Vec<f64>> {
    let plain = scaled_products(tensors, &vec![1.0; tensors.len()])?;
    let square = |i: usize| plain[i * (i + 1) / 2 + i];
    let keeps = |i: usize| square(i) >= SQUARE * tensors[i].count() as f64;
    if plain.iter().all(|x| x.is_finite()) && (0..tensors.len()).all(keeps) {
        return Ok(plain);
    }
    let largest = read_all(tensors.iter().map(|x| x.abs().reshape([x.count()]).max(0)))?;
    // Powers of two, so that scaling rounds nothing.
    let scale = |&x: &f64| if x > 0.0 { (-x.log2().floor()).clamp(-126.0, 126.0).exp2() } else { 1.0 };
    let scales: Vec<f64> = largest.iter().map(scale).collect();
    scaled_products(tensors, &scales)
}

/// Returns `<s_i x_i, s_j x_j> / (s_i s_j)` for `j <= i`, row by row. The inner products are f32.
fn scaled_products(tensors: &[Tensor], scales: &[f64]) -> Result<Vec<f64>> {
    let pairs: Vec<[usize; 2]> = (0..tensors.len()).flat_map(|i| (0..=i).map(move |j| [i, j])).collect();
    let scaled =
        |i: usize| if scales[i] == 1.0 { tensors[i].clone() } else { tensors[i].scale(scales[i] as f32) };
    let dots = read_all(pairs.iter().map(|&[i, j]| scaled(i).mul(&scaled(j)).sum_all()))?;
    Ok(dots.into_iter().zip(pairs).map(|(dot, [i, j])| dot / (scales[i] * scales[j])).collect())
}

/// Reads tensors of one element, all at once.
fn read_all(numbers: impl Iterator<Item = Tensor>) -> Result<Vec<f64>> {
    let numbers: Vec<Tensor> = numbers.map(|x| x.reshape([1])).collect();
    let numbers = Tensor::concat(&numbers.iter().collect::<Vec<_>>(), 0).to_vec::<f32>()?;
    Ok(numbers.into_iter().map(f64::from).collect())
}

/// Returns `<x, y> / (|x| |y|)`, or 0 if a vector is 0.
fn cosine(dot: f64, xx: f64, yy: f64) -> f64 {
    let norms = (xx * yy).sqrt();
    if norms > 0.0 { dot / norms } else { 0.0 }
}

/// Computes the factors of [`slerp`]'s two tensors from their [`products`].
pub(in crate::merge) fn slerp_weights(products: &[f64], t: f32) -> [f32; 2] {
    let cosine = cosine(products[1], products[0], products[2]);
    let t = f64::from(t);
    let weights = if cosine.abs() > PARALLEL {
        [1.0 - t, t]
    } else {
        let angle = cosine.acos();
        [1.0 - t, t].map(|part| (part * angle).sin() / angle.sin())
    };
    weights.map(|w| w as f32)
}

/// Returns `base + slerp(tau_0, tau_1, t)`.
///
/// # Errors
/// As [`slerp`].
#[track_caller]
pub fn slerp_task_vectors(base: &Tensor, models: [&Tensor; 2], t: f32) -> Result<Tensor> {
    let [a, b] = models.map(|m| m.sub(base));
    Ok(base.add(&slerp(&a, &b, t)?))
}

/// Returns `tau_i = m_i - base`.
#[track_caller]
pub fn task_vectors(base: &Tensor, models: &[Tensor]) -> Vec<Tensor> {
    models.iter().map(|m| m.sub(base)).collect()
}

/// Returns `base + lambda sum w_i d_i`, with the sum divided by `sum w_i` if `normalize`. Source: Ilharco et al., arXiv
/// 2212.04089.
#[track_caller]
pub fn task_arithmetic(
    base: &Tensor,
    deltas: &[Tensor],
    weights: &[f32],
    normalize: bool,
    lambda: f32,
) -> Tensor {
    check("task_arithmetic", deltas, Some(weights.len()));
    let scale = if normalize { lambda / divisor(weights) } else { lambda };
    base.add(&weighted(deltas, weights).scale(scale))
}

/// Returns `x` where `of` is not 0 and has the sign of `total` (a total of 0 counts as positive), else 0.
fn agreeing(x: &Tensor, of: &Tensor, total: &Tensor) -> Tensor {
    const AGREEING: &str = "select(vec4<f32>(0.0), $0, (($1 > vec4<f32>(0.0)) & ($2 >= vec4<f32>(0.0))) \
        | (($1 < vec4<f32>(0.0)) & ($2 < vec4<f32>(0.0))))";
    Tensor::lazy("sign_consensus", AGREEING, DType::F32, *of.shape(), &[x, of, total])
}

/// The sign vote of TIES, over deltas that may have been thinned out before. With `d_i = w_i delta_i`, the sign `s = +1` where
/// `sum d_i >= 0`, else -1, and `m_i = [sign d_i = s]`, the result is `base + lambda sum m_i d_i`. If `normalize`, the sum is
/// divided by `sum m_i w_i` where that is not 0. Source: Yadav et al., arXiv 2306.01708.
#[track_caller]
pub fn sign_consensus(
    base: &Tensor,
    deltas: &[Tensor],
    weights: &[f32],
    normalize: bool,
    lambda: f32,
) -> Tensor {
    check("sign_consensus", deltas, Some(weights.len()));
    let signed: Vec<Tensor> = deltas.iter().zip(weights).map(|(d, &w)| d.scale(w)).collect();
    let ones = vec![1.0; signed.len()];
    let total = weighted(&signed, &ones);
    // Every delta below reads the sum, so it is computed now, once.
    total.evaluate();
    let kept: Vec<Tensor> = signed.iter().map(|d| agreeing(d, d, &total)).collect();
    let mut sum = weighted(&kept, &ones);
    if normalize {
        let weight = |(d, &w): (&Tensor, &f32)| agreeing(&Tensor::scalar(base.gpu(), w), d, &total);
        let weights: Vec<Tensor> = signed.iter().zip(weights).map(weight).collect();
        let sums = weighted(&weights, &ones);
        let none = sums.eq(&Tensor::scalar(base.gpu(), 0.0));
        sum = sum.div(&Tensor::scalar(base.gpu(), 1.0).where_mask(&none, &sums));
    }
    base.add(&sum.scale(lambda))
}

/// Returns `floor(share n)`, at most `n`, as the reference implementations count.
fn part(share: f64, n: usize) -> usize {
    ((share * n as f64) as usize).min(n)
}

/// Returns the ranks of magnitude that TIES keeps: the `max(1, floor(density n))` largest, and none at a density of 0.
pub(in crate::merge) fn trimmed(n: usize, density: f64) -> Range<usize> {
    let least = usize::from(density > 0.0);
    n - part(density, n).max(least).min(n)..n
}

/// Returns the ranks of magnitude that breadcrumbs keep: with `T = floor(density n)` and `top = floor(gamma n)`, from
/// `bottom = max(0, n - T - top)` to `bottom + T`. A density of 1 keeps all.
pub(in crate::merge) fn middle(n: usize, density: f64, gamma: f64) -> Range<usize> {
    if density >= 1.0 {
        return 0..n;
    }
    let kept = part(density, n);
    let bottom = (n - kept).saturating_sub(part(gamma, n));
    bottom..bottom + kept
}

/// Keeps the fraction `density_i` of each delta with the largest magnitudes, at least one element unless it is 0, and sets the rest
/// to 0. Of equal magnitudes at the limit, the last ones are kept. The selection is exact, without sorting.
///
/// # Errors
/// When the device fails.
#[track_caller]
pub fn trim(deltas: &[Tensor], densities: &[f64]) -> Result<Vec<Tensor>> {
    check("trim", deltas, Some(densities.len()));
    let ranks: Vec<_> = deltas.iter().zip(densities).map(|(d, &share)| trimmed(d.count(), share)).collect();
    rank::keep_ranks(deltas, &ranks)
}

/// Removes from each delta the fraction `gamma_i` with the largest magnitudes, and as many of the smallest ones that the fraction
/// `density_i` remains. A density of 1 or more changes nothing. Source: Davari & Belilovsky, arXiv 2312.06795.
///
/// # Errors
/// When the device fails.
#[track_caller]
pub fn breadcrumbs(deltas: &[Tensor], densities: &[f64], gammas: &[f64]) -> Result<Vec<Tensor>> {
    check("breadcrumbs", deltas, Some(densities.len()));
    check("breadcrumbs", deltas, Some(gammas.len()));
    let shares = densities.iter().zip(gammas);
    let ranks: Vec<_> =
        deltas.iter().zip(shares).map(|(d, (&share, &top))| middle(d.count(), share, top)).collect();
    rank::keep_ranks(deltas, &ranks)
}

/// Returns the ranks of magnitude that breadcrumbs keep of a row, as the authors do: the `floor(gamma n)` largest are removed, and then
/// the `floor(density n)` largest of the rest are kept.
fn middle_of_row(n: usize, density: f64, gamma: f64) -> Range<usize> {
    let top = n - part(gamma, n);
    top.saturating_sub(part(density, n))..top
}

/// [`breadcrumbs`] as the authors' code has it: row by row along the last axis, of `row` elements. Of each row the fraction `gamma` with
/// the largest magnitudes is removed, and of the rest the fraction `density` of the whole row with the largest ones remains.
///
/// # Panics
/// When `row` does not divide the number of elements.
#[track_caller]
pub fn breadcrumbs_rows(delta: &Tensor, row: usize, density: f64, gamma: f64) -> Tensor {
    let count = delta.count();
    if count == 0 {
        return delta.clone();
    }
    assert!(row > 0 && count.is_multiple_of(row), "breadcrumbs: rows of {row} in {}", delta.shape());
    let range = middle_of_row(row, density, gamma);
    let rows = delta.reshape([count / row, row]);
    // The rank of an element is its place in the order: the order of the order.
    let ranks = rows.abs().argsort(1, false).argsort(1, false);
    let end = |at: usize| Tensor::from_slice(delta.gpu(), &[at as u32], [1]);
    let kept = ranks.lt(&end(range.end)).cast(DType::F32).mul(&ranks.ge(&end(range.start)).cast(DType::F32));
    rows.mul(&kept).reshape(*delta.shape())
}

/// The factor of the elements that DARE keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rescale {
    /// `1 / density`, as in the paper.
    Density,
    /// `|delta|_1 / |kept|_1`, as in mergekit.
    L1,
    /// 1.
    None,
}

/// Drop and rescale: keeps each element with probability `density`. The draw of an element depends only on its index, `name`,
/// `model` (the model's number) and `seed`, so it is the same on every adapter and in any order of tensors. A density of 0 keeps
/// nothing, and one below 2^-23, the draws' resolution, counts as 2^-23. Source: Yu et al., arXiv 2311.03099.
#[track_caller]
pub fn dare(delta: &Tensor, density: f64, rescale: Rescale, seed: u64, name: &str, model: usize) -> Tensor {
    let kept = drop_part(delta, density, seed, name, [model, 0]);
    match rescale {
        Rescale::Density => kept,
        Rescale::None => kept.scale(1.0 - drop_rate(density)),
        Rescale::L1 => rescale_l1(delta, &kept),
    }
}

/// The probability with which [`dare`] drops an element. It is below 1 unless the density is 0, because the kept elements are
/// divided by the rest.
pub(in crate::merge) fn drop_rate(density: f64) -> f32 {
    let most = if density > 0.0 { 1.0 - f64::from(f32::EPSILON) } else { 1.0 };
    (1.0 - density).clamp(0.0, most) as f32
}

/// Returns a part of a tensor with elements dropped and the others divided by `density`. `place` is the model's and the part's
/// number, which the draws depend on.
pub(in crate::merge) fn drop_part(
    delta: &Tensor,
    density: f64,
    seed: u64,
    name: &str,
    place: [usize; 2],
) -> Tensor {
    // FNV-1a of the name, then of the place. The top bit stays 0, which leaves the generator room to count.
    let bytes = name.bytes().chain(place.into_iter().flat_map(|i| (i as u64).to_le_bytes()));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    delta.dropout(drop_rate(density), &mut Rng::from_state([seed, hash >> 1]))
}

/// Returns `kept |delta|_1 / |kept|_1`, or `kept` if it is all 0.
#[track_caller]
pub fn rescale_l1(delta: &Tensor, kept: &Tensor) -> Tensor {
    let [all, left] = [delta, kept].map(|x| x.abs().sum_all());
    let none = left.eq(&Tensor::scalar(delta.gpu(), 0.0));
    kept.mul(&Tensor::scalar(delta.gpu(), 1.0).where_mask(&none, &all.div(&left)))
}

/// Computes the factors of [`signature`] from the [`products`] of the clean model's change and the `n` robust ones'.
pub(in crate::merge) fn along(products: &[f64], n: usize) -> Vec<f32> {
    let dot = |i: usize, j: usize| products[i * (i + 1) / 2 + j];
    let length = dot(0, 0);
    (1..=n).map(|i| if length > 0.0 { (dot(i, 0) / length) as f32 } else { 0.0 }).collect()
}

/// Returns `base + sum w_i (robust_i - along_i clean)`, where `changes` are the clean model's and then each robust one's.
pub(in crate::merge) fn patched(base: &Tensor, changes: &[Tensor], along: &[f32], weights: &[f32]) -> Tensor {
    let (clean, robust) = (&changes[0], &changes[1..]);
    let of_clean: f32 = along.iter().zip(weights).map(|(a, w)| a * w).sum();
    base.add(&weighted(robust, weights)).sub(&clean.scale(of_clean))
}

/// Robust weight signatures: what training on corrupted data changes beyond training on clean data. With `c = clean - pre` and
/// `r_i = robust_i - pre`, all from one pretrained model, the result is
///
/// ```text
/// base + sum w_i (r_i - <r_i, c> / <c, c> c)
/// ```
///
/// tensor by tensor. `pre = None` is a pretrained model of zeros. Source: Cai et al., arXiv 2302.12480, and its code, which multiplies by
/// the weights twice and takes the tensors of norms as the mean of the robust models' ([`average`]), as a merge by
/// `merge_method: signature` does.
///
/// # Errors
/// When the device fails, since inner products are read back.
#[track_caller]
pub fn signature(
    base: &Tensor,
    clean: &Tensor,
    robust: &[Tensor],
    pre: Option<&Tensor>,
    weights: &[f32],
) -> Result<Tensor> {
    check("signature", robust, Some(weights.len()));
    let all = std::iter::once(clean).chain(robust);
    let changes: Vec<Tensor> = all.map(|x| pre.map_or_else(|| x.clone(), |pre| x.sub(pre))).collect();
    let along = along(&products(&changes)?, robust.len());
    Ok(patched(base, &changes, &along, weights))
}

/// Model stock: `t mean(m_i) + (1 - t) base` with `t = N c / (1 + (N - 1) c)`, where `c` is the mean cosine of all pairs of task
/// vectors. Source: Jang et al., arXiv 2403.19522.
///
/// # Errors
/// When the device fails, since the inner products are read back.
///
/// # Panics
/// When there are fewer than two models.
#[track_caller]
pub fn model_stock(base: &Tensor, models: &[Tensor]) -> Result<Tensor> {
    check("model_stock", models, None);
    let n = models.len();
    assert!(n >= 2, "model_stock: needs two models, got one");
    let deltas = task_vectors(base, models);
    deltas.iter().for_each(Tensor::evaluate);
    Ok(stock(base, models, stock_share(&products(&deltas)?, n)))
}

/// Computes `t` of [`model_stock`] from the [`products`] of `n` task vectors.
pub(in crate::merge) fn stock_share(products: &[f64], n: usize) -> f32 {
    let dot = |i: usize, j: usize| products[i * (i + 1) / 2 + j];
    let pairs = (0..n).flat_map(|i| (0..i).map(move |j| [i, j]));
    let cosines = pairs.map(|[i, j]| cosine(dot(i, j), dot(i, i), dot(j, j)).clamp(-1.0, 1.0));
    let c = cosines.sum::<f64>() / (n * (n - 1) / 2) as f64;
    (n as f64 * c / (1.0 + (n - 1) as f64 * c)) as f32
}

/// Returns `t mean(m_i) + (1 - t) base`.
pub(in crate::merge) fn stock(base: &Tensor, models: &[Tensor], t: f32) -> Tensor {
    weighted(&[average(models), base.clone()], &[t, 1.0 - t])
}

/// Fisher-weighted average `sum c_i F_i m_i / sum c_i F_i`, where `F_i` are the diagonals of the models' Fisher matrices
/// ([`fisher_diagonal`](crate::merge::research::learned::fisher_diagonal)). That of the first model whose coefficient is not 0 is
/// raised to at least `floor`, so its weights are kept where all Fisher values are 0. Source: Matena & Raffel, arXiv 2111.09832.
#[track_caller]
pub fn fisher(models: &[Tensor], fishers: &[Tensor], coefficients: &[f32], floor: f32) -> Tensor {
    check("fisher", models, Some(coefficients.len()));
    check("fisher", fishers, Some(models.len()));
    let lead = coefficients.iter().position(|&c| c != 0.0).unwrap_or(0);
    let mut fishers = fishers.to_vec();
    fishers[lead] = fishers[lead].maximum(&Tensor::scalar(fishers[lead].gpu(), floor));
    let products: Vec<Tensor> = models.iter().zip(&fishers).map(|(m, f)| m.mul(f)).collect();
    weighted(&products, coefficients).div(&weighted(&fishers, coefficients))
}

/// Returns the weights of metrics-weighted averaging by losses: `(1 / L_i)^p`, normalized. Source: arXiv 2504.18580, with a power
/// as the only penalty.
pub fn loss_weights(losses: &[f64], power: f64) -> Vec<f32> {
    normalized(losses.iter().map(|loss| -power * loss.ln()).collect())
}

/// Returns the weights of metrics-weighted averaging by training steps: `s_i^p`, normalized. Source: as [`loss_weights`].
pub fn step_weights(steps: &[f64], power: f64) -> Vec<f32> {
    normalized(steps.iter().map(|step| power * step.ln()).collect())
}

/// Normalises weights that are given by their logarithms, of which the largest may be beyond any number.
fn normalized(logarithms: Vec<f64>) -> Vec<f32> {
    let most = logarithms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let raw: Vec<f64> = logarithms.into_iter().map(|l| (l - most).exp()).collect();
    let sum: f64 = raw.iter().sum();
    raw.into_iter().map(|w| (w / sum) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_count_as_the_references_do() {
        assert_eq!(trimmed(10, 0.6), 4..10);
        assert_eq!(trimmed(10, 0.01), 9..10);
        assert_eq!(trimmed(3, 1.0), 0..3);
        assert_eq!(trimmed(0, 0.5), 0..0);
        // A density of 0 keeps nothing; the least one above it keeps one element.
        assert_eq!(trimmed(10, 0.0), 10..10);
        assert_eq!(trimmed(10, f64::MIN_POSITIVE), 9..10);
        assert_eq!([0.0, 1e-9, 0.25, 1.0].map(drop_rate), [1.0, 1.0 - f32::EPSILON, 0.75, 0.0]);
        assert_eq!(middle(150, 0.6, 0.04), 54..144);
        // Density has precedence: less than `gamma` is removed at the top, because the rest would not be enough.
        assert_eq!(middle(10, 0.95, 0.3), 0..9);
        assert_eq!(middle(10, 1.0, 0.3), 0..10);
        // In tiny tensors, `gamma` rounds down to nothing.
        assert_eq!(middle(24, 0.6, 0.01), 10..24);
    }
}
