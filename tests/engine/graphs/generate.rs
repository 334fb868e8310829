//! Draws random programs with their expected values and errors.
//!
//! Each proposed line is interpreted exactly, and a few times with noise. It is kept if its numbers are neither huge nor lost in
//! rounding, and if none of its comparisons, maxima, kinks or roundings to 16 bits is so close that rounding could decide it
//! differently.

use super::expect::{Graph, expected, moved};
use super::host::{Tape, U, Var, rounded};
use super::interpret;
use super::program::*;
use tiebeam::{DType, Rng};

/// Number of interpretations with noise.
const NOISY: usize = 5;
/// The least distance of a number from its decision, relative to its change by noise.
const CLEAR: f64 = 16.0;
const SIZES: [usize; 10] = [1, 2, 3, 4, 5, 7, 8, 12, 16, 64];
const MOST: usize = 2048;

/// Draws the graph of a seed.
pub fn graph(seed: u64) -> Graph {
    (0..).find_map(|attempt| Maker::new(seed, attempt).graph()).expect("some attempt goes well")
}

pub(super) struct Maker {
    seed: u64,
    pub(super) rng: Rng,
    pub(super) lines: Vec<Line>,
    /// The exact tape, then those with noise.
    tapes: Vec<Tape>,
    vars: Vec<Var>,
}

impl Maker {
    fn new(seed: u64, attempt: u64) -> Maker {
        let noise = |n| (n > 0).then_some(seed.wrapping_mul(1000) + attempt * 100 + n);
        Maker {
            seed,
            rng: Rng::new(seed << 16 | attempt),
            lines: Vec::new(),
            tapes: (0..=NOISY as u64).map(|n| Tape::new(noise(n))).collect(),
            vars: Vec::new(),
        }
    }

    fn graph(mut self) -> Option<Graph> {
        let target = 6 + self.rng.below(20).min(self.rng.below(20));
        let (shape, dtype) = (self.shape(), self.dtype());
        self.leaf(&shape, dtype, true, 1.0);
        for _ in 0..300 {
            if self.lines.iter().filter(|l| !l.is_leaf()).count() < target {
                self.propose();
            }
        }
        let outputs = self.outputs()?;
        self.keep(&outputs);
        let program = Program { seed: self.seed, lines: self.lines, outputs };
        expected(program, self.tapes, &self.vars)
    }

    pub(super) fn chance(&mut self, percent: usize) -> bool {
        self.rng.below(100) < percent
    }

    pub(super) fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.rng.below(of.len())].clone()
    }

    pub(super) fn normal(&mut self, n: usize) -> Vec<f64> {
        let mut all = vec![0.0f32; n];
        self.rng.fill_normal(&mut all);
        all.into_iter().map(f64::from).collect()
    }

    pub(super) fn shape(&mut self) -> Vec<usize> {
        loop {
            let axes = self.pick(&[1, 1, 2, 2, 2, 3, 3, 4]);
            let shape: Vec<usize> = (0..axes).map(|_| self.pick(&SIZES)).collect();
            if shape.iter().product::<usize>() <= MOST / 2 {
                return shape;
            }
        }
    }

    pub(super) fn ids(&mut self, shape: &[usize], below: usize) -> Ids {
        let data = (0..shape.iter().product()).map(|_| self.rng.below(below) as u32).collect();
        Ids { shape: shape.to_vec(), data }
    }

    pub(super) fn exact(&self, line: usize) -> &[f64] {
        self.tapes[0].value(self.vars[line])
    }

    pub(super) fn sizes(&self, line: usize) -> Vec<usize> {
        self.lines[line].shape.clone()
    }

    /// Adds a line and returns its number, or `None` if the line is not usable.
    pub(super) fn push(&mut self, op: Op, args: &[usize], shape: &[usize]) -> Option<usize> {
        if shape.len() > 4 || shape.iter().product::<usize>() > MOST {
            return None;
        }
        // The arguments that are only compared get no gradient.
        let through = if op == Op::WhereGreater { &args[..2] } else { args };
        let tracked = op != Op::Detach && through.iter().any(|&a| self.lines[a].tracked);
        let dtype = self.dtype_of(&op, args);
        let (op, args, shape) = (op, args.to_vec(), shape.to_vec());
        self.try_line(Line { op, args, shape, dtype, tracked, held: false, evaluates: vec![] })
    }

    fn dtype_of(&mut self, op: &Op, args: &[usize]) -> DType {
        let dtypes: Vec<DType> = args.iter().map(|&a| self.lines[a].dtype).collect();
        match op {
            Op::Cast => {
                let others = [DType::F32, DType::F16, DType::Bf16].into_iter().filter(|d| *d != dtypes[0]);
                self.pick(&others.collect::<Vec<_>>())
            }
            Op::Zip(_) | Op::Where(_) | Op::WhereGreater if dtypes[0] == dtypes[1] => dtypes[0],
            Op::Map(_) | Op::Affine(..) | Op::Clamp(..) | Op::Detach | Op::Contiguous | Op::Slice(..) => {
                dtypes[0]
            }
            Op::Permute(_) | Op::Reshape | Op::Expand | Op::Unsqueeze(_) | Op::Squeeze(_) => dtypes[0],
            Op::Pad(..) | Op::Concat(_) | Op::Stack(_) | Op::IndexSelect(..) | Op::Gather(..) => dtypes[0],
            _ => DType::F32,
        }
    }

    /// Draws the type of a leaf.
    fn dtype(&mut self) -> DType {
        if self.chance(25) { self.pick(&[DType::F16, DType::Bf16]) } else { DType::F32 }
    }

    fn try_line(&mut self, line: Line) -> Option<usize> {
        let args: Vec<Var> = line.args.iter().map(|&a| self.vars[a]).collect();
        let before: Vec<_> = self.tapes.iter().map(|t| (t.nodes.len(), t.branches.len())).collect();
        let var = self.tapes.iter_mut().map(|t| interpret::line(t, &line, &args)).max().expect("tapes");
        if !self.is_sound(var, before[0].1) {
            for (tape, (nodes, branches)) in self.tapes.iter_mut().zip(before) {
                tape.nodes.truncate(nodes);
                tape.branches.truncate(branches);
            }
            return None;
        }
        self.vars.push(var);
        self.lines.push(line);
        Some(self.lines.len() - 1)
    }

    fn is_sound(&self, var: Var, first: usize) -> bool {
        let (exact, noisy) = self.tapes.split_first().expect("tapes");
        let values: Vec<&[f64]> = noisy.iter().map(|t| t.value(var)).collect();
        let largest =
            exact.value(var).iter().fold(0.0f64, |m, v| if v.is_nan() { f64::NAN } else { m.max(v.abs()) });
        let known = largest > 1e-3 && largest < 60.0 && moved(exact.value(var), &values) < 3e-5 * largest;
        known && (first..exact.branches.len()).all(|b| self.is_clear(b))
    }

    /// Whether rounding cannot change the decisions of a branch.
    fn is_clear(&self, b: usize) -> bool {
        let (exact, noisy) = self.tapes.split_first().expect("tapes");
        let branch = &exact.branches[b];
        (0..branch.quantity.len()).all(|i| {
            let q = branch.quantity[i];
            let noise = noisy.iter().map(|t| (t.branches[b].quantity[i] - q).abs()).fold(0.0, f64::max);
            let certain = noise == 0.0 && noisy.iter().all(|t| t.branches[b].tied[i] == branch.tied[i]);
            certain || branch.distance[i] > CLEAR * noise + 4.0 * U * q.abs()
        })
    }

    /// Adds a leaf with normal elements.
    pub(super) fn leaf(&mut self, shape: &[usize], dtype: DType, tracked: bool, scale: f64) -> usize {
        let n = shape.iter().product();
        let data = self.normal(n).into_iter().map(|v| v * scale).collect();
        self.given(shape, dtype, tracked, data)
    }

    pub(super) fn given(&mut self, shape: &[usize], dtype: DType, tracked: bool, data: Vec<f64>) -> usize {
        let op = Op::Leaf(Data(data.into_iter().map(|v| rounded(v, dtype)).collect()));
        let line =
            Line { op, args: vec![], shape: shape.to_vec(), dtype, tracked, held: true, evaluates: vec![] };
        let var = self.tapes.iter_mut().map(|t| interpret::line(t, &line, &[])).max().expect("tapes");
        self.vars.push(var);
        self.lines.push(line);
        self.lines.len() - 1
    }

    /// Picks an earlier line that satisfies `will_do`, preferably a late one.
    pub(super) fn any(&mut self, will_do: impl Fn(&Line) -> bool) -> Option<usize> {
        let all: Vec<usize> = (0..self.lines.len()).filter(|&i| will_do(&self.lines[i])).collect();
        let late = if self.chance(60) { all.len().saturating_sub(4) } else { 0 };
        if all.is_empty() { None } else { Some(self.pick(&all[late..])) }
    }

    /// Returns a line of this shape, either an earlier one or a new leaf.
    pub(super) fn operand(&mut self, shape: &[usize]) -> usize {
        let there = if self.chance(50) { self.any(|l| l.shape == shape) } else { None };
        let (dtype, tracked) = (self.dtype(), self.chance(75));
        there.unwrap_or_else(|| self.leaf(shape, dtype, tracked, 0.7))
    }

    /// Draws a shape that broadcasts with this one.
    fn partner(&mut self, shape: &[usize]) -> Vec<usize> {
        let mut shape: Vec<usize> = shape.iter().map(|&n| if self.chance(20) { 1 } else { n }).collect();
        if self.chance(20) && !shape.is_empty() {
            shape.remove(0);
        } else if self.chance(8) && shape.len() < 4 {
            shape.insert(0, self.pick(&[2, 3]));
        }
        shape
    }

    fn propose(&mut self) -> Option<usize> {
        match self.rng.below(100) {
            0..17 => self.unary(),
            17..33 => self.binary(),
            33..37 => self.masked(),
            37..50 => self.view(),
            50..59 => self.several_views(),
            59..63 => self.joined(),
            63..72 => self.reduction(),
            72..77 => self.normalised(),
            77..83 => self.product(),
            83..88 => self.layer(),
            88..94 => self.look_up(),
            94..96 => self.attention(),
            _ => self.kept_apart(),
        }
    }

    fn unary(&mut self) -> Option<usize> {
        let x = self.any(|_| true)?;
        let least = self.exact(x).iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.exact(x).iter().copied().fold(0.0f64, |m, v| m.max(v.abs()));
        let mut maps = vec![Map::Neg, Map::Tanh, Map::Sigmoid, Map::Erf, Map::Gelu, Map::GeluTanh, Map::Silu];
        maps.extend([Map::Relu, Map::Sin, Map::Cos, Map::Abs]);
        if least > 0.2 {
            maps.extend([Map::Log, Map::Sqrt, Map::Rsqrt, Map::Recip].repeat(3));
        }
        if most < 6.0 {
            maps.extend([Map::Square, Map::Square]);
        }
        if most < 3.0 {
            maps.extend([Map::Exp, Map::Exp]);
        }
        let op = match self.rng.below(8) {
            0 => Op::Affine(self.pick(&[0.5, -1.3, 0.7, 1.0]), self.pick(&[0.0, 0.5, -0.25])),
            1 => Op::Clamp(self.pick(&[-1.03, -0.41]), self.pick(&[0.37, 0.92])),
            _ => Op::Map(self.pick(&maps)),
        };
        let shape = self.sizes(x);
        self.push(op, &[x], &shape)
    }

    /// Adds `x^2 + 0.5`.
    fn positive(&mut self, x: usize) -> Option<usize> {
        let shape = self.sizes(x);
        let square = self.push(Op::Map(Map::Square), &[x], &shape)?;
        self.push(Op::Affine(1.0, 0.5), &[square], &shape)
    }

    pub(super) fn zip(&mut self, zip: Zip, a: usize, b: usize) -> Option<usize> {
        let shape = broadcast(&self.sizes(a), &self.sizes(b))?;
        self.push(Op::Zip(zip), &[a, b], &shape)
    }

    fn binary(&mut self) -> Option<usize> {
        let a = self.any(|_| true)?;
        let shape = self.sizes(a);
        let shape = self.partner(&shape);
        let mut b = self.operand(&shape);
        let zips = [Zip::Add, Zip::Sub, Zip::Mul, Zip::Mul, Zip::Div, Zip::Maximum, Zip::Minimum];
        let zip = self.pick(&zips);
        if zip == Zip::Div && self.exact(b).iter().any(|v| v.abs() < 0.3) {
            b = self.positive(b)?;
        }
        let [a, b] = if zip != Zip::Div && self.chance(30) { [b, a] } else { [a, b] };
        self.zip(zip, a, b)
    }

    fn masked(&mut self) -> Option<usize> {
        let a = self.any(|_| true)?;
        let to = self.sizes(a);
        let b = self.partner(&to);
        let b = self.operand(&b);
        let to = broadcast(&to, &self.sizes(b))?;
        if self.chance(50) {
            let shape: Vec<usize> = to.iter().map(|&n| if self.chance(25) { 1 } else { n }).collect();
            let mask = self.ids(&shape, 2);
            return self.push(Op::Where(mask), &[a, b], &to);
        }
        let c = self.operand(&to);
        let shape: Vec<usize> = to.iter().map(|&n| if self.chance(25) { 1 } else { n }).collect();
        let d = self.operand(&shape);
        self.push(Op::WhereGreater, &[a, b, c, d], &to)
    }

    fn view(&mut self) -> Option<usize> {
        let x = self.any(|_| true)?;
        let mut shape = self.sizes(x);
        let axes = shape.len();
        match self.rng.below(9) {
            0 | 1 if axes > 0 => {
                let axis = self.rng.below(axes);
                let (start, end) = self.range(shape[axis]);
                shape[axis] = end - start;
                self.push(Op::Slice(axis, start, end), &[x], &shape)
            }
            2 | 3 if axes > 1 => {
                let mut order: Vec<usize> = (0..axes).collect();
                self.rng.shuffle(&mut order);
                let to: Vec<usize> = order.iter().map(|&a| shape[a]).collect();
                self.push(Op::Permute(order), &[x], &to)
            }
            4 => {
                let to = self.split(shape.iter().product());
                self.push(Op::Reshape, &[x], &to)
            }
            5 => {
                shape.iter_mut().filter(|n| **n == 1).for_each(|n| *n = 3);
                if shape == self.lines[x].shape {
                    shape.insert(0, self.pick(&[2, 4]));
                }
                self.push(Op::Expand, &[x], &shape)
            }
            6 => {
                let axis = self.rng.below(axes + 1);
                shape.insert(axis, 1);
                self.push(Op::Unsqueeze(axis), &[x], &shape)
            }
            7 => {
                let axis = shape.iter().position(|&n| n == 1)?;
                shape.remove(axis);
                self.push(Op::Squeeze(axis), &[x], &shape)
            }
            8 if axes > 0 => {
                let (axis, before) = (self.rng.below(axes), self.rng.below(4));
                let after = self.rng.below(3) + (before == 0) as usize;
                shape[axis] += before + after;
                self.push(Op::Pad(axis, before, after), &[x], &shape)
            }
            _ => None,
        }
    }

    /// Draws a range of an axis, which often starts at a multiple of 64.
    fn range(&mut self, size: usize) -> (usize, usize) {
        let start = if size > 64 && self.chance(50) {
            64 * self.rng.below(size.div_ceil(64))
        } else {
            self.rng.below(size)
        };
        (start, start + 1 + self.rng.below(size - start))
    }

    /// Draws a shape with this many elements.
    fn split(&mut self, mut count: usize) -> Vec<usize> {
        let mut shape = Vec::new();
        while count > 1 && shape.len() < 3 {
            let n = self.pick(&SIZES);
            if count.is_multiple_of(n) {
                shape.push(n);
                count /= n;
            }
            if self.chance(10) {
                break;
            }
        }
        shape.push(count);
        self.rng.shuffle(&mut shape);
        shape
    }

    /// Adds an expression of two or three parts of one value, or of a value and its transpose.
    fn several_views(&mut self) -> Option<usize> {
        let x = self.any(|l| l.count() > 1)?;
        let shape = self.sizes(x);
        if shape.len() == 2 && shape[0] == shape[1] && self.chance(60) {
            let turned = self.push(Op::Permute(vec![1, 0]), &[x], &shape)?;
            let zip = self.pick(&[Zip::Add, Zip::Sub, Zip::Mul]);
            return self.zip(zip, x, turned);
        }
        if self.chance(50) {
            return self.aligned_views();
        }
        let axes: Vec<usize> = (0..shape.len()).filter(|&a| shape[a] > 1).collect();
        let axis = self.pick(&axes);
        let size = 1 + self.rng.below(shape[axis] - 1);
        self.parts(x, axis, size, 1)
    }

    /// Adds an expression of parts that begin at multiples of 64 elements, where kernels can bind them without a copy.
    fn aligned_views(&mut self) -> Option<usize> {
        let there = self.any(|l| l.count() > 64 && l.count().is_multiple_of(64));
        let new = [self.pick(&[2, 3, 4]), 64];
        let x = there.unwrap_or_else(|| self.leaf(&new, DType::F32, true, 1.0));
        let rows = self.lines[x].count() / 64;
        let flat = self.chance(50);
        let to = if flat { vec![rows * 64] } else { vec![rows, 64] };
        let x = if self.lines[x].shape == to { x } else { self.push(Op::Reshape, &[x], &to)? };
        let step = if flat { 64 } else { 1 };
        let size = 1 + self.rng.below(rows - 1);
        self.parts(x, 0, size * step, step)
    }

    /// Combines two or three parts of an axis, each of this size and starting at a multiple of `step`.
    fn parts(&mut self, x: usize, axis: usize, size: usize, step: usize) -> Option<usize> {
        let mut shape = self.sizes(x);
        let mut starts: Vec<usize> = (0..=shape[axis] - size).step_by(step).collect();
        self.rng.shuffle(&mut starts);
        shape[axis] = size;
        let mut y = None;
        for i in 0..2 + self.rng.below(2) {
            let start = starts[i % starts.len()];
            let mut part = self.push(Op::Slice(axis, start, start + size), &[x], &shape)?;
            if self.chance(20) {
                part = self.unary_of(part).unwrap_or(part);
            }
            let zip = self.pick(&[Zip::Add, Zip::Sub, Zip::Mul, Zip::Maximum]);
            y = match y {
                None => Some(part),
                Some(y) => Some(self.zip(zip, y, part).or_else(|| self.zip(Zip::Add, y, part))?),
            };
        }
        y
    }

    fn unary_of(&mut self, x: usize) -> Option<usize> {
        let map = self.pick(&[Map::Tanh, Map::Sin, Map::Neg, Map::Silu]);
        let shape = self.sizes(x);
        self.push(Op::Map(map), &[x], &shape)
    }
}

fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let axes = a.len().max(b.len());
    let at = |s: &[usize], i: usize| if i + s.len() < axes { 1 } else { s[i + s.len() - axes] };
    (0..axes)
        .map(|i| match (at(a, i), at(b, i)) {
            (a, b) if a == b || b == 1 => Some(a),
            (1, b) => Some(b),
            _ => None,
        })
        .collect()
}
