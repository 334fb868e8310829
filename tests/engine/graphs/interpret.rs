//! Interprets each operation on the host by the tape's four primitives.

use super::host::{Move, Tape, Var};
use super::program::{Ids, Line, Map, Op, Program, Sees, Weight, Zip};
use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// Runs a whole program. Returns each line's value and the loss.
pub fn program(tape: &mut Tape, program: &Program) -> (Vec<Var>, Var) {
    let mut vars: Vec<Var> = Vec::new();
    for l in &program.lines {
        let args: Vec<Var> = l.args.iter().map(|&a| vars[a]).collect();
        vars.push(line(tape, l, &args));
    }
    let loss = loss(tape, program, &vars);
    (vars, loss)
}

/// The weighted sum of the outputs.
pub fn loss(tape: &mut Tape, program: &Program, vars: &[Var]) -> Var {
    let mut total = None;
    for (output, weights) in &program.outputs {
        let y = vars[*output];
        let shape = tape.shape(y).to_vec();
        let weights = tape.leaf(&shape, weights.clone(), false);
        let terms = tape.zip(y, weights, |y, w| [y * w, w, y]);
        let sum = scatter(tape, terms, &[], 1.0, |_| 0);
        total = Some(total.map_or(sum, |t| tape.zip(t, sum, |a, b| [a + b, 1.0, 1.0])));
    }
    total.expect("a program has an output")
}

/// Runs one line.
pub fn line(tape: &mut Tape, line: &Line, args: &[Var]) -> Var {
    let y = value(tape, line, args);
    assert_eq!(tape.shape(y), line.shape, "{:?}", line.op);
    if line.dtype.is_half() {
        tape.round(y, line.dtype);
    }
    y
}

fn value(tape: &mut Tape, line: &Line, args: &[Var]) -> Var {
    let to = &line.shape;
    let x = args.first().copied().unwrap_or(0);
    match &line.op {
        Op::Leaf(data) => tape.leaf(to, data.0.clone(), line.tracked),
        Op::Map(map) => mapped(tape, x, *map),
        Op::Affine(scale, shift) => tape.affine(x, *scale as f64, *shift as f64),
        Op::Clamp(low, high) => {
            let limits = [*low as f64, *high as f64];
            limits.iter().for_each(|l| decide(tape, x, |v| v - l));
            let inside = move |v: f64| (v >= limits[0] && v <= limits[1]) as u8 as f64;
            // Written as products with 0 and 1, which are exact. A function of the element would get noise.
            let kept = tape.value(x).iter().map(|&v| inside(v)).collect();
            let ends =
                tape.value(x).iter().map(|&v| (1.0 - inside(v)) * v.clamp(limits[0], limits[1])).collect();
            let [kept, ends] = [kept, ends].map(|data: Vec<f64>| tape.leaf(to, data, false));
            let y = tape.zip(x, kept, |x, k| [x * k, k, x]);
            tape.zip(y, ends, |a, b| [a + b, 1.0, 1.0])
        }
        Op::Zip(zip) => zipped(tape, [args[0], args[1]], to, *zip),
        Op::Where(mask) => {
            let mask = tape.leaf(&mask.shape, mask.data.iter().map(|&m| m as f64).collect(), false);
            let mask = expand(tape, mask, to);
            let mask: Vec<bool> = tape.value(mask).iter().map(|&m| m != 0.0).collect();
            chosen(tape, [args[0], args[1]], to, &mask)
        }
        Op::WhereGreater => {
            let [c, d] = [args[2], args[3]].map(|v| expand(tape, v, to));
            let gap = decide_between(tape, c, d);
            let mask: Vec<bool> = gap.iter().map(|g| *g > 0.0).collect();
            chosen(tape, [args[0], args[1]], to, &mask)
        }
        Op::Detach => tape.leaf(to, tape.value(x).to_vec(), false),
        Op::Cast | Op::Contiguous | Op::Reshape | Op::Unsqueeze(_) | Op::Squeeze(_) => reshape(tape, x, to),
        Op::Slice(axis, start, _) => gather(tape, &[x], to, |c| {
            let mut c = c.to_vec();
            c[*axis] += start;
            Some((0, c))
        }),
        Op::Permute(order) => permute(tape, x, order),
        Op::Expand => expand(tape, x, to),
        Op::Pad(axis, before, _) => {
            let size = tape.shape(x)[*axis];
            gather(tape, &[x], to, |c| {
                let mut c = c.to_vec();
                c[*axis] = c[*axis].checked_sub(*before).filter(|&i| i < size)?;
                Some((0, c))
            })
        }
        Op::Concat(axis) => {
            let sizes: Vec<usize> = args.iter().map(|&a| tape.shape(a)[*axis]).collect();
            gather(tape, args, to, |c| {
                let (mut c, mut arg) = (c.to_vec(), 0);
                while c[*axis] >= sizes[arg] {
                    c[*axis] -= sizes[arg];
                    arg += 1;
                }
                Some((arg, c))
            })
        }
        Op::Stack(axis) => gather(tape, args, to, |c| {
            let mut c = c.to_vec();
            let arg = c.remove(*axis);
            Some((arg, c))
        }),
        Op::Sum(axis) | Op::Mean(axis) => {
            let size = tape.shape(x)[*axis] as f64;
            let factor = if matches!(line.op, Op::Mean(_)) { 1.0 / size } else { 1.0 };
            sum(tape, x, *axis, factor)
        }
        Op::SumAll => scatter(tape, x, &[], 1.0, |_| 0),
        Op::MeanAll => scatter(tape, x, &[], 1.0 / tape.value(x).len() as f64, |_| 0),
        Op::SumTo => {
            let shift = tape.shape(x).len() - to.len();
            scatter(tape, x, to, 1.0, |c| {
                let at: Vec<usize> = to.iter().zip(&c[shift..]).map(|(&n, &i)| i.min(n - 1)).collect();
                flat(to, &at)
            })
        }
        Op::Max(axis) => extreme(tape, x, *axis, 1.0),
        Op::Min(axis) => extreme(tape, x, *axis, -1.0),
        Op::Cumsum(axis) => cumsum(tape, x, *axis, false),
        Op::CumsumReverse(axis) => cumsum(tape, x, *axis, true),
        Op::IndexSelect(axis, ids) => look_up(tape, x, to, *axis, |c| ids.data[c[*axis]]),
        Op::Gather(axis, ids) => look_up(tape, x, to, *axis, |c| ids.data[flat(&ids.shape, c)]),
        Op::Embedding(ids) => gather(tape, &[x], to, |c| {
            let (width, at) = c.split_last().expect("a row's axis");
            Some((0, vec![ids.data[flat(&ids.shape, at)] as usize, *width]))
        }),
        Op::IndexSum(axis, ids) => index_sum(tape, x, to, *axis, ids),
        Op::Softmax(axis) => {
            let e = tape.map(x, 0.0, |v| [v.exp(), v.exp()]);
            let total = spread_sum(tape, e, *axis);
            tape.divide(e, total)
        }
        Op::LogSoftmax(axis) => {
            let e = tape.map(x, 0.0, |v| [v.exp(), v.exp()]);
            let total = spread_sum(tape, e, *axis);
            let log = tape.map(total, 0.0, |v| [v.ln(), 1.0 / v]);
            tape.zip(x, log, |a, b| [a - b, 1.0, -1.0])
        }
        Op::LayerNorm(weight, bias) => normed(tape, args, true, *weight, *bias),
        Op::RmsNorm(weight) => normed(tape, args, false, *weight, false),
        Op::Matmul => matmul(tape, [args[0], args[1]], to),
        Op::Linear(weight, bias) => linear(tape, args, to, *weight, *bias),
        Op::Attention(sees) => attention(tape, [args[0], args[1], args[2]], sees),
    }
}

pub fn flat(shape: &[usize], at: &[usize]) -> usize {
    shape.iter().zip(at).fold(0, |flat, (&n, &i)| flat * n + i)
}

pub fn coordinates(shape: &[usize], mut flat: usize) -> Vec<usize> {
    let mut at = vec![0; shape.len()];
    for axis in (0..shape.len()).rev() {
        (at[axis], flat) = (flat % shape[axis], flat / shape[axis]);
    }
    at
}

/// Each element of the result is one element of an argument, or 0.
fn gather(
    tape: &mut Tape,
    args: &[Var],
    to: &[usize],
    source: impl Fn(&[usize]) -> Option<(usize, Vec<usize>)>,
) -> Var {
    let one = |i: usize| {
        let (arg, at) = source(&coordinates(to, i))?;
        Some(Move { arg, to: i, from: flat(tape.shape(args[arg]), &at), factor: 1.0 })
    };
    let moves = (0..to.iter().product()).filter_map(one).collect();
    tape.moves(args, to, moves)
}

/// Each element of the argument goes to one element of the result, times a factor.
fn scatter(tape: &mut Tape, x: Var, to: &[usize], factor: f64, target: impl Fn(&[usize]) -> usize) -> Var {
    let from = tape.shape(x).to_vec();
    let one = |i| Move { arg: 0, to: target(&coordinates(&from, i)), from: i, factor };
    let moves = (0..tape.value(x).len()).map(one).collect();
    tape.moves(&[x], to, moves)
}

fn reshape(tape: &mut Tape, x: Var, to: &[usize]) -> Var {
    let moves = (0..tape.value(x).len()).map(|i| Move::copy(i, i)).collect();
    tape.moves(&[x], to, moves)
}

fn permute(tape: &mut Tape, x: Var, order: &[usize]) -> Var {
    let to: Vec<usize> = order.iter().map(|&a| tape.shape(x)[a]).collect();
    gather(tape, &[x], &to, |c| {
        let mut at = vec![0; order.len()];
        order.iter().zip(c).for_each(|(&a, &i)| at[a] = i);
        Some((0, at))
    })
}

fn expand(tape: &mut Tape, x: Var, to: &[usize]) -> Var {
    let from = tape.shape(x).to_vec();
    if from == to {
        return x;
    }
    let shift = to.len() - from.len();
    gather(tape, &[x], to, |c| Some((0, from.iter().zip(&c[shift..]).map(|(&n, &i)| i.min(n - 1)).collect())))
}

fn without(shape: &[usize], axis: usize) -> Vec<usize> {
    let mut shape = shape.to_vec();
    shape.remove(axis);
    shape
}

fn sum(tape: &mut Tape, x: Var, axis: usize, factor: f64) -> Var {
    let to = without(tape.shape(x), axis);
    scatter(tape, x, &to, factor, |c| flat(&to, &without(c, axis)))
}

/// The sum along an axis, at every place of the axis.
fn spread_sum(tape: &mut Tape, x: Var, axis: usize) -> Var {
    let shape = tape.shape(x).to_vec();
    let mut kept = shape.clone();
    kept[axis] = 1;
    let total = sum(tape, x, axis, 1.0);
    let total = reshape(tape, total, &kept);
    expand(tape, total, &shape)
}

fn decide(tape: &mut Tape, x: Var, f: impl Fn(f64) -> f64) {
    let quantity = tape.value(x).iter().map(|&v| f(v)).collect();
    tape.branch(quantity, tape.value(x).to_vec());
}

fn decide_between(tape: &mut Tape, a: Var, b: Var) -> Vec<f64> {
    let gap: Vec<f64> = tape.value(a).iter().zip(tape.value(b)).map(|(a, b)| a - b).collect();
    tape.branch(gap.clone(), tape.value(a).to_vec());
    gap
}

fn chosen(tape: &mut Tape, args: [Var; 2], to: &[usize], mask: &[bool]) -> Var {
    let args = args.map(|a| expand(tape, a, to));
    let moves = mask.iter().enumerate().map(|(i, m)| Move { arg: !m as usize, ..Move::copy(i, i) }).collect();
    tape.moves(&args, to, moves)
}

fn extreme(tape: &mut Tape, x: Var, axis: usize, sign: f64) -> Var {
    let (shape, to) = (tape.shape(x).to_vec(), without(tape.shape(x), axis));
    let mut best: Vec<Option<usize>> = vec![None; to.iter().product()];
    let row = |i: usize| flat(&to, &without(&coordinates(&shape, i), axis));
    let v = tape.value(x);
    for i in 0..v.len() {
        let best = &mut best[row(i)];
        *best = best.filter(|&b| sign * v[b] >= sign * v[i]).or(Some(i));
    }
    let best: Vec<usize> = best.into_iter().map(|b| b.expect("no axis is empty")).collect();
    // All elements that equal the maximum share the gradient.
    let tie = |i: usize| v[i] == v[best[row(i)]];
    let mut count = vec![0.0; best.len()];
    (0..v.len()).filter(|&i| tie(i)).for_each(|i| count[row(i)] += 1.0);
    let one = |i| Move { arg: 0, to: row(i), from: i, factor: 1.0 / count[row(i)] };
    let moves = (0..v.len()).filter(|&i| tie(i)).map(one).collect();
    let others: Vec<usize> = (0..v.len()).filter(|&i| best[row(i)] != i).collect();
    let gaps = others.iter().map(|&i| v[best[row(i)]] - v[i]).collect();
    let tied = others.iter().map(|&i| v[i]).collect();
    tape.branch(gaps, tied);
    tape.moves(&[x], &to, moves)
}

fn cumsum(tape: &mut Tape, x: Var, axis: usize, reverse: bool) -> Var {
    let shape = tape.shape(x).to_vec();
    let mut moves = Vec::new();
    for to in 0..tape.value(x).len() {
        let mut at = coordinates(&shape, to);
        let range = if reverse { at[axis]..shape[axis] } else { 0..at[axis] + 1 };
        for i in range {
            at[axis] = i;
            moves.push(Move::copy(to, flat(&shape, &at)));
        }
    }
    tape.moves(&[x], &shape, moves)
}

/// Looks up elements by ids. An id outside the axis gives 0.
fn look_up(tape: &mut Tape, x: Var, to: &[usize], axis: usize, id: impl Fn(&[usize]) -> u32) -> Var {
    let size = tape.shape(x)[axis];
    gather(tape, &[x], to, |c| {
        let mut at = c.to_vec();
        at[axis] = id(c) as usize;
        (at[axis] < size).then_some((0, at))
    })
}

fn index_sum(tape: &mut Tape, x: Var, to: &[usize], axis: usize, ids: &Ids) -> Var {
    let from = tape.shape(x).to_vec();
    let one = |i| {
        let mut at = coordinates(&from, i);
        at[axis] = ids.data[at[axis]] as usize;
        (at[axis] < to[axis]).then(|| Move::copy(flat(to, &at), i))
    };
    let moves = (0..tape.value(x).len()).filter_map(one).collect();
    tape.moves(&[x], to, moves)
}

fn zipped(tape: &mut Tape, args: [Var; 2], to: &[usize], zip: Zip) -> Var {
    let [a, b] = args.map(|a| expand(tape, a, to));
    if matches!(zip, Zip::Maximum | Zip::Minimum) {
        let sign = if zip == Zip::Maximum { 1.0 } else { -1.0 };
        let gap = decide_between(tape, a, b);
        // At a tie, each side gets half.
        let share = |gap: f64| if gap == 0.0 { 0.5 } else { (gap > 0.0) as u8 as f64 };
        let one = |(i, &gap): (usize, &f64)| {
            [share(sign * gap), share(-sign * gap)].into_iter().zip(0..).map(move |(factor, arg)| Move {
                arg,
                factor,
                ..Move::copy(i, i)
            })
        };
        let moves = gap.iter().enumerate().flat_map(one).filter(|m| m.factor != 0.0).collect();
        return tape.moves(&[a, b], to, moves);
    }
    match zip {
        Zip::Add => tape.zip(a, b, |a, b| [a + b, 1.0, 1.0]),
        Zip::Sub => tape.zip(a, b, |a, b| [a - b, 1.0, -1.0]),
        Zip::Mul => tape.zip(a, b, |a, b| [a * b, b, a]),
        _ => tape.divide(a, b),
    }
}

fn mapped(tape: &mut Tape, x: Var, map: Map) -> Var {
    let gauss = |v: f64| (-0.5 * v * v).exp() / (2.0 * PI).sqrt();
    let sigmoid = |v: f64| 1.0 / (1.0 + (-v).exp());
    if let Map::Relu | Map::Abs = map {
        decide(tape, x, |v| v);
        let below = if map == Map::Relu { 0.0 } else { -1.0 };
        let factor = |v: f64| {
            if v == 0.0 {
                0.0
            } else if v > 0.0 {
                1.0
            } else {
                below
            }
        };
        let one = |(i, &v): (usize, &f64)| Move { factor: factor(v), ..Move::copy(i, i) };
        let moves = tape.value(x).iter().enumerate().map(one).filter(|m| m.factor != 0.0).collect();
        let shape = tape.shape(x).to_vec();
        return tape.moves(&[x], &shape, moves);
    }
    let floor = match map {
        Map::Tanh | Map::Sigmoid | Map::Erf | Map::Gelu | Map::GeluTanh | Map::Silu => 1.0,
        // Their error is bounded by about 1e-6.
        Map::Sin | Map::Cos => 4.0,
        _ => 0.0,
    };
    match map {
        Map::Neg => tape.affine(x, -1.0, 0.0),
        Map::Square => tape.zip(x, x, |v, _| [v * v, v, v]),
        _ => tape.map(x, floor, |v| match map {
            Map::Exp => [v.exp(), v.exp()],
            Map::Log => [v.ln(), 1.0 / v],
            Map::Sqrt => [v.sqrt(), 0.5 / v.sqrt()],
            Map::Rsqrt => [1.0 / v.sqrt(), -0.5 / (v * v.sqrt())],
            Map::Recip => [1.0 / v, -1.0 / (v * v)],
            Map::Tanh => [v.tanh(), 1.0 / v.cosh().powi(2)],
            Map::Sigmoid => [sigmoid(v), sigmoid(v) * sigmoid(-v)],
            Map::Erf => [erf(v), 2.0 / PI.sqrt() * (-v * v).exp()],
            Map::Gelu => {
                let phi = 0.5 * (1.0 + erf(v * FRAC_1_SQRT_2));
                [v * phi, phi + v * gauss(v)]
            }
            Map::GeluTanh => {
                let c = (2.0 / PI).sqrt();
                let t = (c * (v + 0.044715 * v * v * v)).tanh();
                let inner = c * (1.0 + 3.0 * 0.044715 * v * v);
                [0.5 * v * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * v * (1.0 - t * t) * inner]
            }
            Map::Silu => [v * sigmoid(v), sigmoid(v) * (1.0 + v * sigmoid(-v))],
            Map::Sin => [v.sin(), v.cos()],
            Map::Cos => [v.cos(), -v.sin()],
            Map::Neg | Map::Square | Map::Relu | Map::Abs => unreachable!("done above"),
        }),
    }
}

/// Computes `2/sqrt(pi) e^(-x^2) sum_n 2^n x^(2n+1) / (2n+1)!!`, a series without cancellation.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..400 {
        term *= 2.0 * x * x / (2 * n + 1) as f64;
        sum += term;
    }
    if x.abs() > 6.0 { x.signum() } else { 2.0 / PI.sqrt() * (-x * x).exp() * sum }
}

fn normed(tape: &mut Tape, args: &[Var], centred: bool, weight: bool, bias: bool) -> Var {
    let mut x = args[0];
    let shape = tape.shape(x).to_vec();
    let axis = shape.len() - 1;
    let n = shape[axis] as f64;
    if centred {
        let total = spread_sum(tape, x, axis);
        let mean = tape.affine(total, 1.0 / n, 0.0);
        x = tape.zip(x, mean, |a, b| [a - b, 1.0, -1.0]);
    }
    let squares = tape.zip(x, x, |v, _| [v * v, v, v]);
    let total = spread_sum(tape, squares, axis);
    let variance = tape.affine(total, 1.0 / n, super::EPS as f64);
    let scale = tape.map(variance, 0.0, |v| [1.0 / v.sqrt(), -0.5 / (v * v.sqrt())]);
    let mut y = tape.zip(x, scale, |a, b| [a * b, b, a]);
    if weight {
        let w = expand(tape, args[1], &shape);
        y = tape.zip(y, w, |a, b| [a * b, b, a]);
    }
    if bias {
        let b = expand(tape, args[args.len() - 1], &shape);
        y = tape.zip(y, b, |a, b| [a + b, 1.0, 1.0]);
    }
    y
}

fn matmul(tape: &mut Tape, args: [Var; 2], to: &[usize]) -> Var {
    let batch: usize = to[..to.len() - 2].iter().product();
    let [a, b] = args.map(|x| {
        let inner = tape.shape(x)[tape.shape(x).len() - 2..].to_vec();
        let full = [&to[..to.len() - 2], &inner[..]].concat();
        let x = expand(tape, x, &full);
        reshape(tape, x, &[batch, inner[0], inner[1]])
    });
    let y = tape.matmul(a, b);
    reshape(tape, y, to)
}

fn linear(tape: &mut Tape, args: &[Var], to: &[usize], weight: Weight, bias: bool) -> Var {
    let x = args[0];
    let (n, k) = (to[to.len() - 1], tape.shape(x)[to.len() - 1]);
    let rows = tape.value(x).len() / k;
    let w = used_weight(tape, &args[1..], weight, [n, k]);
    let w = permute(tape, w, &[1, 0]);
    let w = reshape(tape, w, &[1, k, n]);
    let x = reshape(tape, x, &[1, rows, k]);
    let y = tape.matmul(x, w);
    let y = reshape(tape, y, to);
    if !bias {
        return y;
    }
    let bias = expand(tape, args[args.len() - 1], to);
    tape.zip(y, bias, |a, b| [a + b, 1.0, 1.0])
}

/// Computes the weight `[out, in]` from its stored leaves.
fn used_weight(tape: &mut Tape, leaves: &[Var], weight: Weight, size: [usize; 2]) -> Var {
    match weight {
        Weight::Tied => leaves[0],
        Weight::Factored => matmul(tape, [leaves[1], leaves[0]], &size),
        Weight::LowRank(scale) => {
            let own = matmul(tape, [leaves[2], leaves[1]], &size);
            let own = tape.affine(own, scale as f64, 0.0);
            tape.zip(leaves[0], own, |a, b| [a + b, 1.0, 1.0])
        }
        Weight::Dictionary { layer, .. } => {
            let atoms = tape.shape(leaves[0])[0];
            let c = gather(tape, &[leaves[1]], &[1, atoms], |c| Some((0, vec![layer, c[1]])));
            let d = reshape(tape, leaves[0], &[atoms, size[0] * size[1]]);
            let w = matmul(tape, [c, d], &[1, size[0] * size[1]]);
            reshape(tape, w, &size)
        }
        Weight::Hashed { offset, scale, stable } => {
            let m = tape.value(leaves[0]).len() as u32;
            let [places, signs] = tiebeam::share::hashed::SEEDS;
            let one = |w: usize| {
                let i = (offset + w) as u32;
                let from = if stable { (hash(i / m, places) % m + i % m) % m } else { hash(i, places) % m };
                let sign = 1.0 - 2.0 * (hash(i, signs) & 1) as f64;
                Move { factor: sign * scale as f64, ..Move::copy(w, from as usize) }
            };
            tape.moves(&leaves[..1], &size, (0..size[0] * size[1]).map(one).collect())
        }
    }
}

/// MurmurHash3's final mix of a number plus a multiple of the seed.
fn hash(x: u32, seed: u32) -> u32 {
    let mut x = x.wrapping_add(seed.wrapping_mul(0x9e37_79b9));
    for (shift, factor) in [(16, 0x85eb_ca6b), (13, 0xc2b2_ae35u32)] {
        x = (x ^ (x >> shift)).wrapping_mul(factor);
    }
    x ^ (x >> 16)
}

fn attention(tape: &mut Tape, [q, k, v]: [Var; 3], sees: &Sees) -> Var {
    let shape = tape.shape(q).to_vec();
    let [batch, heads, tokens, width] = [0, 1, 2, 3].map(|a| shape[a]);
    let (groups, keys) = (tape.shape(k)[1], tape.shape(k)[2]);
    let pairs = batch * heads;
    let [k, v] = [k, v].map(|x| {
        let all = gather(tape, &[x], &[batch, heads, keys, width], |c| {
            Some((0, vec![c[0], c[1] / (heads / groups), c[2], c[3]]))
        });
        reshape(tape, all, &[pairs, keys, width])
    });
    let k = permute(tape, k, &[0, 2, 1]);
    let q = reshape(tape, q, &[pairs, tokens, width]);
    let scores = tape.matmul(q, k);
    let mut scores = tape.affine(scores, 1.0 / (width as f64).sqrt(), 0.0);
    let full = [batch, heads, tokens, keys];
    let mut visible = vec![1.0; full.iter().product()];
    match sees {
        Sees::All => {}
        Sees::Causal => {
            visible.iter_mut().enumerate().for_each(|(i, seen)| {
                let c = coordinates(&full, i);
                *seen = (c[3] + tokens <= c[2] + keys) as u8 as f64;
            });
        }
        Sees::Added(shape, data) => {
            let mask = tape.leaf(shape, data.0.clone(), false);
            let mask = expand(tape, mask, &full);
            let mask = tape.value(mask).to_vec();
            visible = mask.iter().map(|m| m.is_finite() as u8 as f64).collect();
            let finite = mask.iter().map(|m| if m.is_finite() { *m } else { 0.0 }).collect();
            let mask = tape.leaf(&[pairs, tokens, keys], finite, false);
            scores = tape.zip(scores, mask, |a, b| [a + b, 1.0, 1.0]);
        }
    }
    let visible = tape.leaf(&[pairs, tokens, keys], visible, false);
    let e = tape.map(scores, 0.0, |s| [s.exp(), s.exp()]);
    let e = tape.zip(e, visible, |e, m| [e * m, m, e]);
    let total = spread_sum(tape, e, 2);
    // A query that sees no key gives zeros.
    let blind = tape.value(total).iter().map(|&t| (t == 0.0) as u8 as f64).collect();
    let blind = tape.leaf(&[pairs, tokens, keys], blind, false);
    let total = tape.zip(total, blind, |a, b| [a + b, 1.0, 1.0]);
    let weights = tape.divide(e, total);
    let y = tape.matmul(weights, v);
    reshape(tape, y, &shape)
}
