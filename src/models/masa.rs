//! MASA for models that were trained without it: attention weights come from dictionaries, one for each group of
//! neighbouring blocks. Each block has a low-rank part of its own for what the dictionary lacks on inputs that occur.
//!
//! 1. Groups are cut where the model's next-token distribution drifts most from block to block.
//! 2. Each projection of each group gets a dictionary by matrix PCA ([`matrix_pca`]).
//! 3. The residual gets its best low-rank part, measured with the inputs' autocorrelation ([`low_rank_seen`]): of the
//!    full rank for q and o, of half of it for k and v.
//!
//! Source: arXiv 2508.04581, section 3.3. Weights of different blocks of trained models are nearly orthogonal: expect
//! little of few atoms, and judge by the output, not by the weights.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::models::convert::low_rank_seen;
use crate::models::lm::Lm;
use crate::models::sharing::{Made, PROJECTIONS, Sharing, own_rank};
use crate::share::matrix_pca;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::ops::Range;

/// The sizes of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MasaPlan {
    /// Atoms of each projection in all groups together. Groups get them in proportion to their blocks, at least one each.
    pub atoms: usize,
    /// Number of groups of neighbouring blocks.
    pub groups: usize,
    /// Rank of each block's own part of q and o. That of k and v is half of it. 0 for none.
    pub rank: usize,
}

/// Returns `KL(p_l || p_{l+1})` for each pair of neighbouring blocks, in nats. `p_l` is the softmax of the output head on
/// the mean over tokens of the stream after block `l`.
///
/// # Errors
/// When the device fails.
pub fn drift(model: &Lm, tokens: &Tensor) -> Result<Vec<f64>> {
    let mut means = Vec::new();
    no_grad(|| {
        let width = model.config.width;
        let _ = model.hidden_with(tokens, |_, seen| {
            let rows = seen.stream.count() / width;
            means.push(seen.stream.reshape([rows, width]).mean(0));
        });
        let all = Tensor::stack(&means.iter().collect::<Vec<_>>(), 0);
        let scores = model.logits(&all).log_softmax(-1);
        let (last, vocab) = (means.len() - 1, model.config.vocab);
        let [p, q] = [scores.slice(0, 0..last), scores.slice(0, 1..last + 1)];
        let kl = p.exp().mul(&p.sub(&q)).reshape([last, vocab]).sum(1);
        Ok(kl.to_vec::<f32>()?.into_iter().map(f64::from).collect())
    })
}

/// Cuts `drift.len() + 1` blocks into `count` groups where the drift is largest, or at the earlier of equal drifts.
///
/// # Panics
/// When `count` is 0 or above the number of blocks.
#[track_caller]
pub fn groups(drift: &[f64], count: usize) -> Vec<Range<usize>> {
    let blocks = drift.len() + 1;
    assert!(count > 0 && count <= blocks, "groups: {count} of {blocks} blocks");
    let mut order: Vec<usize> = (0..drift.len()).collect();
    order.sort_by(|&a, &b| drift[b].total_cmp(&drift[a]));
    let mut cuts: Vec<usize> = order[..count - 1].iter().map(|&l| l + 1).collect();
    cuts.sort_unstable();
    let starts = [0].into_iter().chain(cuts.clone());
    starts.zip(cuts.into_iter().chain([blocks])).map(|(start, end)| start..end).collect()
}

/// Distributes `atoms` over groups of these sizes: one each, then one by one to the group in which the most blocks share
/// an atom (highest averages).
fn shares(atoms: usize, sizes: &[usize]) -> Vec<usize> {
    let mut own = vec![1; sizes.len()];
    for _ in sizes.len()..atoms {
        // a / b < c / d is compared as a d < c b. The first of equals is taken.
        let open = (0..sizes.len()).filter(|&g| own[g] < sizes[g]);
        let most = open.reduce(|best, g| if sizes[g] * own[best] > sizes[best] * own[g] { g } else { best });
        if let Some(g) = most {
            own[g] += 1;
        }
    }
    own
}

/// Returns `X^T X` of the inputs of q, k and v, and of the inputs of o, for each block on `tokens`.
fn autocorrelations(model: &Lm, tokens: &Tensor) -> Vec<[Tensor; 2]> {
    let mut all = Vec::new();
    no_grad(|| {
        let _ = model.hidden_with(tokens, |_, seen| {
            all.push([seen.normed, seen.mixed].map(|x| {
                let width = x.shape()[2];
                let x = x.reshape([x.count() / width, width]);
                let c = x.t().matmul(&x);
                c.evaluate();
                c
            }));
        });
    });
    all
}

impl Lm {
    /// Returns this model with q, k, v and o from dictionaries, and leaves of its own.
    /// `tokens [batch, tokens]` are a sample of what the model reads. `step` is called with the name of each projection
    /// of each group as it begins.
    ///
    /// # Errors
    /// [`Error::Config`] when the plan does not fit the model; when the device fails.
    pub fn masa(&self, plan: MasaPlan, tokens: &Tensor, mut step: impl FnMut(&str)) -> Result<Lm> {
        self.check_dense("masa")?;
        let (c, MasaPlan { atoms, groups: count, rank }) = (&self.config, plan);
        let most = (c.kv_heads * c.head_dim()).min(c.width);
        if count == 0 || atoms < count || atoms > c.depth || rank.div_ceil(2) > most || rank > c.width {
            return Err(Error::config(format!(
                "masa: {atoms} atoms in {count} groups of {} blocks, rank {rank} of width {}; use 1 to {} atoms, no more groups \
                 than atoms, and a rank up to {}",
                c.depth,
                c.width,
                c.depth,
                c.width.min(2 * most)
            )));
        }
        let drift = if count > 1 { drift(self, tokens)? } else { vec![0.0; c.depth - 1] };
        let ranges = groups(&drift, count);
        let seen = if rank > 0 { autocorrelations(self, tokens) } else { Vec::new() };
        // The conversion starts from the weights that the model computes with now, whatever they are made of.
        let mut new = self.untied(&(0..c.depth).collect::<Vec<_>>())?;
        let sizes: Vec<usize> = ranges.iter().map(ExactSizeIterator::len).collect();
        let own = shares(atoms, &sizes);
        let sharing = Sharing::masa(&sizes, &own, rank);
        new.config.sharing = sharing;
        for (range, atoms) in ranges.into_iter().zip(own) {
            for matrix in PROJECTIONS {
                step(matrix);
                let made = new.made_of(&range, matrix, MasaPlan { atoms, ..plan }, &seen)?;
                for (l, block) in new.blocks[range.clone()].iter_mut().enumerate() {
                    block.linear_mut(matrix).weight = made.place(l);
                }
                new.made.push(made);
            }
        }
        Ok(new)
    }

    /// Makes the dictionary of one projection of one group, and the low-rank part of each block.
    fn made_of(
        &self,
        range: &Range<usize>,
        matrix: &'static str,
        plan: MasaPlan,
        seen: &[[Tensor; 2]],
    ) -> Result<Made> {
        let weights: Vec<Tensor> = no_grad(|| {
            let blocks = self.blocks[range.clone()].iter();
            blocks.map(|block| block.linear(matrix).weight.expand().cast(DType::F32)).collect()
        });
        let stack = Tensor::stack(&weights.iter().collect::<Vec<_>>(), 0);
        let (dictionary, _) = matrix_pca(&stack, plan.atoms)?;
        let rank = own_rank(plan.rank, matrix);
        let mut own = Vec::new();
        if rank > 0 {
            let made = no_grad(|| dictionary.atoms.combine(&dictionary.coefficients));
            for ((w, made), seen) in weights.iter().zip(&made).zip(&seen[range.clone()]) {
                let [b, a] = low_rank_seen(&w.sub(made), &seen[(matrix == "o") as usize], rank)?;
                own.push([a.requires_grad(), b.requires_grad()]);
            }
        }
        Ok(Made { matrix, layers: range.clone(), dictionary, net: None, own })
    }
}

#[cfg(test)]
mod tests {
    use super::shares;

    #[test]
    fn atoms_go_where_most_blocks_share_one() {
        assert_eq!(shares(24, &[1, 29]), [1, 23]);
        assert_eq!(shares(6, &[4, 4, 4]), [2, 2, 2]);
        assert_eq!(shares(7, &[2, 5]), [2, 5]);
        assert_eq!(shares(3, &[8]), [3]);
    }
}
