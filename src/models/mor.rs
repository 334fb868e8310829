//! Mixture-of-Recursions: one block, applied to each token as often as a router decides.
//!
//! At recursion `r` the tokens that are still active are scored and some of them are chosen. The block runs on these
//! alone, and each moves by its gate: `x[t] += gate[t] (block(x)[t] - x[t])`. The rows of chosen tokens are gathered as
//! the block's products read them and scattered as results are stored, so the products neither read nor write other rows.
//! Source: arXiv 2507.10524.

use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::nn::{Block, Init, Linear, Mask, module};
use crate::ops::product::site::Site;
use crate::rng::Rng;
use crate::share::Tied;
use crate::tensor::Tensor;

/// Who chooses the tokens of a recursion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Routing {
    /// Each recursion chooses the best of the tokens that the one before it chose: [`capacities`] of them.
    Expert,
    /// Each token chooses its depth at the start, by a softmax over depths.
    Token,
}

/// The keys and values that a token sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Keys {
    /// Those of the tokens active at the same recursion: there are fewer of them at each one.
    Recursion,
    /// Those of all tokens, computed at the first recursion and kept.
    Shared,
}

/// The shared block and its routers.
pub struct Mor {
    /// Applied at every recursion. Its output projections must have no bias.
    pub block: Block,
    /// Expert choice: one `[width]` per recursion. Token choice: one `[width, recursions]`.
    pub routers: Vec<Tensor>,
    /// The most times that the block is applied.
    pub recursions: usize,
    /// Who chooses the tokens of a recursion.
    pub routing: Routing,
    /// The keys and values that a token sees.
    pub keys: Keys,
}

/// The record of one recursion.
pub struct Recursion {
    /// Positions that were scored, `[batch, candidates]` of u32.
    pub candidates: Tensor,
    /// Their scores, `[batch, candidates]`.
    pub scores: Tensor,
    /// Positions that were chosen, ascending, `[batch, chosen]` of u32. A row with fewer tokens is filled up with
    /// positions past its end.
    pub selected: Tensor,
    /// The gate of each chosen token, `[batch, chosen]`.
    pub gates: Tensor,
    /// The residual stream `[batch * tokens, width]`, with the block's output in the rows that were chosen.
    full: Tensor,
    rows: Tensor,
}

impl Recursion {
    /// The block's output for each chosen token, `[batch, chosen, width]`.
    pub fn output(&self) -> Tensor {
        let [batch, chosen] = [self.selected.shape()[0], self.selected.shape()[1]];
        self.full.index_select_padded(0, &self.rows).reshape([batch, chosen, self.full.shape()[1]])
    }

    /// Returns the auxiliary loss of expert choice: the mean binary cross-entropy between scores and choices. It makes a
    /// threshold of 1/2 take the tokens at inference that the ranking would take.
    pub fn auxiliary_loss(&self) -> Tensor {
        let chosen = self.candidates.unsqueeze(2).eq(&self.selected.unsqueeze(1)).cast(DType::F32).sum(2);
        let s = self.scores.clamp(1e-6, 1.0 - 1e-6);
        let of = |target: &Tensor, p: &Tensor| target.mul(&p.log());
        of(&chosen, &s).add(&of(&chosen.affine(-1.0, 1.0), &s.affine(-1.0, 1.0))).mean_all().neg()
    }
}

/// Returns the number of tokens kept at each recursion of `recursions`: `ceil(tokens (R - r) / R)`.
pub fn capacities(tokens: usize, recursions: usize) -> Vec<usize> {
    (0..recursions).map(|r| (tokens * (recursions - r)).div_ceil(recursions)).collect()
}

/// The chosen tokens of one recursion, in the form that the kernels need.
struct Chosen {
    /// Positions `[batch, count]`.
    positions: Tensor,
    /// Rows of `[batch * tokens, width]`. Padding names the row past the end.
    rows: Tensor,
    ones: Tensor,
    batch: usize,
    count: usize,
}

impl Chosen {
    fn new(positions: Tensor, tokens: usize) -> Chosen {
        let (batch, count) = (positions.shape()[0], positions.shape()[1]);
        let gpu = &positions.gpu().clone();
        let first: Vec<u32> = (0..batch).map(|b| (b * tokens) as u32).collect();
        let first = Tensor::from_slice(gpu, &first, [batch, 1]);
        let nobody = Tensor::from_slice(gpu, &[(batch * tokens) as u32], [1, 1]);
        let present = positions.lt(&Tensor::from_slice(gpu, &[tokens as u32], [1, 1]));
        let rows = positions.add(&first).where_mask(&present, &nobody.expand([batch, count]));
        let rows = rows.reshape([batch * count]).contiguous();
        Chosen { positions, rows, ones: Tensor::ones(gpu, [batch * count]).contiguous(), batch, count }
    }
}

/// Returns an additive mask by positions, `[batch, 1, queries, keys]`: zero where a query sees a key, minus infinity
/// elsewhere.
fn mask(queries: &Tensor, keys: &Tensor) -> Mask {
    let [q, k] = [queries.unsqueeze(2), keys.unsqueeze(1)];
    let seen = k.le(&q);
    let low = Tensor::full(queries.gpu(), *seen.shape(), f32::NEG_INFINITY);
    Mask::Additive(Tensor::zeros(queries.gpu(), *seen.shape()).where_mask(&seen, &low).unsqueeze(1))
}

/// Reshapes `[rows, heads * size]` to `[batch, heads, rows / batch, size]`.
fn heads(x: &Tensor, batch: usize, heads: usize) -> Tensor {
    let (rows, width) = (x.shape()[0], x.shape()[1]);
    x.reshape([batch, rows / batch, heads, width / heads]).permute([0, 2, 1, 3])
}

fn gathered(layer: &Linear, x: &Tensor, rows: &Tensor) -> Tensor {
    let y = x.linear_gathered(rows, &layer.weight);
    layer.bias.as_ref().map_or(y.clone(), |bias| y.add(bias))
}

impl Mor {
    /// Makes a model around `block`, with routers drawn from `rng`.
    ///
    /// # Panics
    /// When the block's output projections have biases, or there is no recursion.
    #[track_caller]
    pub fn new(
        gpu: &Gpu,
        block: Block,
        recursions: usize,
        routing: Routing,
        keys: Keys,
        rng: &mut Rng,
    ) -> Mor {
        let width = block.norm1.gain.count();
        let init = Init::Normal((1.0 / width as f32).sqrt());
        let routers = match routing {
            Routing::Expert => (0..recursions).map(|_| init.leaf(gpu, [width], rng)).collect(),
            Routing::Token => vec![init.leaf(gpu, [width, recursions], rng)],
        };
        Mor::from_parts(block, routers, recursions, routing, keys)
    }

    /// Makes a model of these parts.
    ///
    /// # Panics
    /// As [`Mor::new`].
    #[track_caller]
    pub fn from_parts(
        block: Block,
        routers: Vec<Tensor>,
        recursions: usize,
        routing: Routing,
        keys: Keys,
    ) -> Mor {
        let bare = block.attention.o.bias.is_none() && block.mlp.down.bias.is_none();
        assert!(bare, "mor: the block's output projections must have no bias: rows that rest must not move");
        assert!(recursions > 0, "mor: 0 recursions");
        Mor { block, routers, recursions, routing, keys }
    }

    /// Returns `x [batch, tokens, width]` after all recursions, and the record of each. Expert choice keeps
    /// `capacities[r]` tokens at recursion `r`. Token choice ignores the capacities.
    ///
    /// Gradients treat the choice as constant and flow through the gates.
    ///
    /// # Errors
    /// When the device fails, as token choice reads the depths back.
    ///
    /// # Panics
    /// When the number of capacities for expert choice is not that of the recursions, or a capacity is 0, above the
    /// number of tokens or above the one before.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, capacities: &[usize]) -> crate::Result<(Tensor, Vec<Recursion>)> {
        let [batch, tokens, width] = [x.shape()[0], x.shape()[1], x.shape()[2]];
        let all = Tensor::positions(x.gpu(), tokens).cast(DType::U32).expand([batch, tokens]);
        let mut x = x.reshape([batch * tokens, width]);
        let depths = match self.routing {
            Routing::Expert => {
                let falls = capacities.windows(2).all(|w| w[0] >= w[1]);
                let fits = capacities.len() == self.recursions
                    && falls
                    && capacities.iter().all(|&k| k > 0 && k <= tokens);
                assert!(
                    fits,
                    "mor: capacities {capacities:?} of {tokens} tokens at {} recursions",
                    self.recursions
                );
                None
            }
            Routing::Token => Some(self.depths(&x, [batch, tokens])?),
        };
        let mut active = all.contiguous();
        let mut shared = None;
        let mut done = Vec::new();
        for r in 0..self.recursions {
            let (scores, selected, gates) = match &depths {
                None => self.choose(&x, &active, capacities, r),
                Some((chosen, probabilities)) => {
                    let selected = listed(x.gpu(), chosen, r, tokens);
                    let gates = probabilities.gather_padded(1, &selected);
                    (probabilities.clone(), selected, gates)
                }
            };
            if selected.count() == 0 {
                break;
            }
            let chosen = Chosen::new(selected.clone(), tokens);
            let normed = self.block.norm1.forward(&x);
            if self.keys == Keys::Shared && shared.is_none() {
                shared = Some(self.keys_and_values(&normed, None, batch));
            }
            let full = self.block_on(&x, &normed, &chosen, shared.as_ref(), &all);
            // Each row's gate, or zero for rows that rest: a product with a single 1, scattered.
            let one = Tied::new(&Tensor::ones(x.gpu(), [1, 1])).shared();
            let column = gates.reshape([batch * chosen.count, 1]);
            let moves = Tensor::zeros(x.gpu(), [batch * tokens, 1]).add_linear_scattered(
                &column,
                &chosen.rows,
                &chosen.ones,
                &one,
            );
            x = x.add(&moves.mul(&full.sub(&x)));
            let candidates = std::mem::replace(&mut active, selected.clone());
            done.push(Recursion { candidates, scores, selected, gates, full, rows: chosen.rows });
        }
        Ok((x.reshape([batch, tokens, width]), done))
    }

    /// Expert choice: returns the scores of the active tokens, the best `capacities[r]` in order of position, and their
    /// scores.
    fn choose(
        &self,
        x: &Tensor,
        active: &Tensor,
        capacities: &[usize],
        r: usize,
    ) -> (Tensor, Tensor, Tensor) {
        let (batch, width) = (active.shape()[0], x.shape()[1]);
        let logits = x.matmul(&self.routers[r].reshape([width, 1])).reshape([batch, x.shape()[0] / batch]);
        let scores = logits.gather(1, active).sigmoid();
        let (_, best) = scores.detach().topk(capacities[r], 1);
        let (places, _) = best.sort(1, false);
        (scores.clone(), active.gather(1, &places), scores.gather(1, &places))
    }

    /// Token choice: returns the depth of every token, and the probability of that depth.
    fn depths(&self, x: &Tensor, [batch, tokens]: [usize; 2]) -> crate::Result<(Vec<Vec<u32>>, Tensor)> {
        let p = x.matmul(&self.routers[0]).softmax(-1);
        let depth = p.detach().argmax(1);
        let own = p.gather(1, &depth.reshape([batch * tokens, 1])).reshape([batch, tokens]);
        let depth = depth.to_vec::<u32>()?;
        Ok((depth.chunks(tokens).map(<[u32]>::to_vec).collect(), own))
    }

    /// Returns the balancing loss of token choice, `R sum_r f_r P_r`, where `f` is the share of tokens that choose depth
    /// `r` and `P` its mean probability. When all depths are chosen alike, it is 1, its least value.
    pub fn balance_loss(&self, x: &Tensor) -> Tensor {
        let width = x.shape()[x.shape().len() - 1];
        let p = x.reshape([x.count() / width, width]).matmul(&self.routers[0]).softmax(-1);
        let depths =
            Tensor::positions(x.gpu(), self.recursions).cast(DType::U32).reshape([1, self.recursions]);
        let taken = p.detach().argmax(1).unsqueeze(1).eq(&depths).cast(DType::F32).mean(0);
        taken.mul(&p.mean(0)).sum_all().scale(self.recursions as f32)
    }

    fn keys_and_values(&self, normed: &Tensor, rows: Option<&Tensor>, batch: usize) -> [Tensor; 2] {
        let attention = &self.block.attention;
        [&attention.k, &attention.v].map(|layer| {
            let y = match rows {
                Some(rows) => gathered(layer, normed, rows),
                None => layer.forward(normed),
            };
            heads(&y, batch, attention.kv_heads)
        })
    }

    /// Returns the residual stream with the chosen rows replaced by the block's output.
    fn block_on(
        &self,
        x: &Tensor,
        normed: &Tensor,
        chosen: &Chosen,
        shared: Option<&[Tensor; 2]>,
        all: &Tensor,
    ) -> Tensor {
        let (attention, mlp) = (&self.block.attention, &self.block.mlp);
        let q = heads(&gathered(&attention.q, normed, &chosen.rows), chosen.batch, attention.heads);
        let y = match shared {
            Some([k, v]) => q.attention(k, v, &mask(&chosen.positions, all)),
            None => {
                let [k, v] = self.keys_and_values(normed, Some(&chosen.rows), chosen.batch);
                // Positions rise along a row and padding comes last, so a causal mask hides later tokens and padding.
                q.attention(&k, &v, &Mask::Causal)
            }
        };
        let y = y.permute([0, 2, 1, 3]);
        let y = y.reshape([chosen.batch * chosen.count, y.shape()[2] * y.shape()[3]]);
        let x = x.add_linear_scattered(&y, &chosen.rows, &chosen.ones, &attention.o.weight);
        let normed = self.block.norm2.forward(&x);
        let hidden = mlp.activation.apply(&gathered(&mlp.up, &normed, &chosen.rows));
        x.add_linear_scattered(&hidden, &chosen.rows, &chosen.ones, &mlp.down.weight)
    }
}

/// Returns the positions of the tokens with a depth of at least `r`, row by row, padded with `tokens`.
fn listed(gpu: &Gpu, depths: &[Vec<u32>], r: usize, tokens: usize) -> Tensor {
    let rows: Vec<Vec<u32>> = depths
        .iter()
        .map(|row| (0..tokens as u32).filter(|&t| row[t as usize] >= r as u32).collect())
        .collect();
    let most = rows.iter().map(Vec::len).max().unwrap_or(0);
    let padded = rows
        .iter()
        .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(tokens as u32, most - row.len())));
    Tensor::from_slice(gpu, &padded.collect::<Vec<u32>>(), [rows.len(), most])
}

module!(Mor { block, routers, keys: _, recursions: _, routing: _ });
