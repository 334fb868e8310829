//! A random program: lines with operations on earlier lines, and which values are held.

use std::fmt;
use tiebeam::DType;
use tiebeam::share::{Draw, Mapping};

/// Integer inputs of an operation: ids or a mask. Printed in short form.
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

/// Elements of a leaf or a mask. Printed in short form.
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

/// The kind of a linear layer's weight. Its leaves follow the input in the line's arguments.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weight {
    Tied,
    LowRank(f32),
    Factored,
    /// One layer, which is combined from the atoms when it is read, or all layers combined at once (`made`).
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
    /// A mask of this shape, which is added to the scores. Minus infinity hides a key.
    Added(Vec<usize>, Data),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    Leaf(Data),
    Map(Map),
    Affine(f32, f32),
    Clamp(f32, f32),
    Zip(Zip),
    /// The first argument where the mask is set, else the second.
    Where(Ids),
    /// The first argument where the third is above the fourth, else the second.
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
    /// Whether it has a weight, and a bias.
    LayerNorm(bool, bool),
    RmsNorm(bool),
    Matmul,
    /// The weight, and whether there is a bias, which is the last argument.
    Linear(Weight, bool),
    Attention(Sees),
}

#[derive(Clone, Debug)]
pub struct Line {
    pub op: Op,
    pub args: Vec<usize>,
    pub shape: Vec<usize>,
    /// f32, f16 or bf16.
    pub dtype: DType,
    /// Whether it is tracked for gradients. A tracked leaf gets a gradient.
    pub tracked: bool,
    /// Whether it is held in a variable to the end, and checked.
    pub held: bool,
    /// Earlier lines that are evaluated after this one.
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
    /// Returns the last line that reads each line, or its own number if none does.
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
            write!(f, "  %{i}: {:?} {} = {:?} {}", line.shape, line.dtype, line.op, args.join(" "))?;
            let marks = [(line.tracked, "tracked"), (line.held, "held")];
            marks.iter().filter(|m| m.0).try_for_each(|m| write!(f, ", {}", m.1))?;
            line.evaluates.iter().try_for_each(|e| write!(f, "; evaluate %{e}"))?;
            writeln!(f)?;
        }
        let outputs: Vec<String> = self.outputs.iter().map(|(i, _)| format!("%{i}")).collect();
        writeln!(f, "  loss: weighted sum of {}", outputs.join(" "))
    }
}
