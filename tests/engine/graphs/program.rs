//! A random program: lines of operations over earlier lines, and how its values are kept.

use std::fmt;
use tiebeam::share::{Draw, Mapping};

/// Integers that an operation reads: ids or a mask. Printed in short.
#[derive(Clone, PartialEq)]
pub struct Ids {
    pub shape: Vec<usize>,
    pub data: Vec<u32>,
}

impl fmt::Debug for Ids {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let most = self.data.len().min(12);
        let more = if most < self.data.len() { ", .." } else { "" };
        write!(f, "{:?} of {:?}{more}", self.shape, &self.data[..most])
    }
}

/// Elements of a leaf or a mask. Printed in short.
#[derive(Clone, PartialEq)]
pub struct Data(pub Vec<f64>);

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let largest = self.0.iter().filter(|v| v.is_finite()).fold(0.0f64, |m, v| m.max(v.abs()));
        write!(f, "up to {largest:.3}")
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Map {
    Neg,
    Exp,
    Log,
    Sqrt,
    Rsqrt,
    Recip,
    Square,
    Tanh,
    Sigmoid,
    Erf,
    Gelu,
    GeluTanh,
    Silu,
    Relu,
    Sin,
    Cos,
    Abs,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Zip {
    Add,
    Sub,
    Mul,
    Div,
    Maximum,
    Minimum,
}

/// Of which kind the weight of a linear layer is; the leaves follow the input in the line's arguments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weight {
    Tied,
    LowRank(f32),
    Factored,
    /// One layer, read from the atoms as it is used, or all layers made at once.
    Dictionary {
        layer: usize,
        made: bool,
    },
    Hashed {
        offset: usize,
        scale: f32,
        stable: bool,
    },
}

impl Weight {
    pub fn draw(offset: usize, scale: f32, stable: bool, stored: usize, size: [usize; 2]) -> Draw {
        let mapping = if stable { Mapping::Stable } else { Mapping::Element };
        Draw { stored, size, offset, layer: 0, scale, mapping, seeds: tiebeam::share::hashed::SEEDS }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Sees {
    All,
    Causal,
    /// Added to the scores, of this shape; minus infinity hides.
    Added(Vec<usize>, Data),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    Leaf(Data),
    Map(Map),
    Affine(f32, f32),
    Clamp(f32, f32),
    Zip(Zip),
    /// The first where the mask is set, else the second.
    Where(Ids),
    /// The first where the third is above the fourth, else the second.
    WhereGreater,
    Cast,
    Detach,
    Contiguous,
    Slice(usize, usize, usize),
    Permute(Vec<usize>),
    Reshape,
    Expand,
    Unsqueeze(usize),
    Squeeze(usize),
    Pad(usize, usize, usize),
    Concat(usize),
    Stack(usize),
    Sum(usize),
    Mean(usize),
    SumAll,
    MeanAll,
    SumTo,
    Max(usize),
    Min(usize),
    Cumsum(usize),
    CumsumReverse(usize),
    IndexSelect(usize, Ids),
    IndexSum(usize, Ids),
    Gather(usize, Ids),
    Embedding(Ids),
    Softmax(usize),
    LogSoftmax(usize),
    /// With weight, with bias.
    LayerNorm(bool, bool),
    RmsNorm(bool),
    Matmul,
    /// With bias, which is the last argument.
    Linear(Weight, bool),
    Attention(Sees),
}

#[derive(Clone, Debug)]
pub struct Line {
    pub op: Op,
    pub args: Vec<usize>,
    pub shape: Vec<usize>,
    /// Stored as f16.
    pub half: bool,
    /// Part of the graph; for a leaf, that it wants a gradient.
    pub tracked: bool,
    /// Kept in a variable to the end, and checked.
    pub held: bool,
    /// Earlier lines that are told to compute after this one.
    pub evaluates: Vec<usize>,
}

impl Line {
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_leaf(&self) -> bool {
        matches!(self.op, Op::Leaf(_))
    }
}

#[derive(Clone)]
pub struct Program {
    pub seed: u64,
    pub lines: Vec<Line>,
    /// The loss is the sum of these lines' elements times these weights.
    pub outputs: Vec<(usize, Vec<f64>)>,
}

impl Program {
    /// The last line that reads each line; its own number where none does.
    pub fn last_uses(&self) -> Vec<usize> {
        let mut last: Vec<usize> = (0..self.lines.len()).collect();
        for (i, line) in self.lines.iter().enumerate() {
            line.args.iter().for_each(|&a| last[a] = i);
        }
        last
    }

    /// The lines that are leaves.
    pub fn leaves(&self) -> Vec<usize> {
        (0..self.lines.len()).filter(|&i| self.lines[i].is_leaf()).collect()
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "graph {}: TIEBEAM_GRAPH_SEED={} runs it alone", self.seed, self.seed)?;
        for (i, line) in self.lines.iter().enumerate() {
            let args: Vec<String> = line.args.iter().map(|a| format!("%{a}")).collect();
            let dtype = if line.half { "f16" } else { "f32" };
            write!(f, "  %{i}: {:?} {dtype} = {:?} {}", line.shape, line.op, args.join(" "))?;
            let marks = [(line.tracked, "tracked"), (line.held, "held")];
            marks.iter().filter(|m| m.0).try_for_each(|m| write!(f, ", {}", m.1))?;
            line.evaluates.iter().try_for_each(|e| write!(f, "; evaluate %{e}"))?;
            writeln!(f)?;
        }
        let outputs: Vec<String> = self.outputs.iter().map(|(i, _)| format!("%{i}")).collect();
        writeln!(f, "  loss: weighted sum of {}", outputs.join(" "))
    }
}
