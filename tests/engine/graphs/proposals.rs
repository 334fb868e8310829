//! Proposes operations that are neither elementwise nor views, and decides which values are outputs and which are held.

use super::generate::Maker;
use super::program::*;
use std::collections::HashSet;
use tiebeam::DType;

impl Maker {
    /// Joins a value with itself or with others along an old or a new axis. Only values of one type are joined.
    pub(super) fn joined(&mut self) -> Option<usize> {
        // In half of the cases, a value whose parts in the result are aligned.
        let aligned = if self.chance(50) {
            self.any(|l| l.count() <= 1024 && l.count().is_multiple_of(64))
        } else {
            None
        };
        let x = aligned.or_else(|| self.any(|l| l.count() <= 1024))?;
        let mut shape = self.sizes(x);
        let dtype = self.lines[x].dtype;
        let other = self.any(|l| l.shape == shape && l.dtype == dtype).unwrap_or(x);
        let all = self.pick(&[vec![x, x], vec![x, other], vec![x, other, x]]);
        if shape.is_empty() || self.chance(50) {
            let axis = if self.chance(60) { 0 } else { self.rng.below(shape.len() + 1) };
            shape.insert(axis, all.len());
            return self.push(Op::Stack(axis), &all, &shape);
        }
        let axis = self.rng.below(shape.len());
        shape[axis] *= all.len();
        self.push(Op::Concat(axis), &all, &shape)
    }

    pub(super) fn reduction(&mut self) -> Option<usize> {
        let x = self.any(|l| !l.shape.is_empty() && l.count() > 1)?;
        let shape = self.sizes(x);
        let axis = self.rng.below(shape.len());
        let mut less = shape.clone();
        less.remove(axis);
        match self.rng.below(10) {
            0 | 1 => self.push(Op::Sum(axis), &[x], &less),
            2 => self.push(Op::Mean(axis), &[x], &less),
            3 => self.push(Op::Max(axis), &[x], &less),
            4 => self.push(Op::Min(axis), &[x], &less),
            5 => self.push(Op::SumAll, &[x], &[]),
            6 => self.push(Op::MeanAll, &[x], &[]),
            7 => {
                let mut to: Vec<usize> = shape.iter().map(|&n| if self.chance(50) { 1 } else { n }).collect();
                to.drain(..self.rng.below(shape.len() + 1));
                let smaller = to.iter().product::<usize>() < self.lines[x].count();
                if smaller { self.push(Op::SumTo, &[x], &to) } else { None }
            }
            8 => self.push(Op::Cumsum(axis), &[x], &shape),
            _ => self.push(Op::CumsumReverse(axis), &[x], &shape),
        }
    }

    pub(super) fn normalised(&mut self) -> Option<usize> {
        let x = self.any(|l| l.shape.last().is_some_and(|&n| n > 2))?;
        let shape = self.sizes(x);
        let last = shape[shape.len() - 1];
        let axis = self.rng.below(shape.len());
        let (weight, bias) = (self.chance(60), self.chance(50));
        let mut args = vec![x];
        match self.rng.below(4) {
            0 => self.push(Op::Softmax(axis), &args, &shape),
            1 => self.push(Op::LogSoftmax(axis), &args, &shape),
            2 => {
                args.extend((0..weight as usize + bias as usize).map(|_| self.operand(&[last])));
                self.push(Op::LayerNorm(weight, bias), &args, &shape)
            }
            _ => {
                args.extend(weight.then(|| self.operand(&[last])));
                self.push(Op::RmsNorm(weight), &args, &shape)
            }
        }
    }

    pub(super) fn product(&mut self) -> Option<usize> {
        let x = self.any(|l| l.shape.len() >= 2)?;
        let shape = self.sizes(x);
        let axes = shape.len();
        let [m, k] = [shape[axes - 2], shape[axes - 1]];
        let n = self.pick(&[1, 3, 4, 7, 8, 16, 64]);
        let turn = |axes: usize| -> Vec<usize> { (0..axes - 2).chain([axes - 1, axes - 2]).collect() };
        let mut to = shape.clone();
        to[axes - 1] = n;
        let right = match self.rng.below(4) {
            0 => {
                // The product with its own transpose.
                let mut turned = shape.clone();
                turned.swap(axes - 2, axes - 1);
                to[axes - 1] = m;
                self.push(Op::Permute(turn(axes)), &[x], &turned)?
            }
            1 => {
                let w = self.operand(&[n, k]);
                self.push(Op::Permute(vec![1, 0]), &[w], &[k, n])?
            }
            2 if axes > 2 => {
                let mut batched: Vec<usize> =
                    shape[..axes - 2].iter().map(|&b| if self.chance(25) { 1 } else { b }).collect();
                batched.extend([k, n]);
                self.operand(&batched)
            }
            _ => self.operand(&[k, n]),
        };
        self.push(Op::Matmul, &[x, right], &to)
    }

    pub(super) fn layer(&mut self) -> Option<usize> {
        let x = self.any(|l| l.shape.last().is_some_and(|&n| n > 1))?;
        let mut to = self.sizes(x);
        let k = to[to.len() - 1];
        let n = self.pick(&[1, 3, 4, 8, 12, 16]);
        *to.last_mut()? = n;
        let r = self.pick(&[1, 2, 4]);
        let mut args = vec![x];
        let scale = self.pick(&[0.5, 1.25]);
        let weight = match self.rng.below(5) {
            0 => {
                args.push(self.operand(&[n, k]));
                Weight::Tied
            }
            1 => {
                let leaves = [[n, k], [r, k], [n, r]].map(|shape| self.plain(&shape));
                args.extend(leaves);
                Weight::LowRank(scale)
            }
            2 => {
                args.extend([[r, k], [n, r]].map(|shape| self.plain(&shape)));
                Weight::Factored
            }
            3 => {
                let layers = r + self.rng.below(2);
                args.push(self.plain(&[r, n, k]));
                args.push(self.plain(&[layers, r]));
                Weight::Dictionary { layer: self.rng.below(layers), made: self.chance(50) }
            }
            _ => {
                let stored = self.pick(&[5, 16, 64]);
                args.push(self.plain(&[stored]));
                Weight::Hashed { offset: self.pick(&[0, 3, 128]), scale, stable: self.chance(50) }
            }
        };
        let bias = self.chance(50);
        args.extend(bias.then(|| self.operand(&[n])));
        self.push(Op::Linear(weight, bias), &args, &to)
    }

    /// Returns an f32 line of this shape, as a leaf of a site must be.
    fn plain(&mut self, shape: &[usize]) -> usize {
        let there = if self.chance(40) { self.any(|l| l.shape == shape && !l.dtype.is_half()) } else { None };
        let tracked = self.chance(80);
        there.unwrap_or_else(|| self.leaf(shape, DType::F32, tracked, 0.6))
    }

    pub(super) fn look_up(&mut self) -> Option<usize> {
        let x = self.any(|l| !l.shape.is_empty())?;
        let mut shape = self.sizes(x);
        let axis = self.rng.below(shape.len());
        let (size, count) = (shape[axis], self.pick(&[1, 3, 4, 7, 12]));
        // Sometimes an id may be outside.
        let below = size + self.chance(20) as usize;
        match self.rng.below(4) {
            0 => {
                let x = self.any(|l| l.shape.len() == 2)?;
                let shape = self.sizes(x);
                let mut to = self.pick(&[vec![count], vec![2, count]]);
                let ids = self.ids(&to, shape[0]);
                to.push(shape[1]);
                self.push(Op::Embedding(ids), &[x], &to)
            }
            1 => {
                shape[axis] = count;
                let ids = self.ids(&[count], below);
                self.push(Op::IndexSelect(axis, ids), &[x], &shape)
            }
            2 => {
                let below = count + self.chance(20) as usize;
                let ids = self.ids(&[size], below);
                shape[axis] = count;
                self.push(Op::IndexSum(axis, ids), &[x], &shape)
            }
            _ => {
                shape[axis] = count;
                for a in (0..shape.len()).filter(|&a| a != axis) {
                    shape[a] -= if self.chance(25) { self.rng.below(shape[a]) } else { 0 };
                }
                let ids = self.ids(&shape, below);
                self.push(Op::Gather(axis, ids), &[x], &shape)
            }
        }
    }

    pub(super) fn attention(&mut self) -> Option<usize> {
        let [batch, groups, heads, tokens, keys] = [
            self.pick(&[1, 2]),
            self.pick(&[1, 2]),
            self.pick(&[1, 2]),
            self.pick(&[1, 3, 8]),
            self.pick(&[1, 4, 7, 16]),
        ];
        let width = self.pick(&[2, 4, 5, 8]);
        let count = batch * groups * heads * tokens * width;
        let to = [batch, groups * heads, tokens, width];
        let q = match self.any(|l| l.count() == count && l.shape != to) {
            Some(x) => self.push(Op::Reshape, &[x], &to)?,
            None => self.operand(&to),
        };
        let [k, v] = [(); 2].map(|()| self.operand(&[batch, groups, keys, width]));
        let sees = match self.rng.below(3) {
            0 => Sees::All,
            1 => Sees::Causal,
            _ => {
                let full = [batch, groups * heads, tokens, keys];
                let shape: Vec<usize> = full.iter().map(|&n| if self.chance(40) { 1 } else { n }).collect();
                let data = self.normal(shape.iter().product());
                let hidden = |v: f64| if v > 1.2 { f64::NEG_INFINITY } else { v };
                Sees::Added(shape, Data(data.into_iter().map(hidden).collect()))
            }
        };
        self.push(Op::Attention(sees), &[q, k, v], &to)
    }

    /// Adds a cast, a copy or a detached value.
    pub(super) fn kept_apart(&mut self) -> Option<usize> {
        let x = self.any(|l| !l.dtype.is_half() || l.count() < 200)?;
        let shape = self.sizes(x);
        let op = self.pick(&[Op::Cast, Op::Cast, Op::Detach, Op::Contiguous]);
        self.push(op, &[x], &shape)
    }

    /// Chooses the outputs of the loss: all values that nothing else reads, and sometimes one that is read.
    pub(super) fn outputs(&mut self) -> Option<Vec<(usize, Vec<f64>)>> {
        let tracked = || self.lines.iter().filter(|l| l.tracked);
        let read: HashSet<usize> = tracked().flat_map(|l| l.args.iter().copied()).collect();
        let mut outputs = Vec::new();
        for i in 0..self.lines.len() {
            let line = &self.lines[i];
            let (ends, count) = (!read.contains(&i) && !line.is_leaf(), line.count());
            if line.tracked && (ends || self.chance(4)) {
                let weights = self.normal(count);
                let stored = |w: f64| (w / (count as f64).sqrt()) as f32 as f64;
                outputs.push((i, weights.into_iter().map(stored).collect()));
            }
        }
        Some(outputs).filter(|o| !o.is_empty())
    }

    /// Chooses which values are held in variables, and which are evaluated early, and when.
    pub(super) fn keep(&mut self, outputs: &[(usize, Vec<f64>)]) {
        for i in 0..self.lines.len() {
            let output = outputs.iter().any(|o| o.0 == i);
            let untracked = !self.lines[i].tracked && !self.lines[i].is_leaf();
            self.lines[i].held = self.chance(if output {
                50
            } else if untracked {
                100
            } else {
                25
            });
            if self.chance(15) {
                let at = (i + self.pick(&[0, 0, 1, 3])).min(self.lines.len() - 1);
                self.lines[at].evaluates.push(i);
            }
        }
    }
}
