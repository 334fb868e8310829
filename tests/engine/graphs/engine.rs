//! Runs a program's operations by the library.

use super::EPS;
use super::program::{Ids, Line, Map, Op, Program, Sees, Weight, Zip};
use std::sync::Arc;
use tiebeam::nn::Mask;
use tiebeam::ops::case::Array;
use tiebeam::ops::product::matmul::Epilogue;
use tiebeam::share::{Dictionary, Factored, Hashed, LowRank, Site, Tied};
use tiebeam::{DType, Gpu, Tensor};

/// Inputs of a program other than its leaves: ids, masks, the outputs' weights.
pub struct Constants {
    of_lines: Vec<Option<Tensor>>,
    weights: Vec<Tensor>,
}

/// The results of a run, by line.
pub struct Outcome {
    pub loss: Tensor,
    pub held: Vec<(usize, Tensor)>,
    pub grads: Vec<(usize, Tensor)>,
}

pub fn upload(gpu: &Gpu, shape: &[usize], dtype: DType, data: &[f64]) -> Tensor {
    Array { shape: shape.into(), data: data.to_vec() }.upload(gpu, dtype)
}

/// Returns tensors for the leaves, not yet marked as leaves. `replaced(i, data)` returns the elements of line `i` from its own.
pub fn leaves(gpu: &Gpu, program: &Program, replaced: impl Fn(usize, &[f64]) -> Vec<f64>) -> Vec<Tensor> {
    let one = |i: usize| match &program.lines[i] {
        Line { op: Op::Leaf(data), shape, dtype, .. } => upload(gpu, shape, *dtype, &replaced(i, &data.0)),
        line => panic!("no leaf: {line:?}"),
    };
    program.leaves().into_iter().map(one).collect()
}

pub fn constants(gpu: &Gpu, program: &Program) -> Constants {
    let ids = |ids: &Ids| Some(Tensor::from_slice(gpu, &ids.data, &ids.shape[..]));
    let of_line = |line: &Line| match &line.op {
        Op::Where(x) | Op::IndexSelect(_, x) | Op::IndexSum(_, x) | Op::Gather(_, x) | Op::Embedding(x) => {
            ids(x)
        }
        Op::Attention(Sees::Added(shape, data)) => Some(upload(gpu, shape, DType::F32, &data.0)),
        _ => None,
    };
    let weights = |(output, weights): &(usize, Vec<f64>)| {
        upload(gpu, &program.lines[*output].shape, DType::F32, weights)
    };
    Constants {
        of_lines: program.lines.iter().map(of_line).collect(),
        weights: program.outputs.iter().map(weights).collect(),
    }
}

/// Runs a program on these leaves, in order of lines. A value that is not held is dropped after its last use.
pub fn run(program: &Program, constants: &Constants, leaves: &[Tensor]) -> tiebeam::Result<Outcome> {
    let last = program.last_uses();
    let mut values: Vec<Option<Tensor>> = Vec::new();
    let mut rest = leaves.iter();
    let mut roots: Vec<(usize, Tensor)> = Vec::new();
    for (i, line) in program.lines.iter().enumerate() {
        let y = if line.is_leaf() {
            let x = rest.next().expect("a leaf").clone();
            let x = if line.tracked { x.requires_grad() } else { x };
            roots.push((i, x.clone()));
            x
        } else {
            let args: Vec<&Tensor> =
                line.args.iter().map(|&a| values[a].as_ref().expect("kept to its last use")).collect();
            apply(line, &args, constants.of_lines[i].as_ref())
        };
        assert_eq!(y.shape()[..], line.shape[..], "%{i}: {:?}", line.op);
        assert_eq!((y.dtype(), y.is_tracked()), (line.dtype, line.tracked), "%{i}: {:?}", line.op);
        values.push(Some(y));
        line.evaluates.iter().filter_map(|&e| values[e].as_ref()).for_each(Tensor::evaluate);
        for j in 0..=i {
            let wanted = program.lines[j].held || program.outputs.iter().any(|o| o.0 == j);
            if last[j] <= i && !wanted {
                values[j] = None;
            }
        }
    }
    let mut loss: Option<Tensor> = None;
    for ((output, _), weights) in program.outputs.iter().zip(&constants.weights) {
        let sum = values[*output].as_ref().expect("an output").mul(weights).sum_all();
        loss = Some(loss.map_or(sum.clone(), |loss| loss.add(&sum)));
        if !program.lines[*output].held {
            values[*output] = None;
        }
    }
    let loss = loss.expect("a program has an output");
    let grads = loss.backward()?;
    let grad = |(i, leaf): &(usize, Tensor)| Some((*i, grads.get(leaf)?.clone()));
    let held = |i: usize| Some((i, values[i].clone().filter(|_| program.lines[i].held)?));
    Ok(Outcome {
        held: (0..values.len()).filter_map(held).collect(),
        grads: roots.iter().filter_map(grad).collect(),
        loss,
    })
}

fn apply(line: &Line, args: &[&Tensor], constant: Option<&Tensor>) -> Tensor {
    let x = args[0];
    let to = &line.shape[..];
    let constant = || constant.expect("uploaded");
    match &line.op {
        Op::Leaf(_) => unreachable!("leaves are given"),
        Op::Map(map) => mapped(*map, x),
        Op::Affine(scale, 0.0) => x.scale(*scale),
        Op::Affine(scale, shift) => x.affine(*scale, *shift),
        Op::Clamp(low, high) => x.clamp(*low, *high),
        Op::Zip(zip) => match zip {
            Zip::Add => x.add(args[1]),
            Zip::Sub => x.sub(args[1]),
            Zip::Mul => x.mul(args[1]),
            Zip::Div => x.div(args[1]),
            Zip::Maximum => x.maximum(args[1]),
            Zip::Minimum => x.minimum(args[1]),
        },
        Op::Where(_) => x.where_mask(constant(), args[1]),
        Op::WhereGreater => x.where_mask(&args[2].gt(args[3]), args[1]),
        Op::Cast => x.cast(line.dtype),
        Op::Detach => x.detach(),
        Op::Contiguous => x.contiguous(),
        Op::Slice(axis, start, end) => x.slice(*axis as isize, *start..*end),
        Op::Permute(order) => x.permute(order),
        Op::Reshape => x.reshape(to),
        Op::Expand => x.expand(to),
        Op::Unsqueeze(axis) => x.unsqueeze(*axis as isize),
        Op::Squeeze(axis) => x.squeeze(*axis as isize),
        Op::Pad(axis, before, after) => x.pad(*axis as isize, *before, *after),
        Op::Concat(axis) => Tensor::concat(args, *axis as isize),
        Op::Stack(axis) => Tensor::stack(args, *axis as isize),
        Op::Sum(axis) => x.sum(*axis as isize),
        Op::Mean(axis) => x.mean(*axis as isize),
        Op::SumAll => x.sum_all(),
        Op::MeanAll => x.mean_all(),
        Op::SumTo => x.sum_to(to),
        Op::Max(axis) => x.max(*axis as isize),
        Op::Min(axis) => x.min(*axis as isize),
        Op::Cumsum(axis) => x.cumsum(*axis as isize),
        Op::CumsumReverse(axis) => x.cumsum_reverse(*axis as isize),
        Op::IndexSelect(axis, _) => x.index_select(*axis as isize, constant()),
        Op::IndexSum(axis, _) => x.index_sum(*axis as isize, constant(), to[*axis]),
        Op::Gather(axis, _) => x.gather(*axis as isize, constant()),
        Op::Embedding(_) => x.embedding(constant()),
        Op::Softmax(axis) => x.softmax(*axis as isize),
        Op::LogSoftmax(axis) => x.log_softmax(*axis as isize),
        Op::LayerNorm(weight, bias) => {
            let (w, b) = (weight.then(|| args[1]), bias.then(|| args[args.len() - 1]));
            x.layer_norm(w, b, EPS)
        }
        Op::RmsNorm(weight) => x.rms_norm(weight.then(|| args[1]), EPS),
        Op::Matmul => x.matmul(args[1]),
        Op::Linear(weight, bias) => {
            let site = site(*weight, &args[1..], [to[to.len() - 1], x.shape()[to.len() - 1]]);
            let bias = bias.then(|| args[args.len() - 1]);
            x.linear(&site, Epilogue::default().bias(bias))
        }
        Op::Attention(sees) => {
            let mask = match sees {
                Sees::All => Mask::None,
                Sees::Causal => Mask::Causal,
                Sees::Added(..) => Mask::Additive(constant().clone()),
            };
            x.attention(args[1], args[2], &mask)
        }
    }
}

fn mapped(map: Map, x: &Tensor) -> Tensor {
    match map {
        Map::Neg => x.neg(),
        Map::Exp => x.exp(),
        Map::Log => x.log(),
        Map::Sqrt => x.sqrt(),
        Map::Rsqrt => x.rsqrt(),
        Map::Recip => x.recip(),
        Map::Square => x.square(),
        Map::Tanh => x.tanh(),
        Map::Sigmoid => x.sigmoid(),
        Map::Erf => x.erf(),
        Map::Gelu => x.gelu(),
        Map::GeluTanh => x.gelu_tanh(),
        Map::Silu => x.silu(),
        Map::Relu => x.relu(),
        Map::Sin => x.sin(),
        Map::Cos => x.cos(),
        Map::Abs => x.abs(),
    }
}

fn site(weight: Weight, leaves: &[&Tensor], size: [usize; 2]) -> Arc<dyn Site> {
    match weight {
        Weight::Tied => Tied::new(leaves[0]).shared(),
        Weight::LowRank(scale) => LowRank::new(leaves[0], leaves[1], leaves[2], scale).shared(),
        Weight::Factored => Factored::new(leaves[0], leaves[1]).shared(),
        Weight::Dictionary { layer, made } => {
            let dictionary = Dictionary::new(leaves[0], leaves[1]);
            if made { dictionary.weights()[layer].clone() } else { dictionary.site(layer) }
        }
        Weight::Hashed { offset, scale, stable } => {
            let draw = Weight::draw(offset, scale, stable, leaves[0].count(), size);
            Hashed::new(leaves[0], draw).shared()
        }
    }
}
