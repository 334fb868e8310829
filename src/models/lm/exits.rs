//! Where tokens may leave a model whose depths use blocks in turn, and the loss that trains it for that.

use super::{Lm, LmBlock};
use crate::tensor::Tensor;
use std::sync::Arc;

/// Whether all linear layers of two blocks use the same stored matrices, alone or with parts of their own.
fn is_same(a: &LmBlock, b: &LmBlock) -> bool {
    let (a, b) = (a.linears(), b.linears());
    a.len() == b.len()
        && a.iter().zip(&b).all(|((_, a), (_, b))| {
            let [own, other] = [a, b].map(|linear| linear.weight.leaves().into_iter().next());
            let (Some(own), Some(other)) = (own, other) else { return false };
            // A store that is not the matrix itself, such as a dictionary's, gives every depth another one.
            own.shape()[..] == a.weight.size()
                && Arc::ptr_eq(&own.value, &other.value)
                && (own.offset, own.strides) == (other.offset, other.strides)
        })
}

impl Lm {
    /// The number of blocks that are used in turn between the ends, and the depths between the ends. Without repetition it is
    /// the number of these depths.
    fn period(&self) -> (usize, std::ops::Range<usize>) {
        let [first, last] = self.config.ends;
        let middle = first..self.blocks.len().saturating_sub(last).max(first);
        let blocks = &self.blocks[middle.clone()];
        let repeats =
            |period: &usize| (*period..blocks.len()).all(|t| is_same(&blocks[t], &blocks[t - period]));
        ((1..blocks.len()).find(repeats).unwrap_or(blocks.len()), middle)
    }

    /// The depths that use each block, counted from 0, with the blocks in the order in which a token meets them. Blocks at the
    /// ends are used at one depth.
    pub(crate) fn turns(&self) -> Vec<Vec<usize>> {
        let (period, middle) = self.period();
        let alone = |t: usize| vec![t];
        let cycle =
            (middle.start..middle.start + period).map(|t| (t..middle.end).step_by(period.max(1)).collect());
        (0..middle.start).map(alone).chain(cycle).chain((middle.end..self.blocks.len()).map(alone)).collect()
    }

    /// The depths, counted from 1, after which a token may leave: the ends of all loops over the blocks that are used in turn.
    /// The last loop ends with the model, so it includes blocks at the end that are not repeated. A model without loops has
    /// one exit.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Rng};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::models::lm::{Lm, LmConfig};
    /// use tiebeam::models::sharing::Sharing;
    /// // One block of its own, three loops over two blocks, and another block of its own.
    /// let config = LmConfig::small().width(8).hidden(8).depth(8).ends([1, 1]).sharing(Sharing::cycle(2, 0));
    /// assert_eq!(Lm::new(&gpu, config, &mut Rng::new(1)).exits(), [3, 5, 8]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn exits(&self) -> Vec<usize> {
        let (period, middle) = self.period();
        let loops = (middle.start + period..middle.end).step_by(period.max(1));
        loops.chain([self.blocks.len()]).collect()
    }

    /// The loss that trains early exits: `CE(D) + weight * sum over exits e < D of CE(e)`, where `CE(e)` is the mean
    /// cross-entropy in nats of `targets` given `tokens`, both `[batch, tokens]`, with the scores that the head gives after
    /// depth `e`, and `D` is the last depth. [`Lm::exits`] lists the exits; all use the final norm and the head. The result is
    /// a scalar.
    ///
    /// A weight of 0.1 is the paper's aggressive coefficient, which takes little from the last depth. A weight of 1 gives
    /// every exit the same. Noise, capacity and balance of experts are those of [`Lm::loss`], not of training. Source:
    /// relaxed recursive transformers, arXiv 2410.20672.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Rng, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::models::lm::{Lm, LmConfig};
    /// let config = LmConfig::small().vocab(8).width(8).hidden(8).context(8).depth(3); // one block, three times
    /// let model = Lm::new(&gpu, config, &mut Rng::new(1));
    /// let [tokens, targets] = [[1u32, 2, 3], [2, 3, 4]].map(|ids| Tensor::from_slice(&gpu, &ids, [1, 3]));
    /// let loss = model.exit_loss(&tokens, &targets, 0.1);
    /// let of = |x: &Tensor| model.logits(x).cross_entropy(&targets, None).item();
    /// let after = model.streams(&tokens);
    /// let want = of(&after[2])? + 0.1 * (of(&after[0])? + of(&after[1])?);
    /// assert!((loss.item()? - want).abs() < 1e-5);
    /// assert_eq!(loss.backward()?.len(), model.exit_loss(&tokens, &targets, 1.0).backward()?.len());
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// When there are more tokens than the context, or the weight is not a finite number.
    #[track_caller]
    pub fn exit_loss(&self, tokens: &Tensor, targets: &Tensor, weight: f32) -> Tensor {
        assert!(weight.is_finite(), "exit loss: a weight of {weight}; it must be a finite number");
        let (exits, depth) = (self.exits(), self.blocks.len());
        let mut early: Option<Tensor> = None;
        let last = self.hidden_with(tokens, |t, seen| {
            if t + 1 < depth && exits.contains(&(t + 1)) {
                let loss = self.logits(seen.stream).cross_entropy(targets, None);
                early = Some(early.take().map_or_else(|| loss.clone(), |sum| sum.add(&loss)));
            }
        });
        let loss = self.logits(&last).cross_entropy(targets, None);
        match early {
            Some(early) => loss.add(&early.scale(weight)),
            None => loss,
        }
    }
}
