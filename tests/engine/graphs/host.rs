//! A reverse-mode tape on the host, with row-major f64 arrays and plain loops. It uses no code of the library.
//!
//! There are four primitives: functions of one element, functions of two elements, weighted moves of elements (which all views,
//! sums and lookups are), and the batched matrix product. A tape with noise changes each result, each partial sum and each
//! derivative by a random amount of a few roundoffs, and then rounds it to f32. Its difference from the exact tape is the error
//! of f32 arithmetic in this graph.

use half::{bf16, f16};
use tiebeam::DType;

/// f32 unit roundoff.
pub const U: f64 = 1.0 / (1u64 << 24) as f64;

/// A value's number on its tape.
pub type Var = usize;

/// `y[to] += factor * args[arg][from]`.
#[derive(Clone, Copy)]
pub struct Move {
    pub arg: usize,
    pub to: usize,
    pub from: usize,
    pub factor: f64,
}

impl Move {
    pub fn copy(to: usize, from: usize) -> Move {
        Move { arg: 0, to, from, factor: 1.0 }
    }
}

/// How gradients are propagated back through a value.
enum Back {
    None,
    /// The derivative with respect to each argument, element by element.
    Local(Vec<Vec<f64>>),
    Moves(Vec<Move>),
    Matmul,
}

pub struct Node {
    pub shape: Vec<usize>,
    pub value: Vec<f64>,
    args: Vec<Var>,
    back: Back,
    tracked: bool,
}

/// A place where a small change of numbers changes the result by a jump.
pub struct Branch {
    /// The numbers that decide.
    pub quantity: Vec<f64>,
    /// The distance of each from another decision. At 0 the rule for ties applies, if no rounding comes before.
    pub distance: Vec<f64>,
    /// The numbers that must be free of rounding for a tie.
    pub tied: Vec<f64>,
}

/// An injected fault, with which tests check that they would detect it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fault {
    /// One of the moves of this value is omitted, forward and backward.
    Term(Var),
    /// This value's gradient does not reach its first argument.
    Gradient(Var),
}

/// Arithmetic in f64, or in f32 with random noise.
#[derive(Clone, Copy)]
struct Arithmetic {
    noise: Option<u64>,
}

impl Arithmetic {
    /// Draws a number in `[-1, 1)` by splitmix64.
    fn random(state: &mut u64) -> f64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as i64 as f64 / (1u64 << 63) as f64
    }

    /// The result of an operation that IEEE arithmetic rounds correctly. A result that f32 can represent gets no noise.
    fn rounded(&mut self, x: f64) -> f64 {
        if x as f32 as f64 == x { x } else { self.pushed(x, U * x.abs()) }
    }

    /// Returns `x` with noise of up to `size`, rounded to f32.
    fn pushed(&mut self, x: f64, size: f64) -> f64 {
        match &mut self.noise {
            None => x,
            Some(state) => (x + Arithmetic::random(state) * size) as f32 as f64,
        }
    }

    fn add(&mut self, a: f64, b: f64) -> f64 {
        self.rounded(a + b)
    }

    fn mul(&mut self, a: f64, b: f64) -> f64 {
        self.rounded(a * b)
    }
}

pub struct Tape {
    pub nodes: Vec<Node>,
    pub branches: Vec<Branch>,
    pub fault: Option<Fault>,
    arithmetic: Arithmetic,
}

impl Tape {
    /// An exact tape, or one whose noise comes from this seed.
    pub fn new(noise: Option<u64>) -> Tape {
        Tape { nodes: Vec::new(), branches: Vec::new(), fault: None, arithmetic: Arithmetic { noise } }
    }

    pub fn shape(&self, x: Var) -> &[usize] {
        &self.nodes[x].shape
    }

    pub fn value(&self, x: Var) -> &[f64] {
        &self.nodes[x].value
    }

    fn push(&mut self, shape: &[usize], value: Vec<f64>, args: &[Var], back: Back) -> Var {
        assert_eq!(shape.iter().product::<usize>(), value.len(), "{shape:?}");
        let tracked = args.iter().any(|&a| self.nodes[a].tracked);
        self.nodes.push(Node { shape: shape.to_vec(), value, args: args.to_vec(), back, tracked });
        self.nodes.len() - 1
    }

    pub fn leaf(&mut self, shape: &[usize], value: Vec<f64>, tracked: bool) -> Var {
        let x = self.push(shape, value, &[], Back::None);
        self.nodes[x].tracked = tracked;
        x
    }

    /// Records that the sign of `quantity` decides something.
    pub fn branch(&mut self, quantity: Vec<f64>, tied: Vec<f64>) {
        let distance = quantity.iter().map(|q| q.abs()).collect();
        self.branches.push(Branch { quantity, distance, tied });
    }

    /// Adds a function of one element. `f` returns value and derivative. A device's function has an error of a few roundoffs of
    /// the result, of the effect of a roundoff of the argument, and of `floor` if it has no bound on the relative error.
    pub fn map(&mut self, x: Var, floor: f64, f: impl Fn(f64) -> [f64; 2]) -> Var {
        let mut a = self.arithmetic;
        let (mut value, mut slope) = (Vec::new(), Vec::new());
        for &v in &self.nodes[x].value {
            let [y, d] = f(v);
            value.push(a.pushed(y, 4.0 * U * (y.abs() + (v * d).abs() + floor)));
            slope.push(a.pushed(d, 4.0 * U * (d.abs() + floor)));
        }
        self.arithmetic = a;
        let shape = self.nodes[x].shape.clone();
        self.push(&shape, value, &[x], Back::Local(vec![slope]))
    }

    /// `x * scale + shift`.
    pub fn affine(&mut self, x: Var, scale: f64, shift: f64) -> Var {
        let mut a = self.arithmetic;
        let value: Vec<f64> = self.nodes[x].value.iter().map(|&v| a.mul(v, scale)).collect();
        let value = value.into_iter().map(|v| a.add(v, shift)).collect();
        self.arithmetic = a;
        let (shape, slope) = (self.nodes[x].shape.clone(), vec![scale; self.nodes[x].value.len()]);
        self.push(&shape, value, &[x], Back::Local(vec![slope]))
    }

    /// Adds a sum, difference or product of two arrays of one shape. `f` returns the value and both derivatives.
    pub fn zip(&mut self, x: Var, y: Var, f: impl Fn(f64, f64) -> [f64; 3]) -> Var {
        self.zipped(x, y, f, Arithmetic::rounded)
    }

    /// Adds `x / y`, which devices round less accurately.
    pub fn divide(&mut self, x: Var, y: Var) -> Var {
        let f = |a: f64, b: f64| [a / b, 1.0 / b, -a / (b * b)];
        self.zipped(x, y, f, |a, v| a.pushed(v, 3.0 * U * v.abs()))
    }

    fn zipped(
        &mut self,
        x: Var,
        y: Var,
        f: impl Fn(f64, f64) -> [f64; 3],
        round: impl Fn(&mut Arithmetic, f64) -> f64,
    ) -> Var {
        assert_eq!(self.nodes[x].shape, self.nodes[y].shape);
        let mut a = self.arithmetic;
        let mut all = [const { Vec::new() }; 3];
        for (&p, &q) in self.nodes[x].value.iter().zip(&self.nodes[y].value) {
            all.iter_mut().zip(f(p, q)).for_each(|(all, v)| all.push(round(&mut a, v)));
        }
        self.arithmetic = a;
        let shape = self.nodes[x].shape.clone();
        let [value, dx, dy] = all;
        self.push(&shape, value, &[x, y], Back::Local(vec![dx, dy]))
    }

    pub fn moves(&mut self, args: &[Var], shape: &[usize], mut moves: Vec<Move>) -> Var {
        if self.fault == Some(Fault::Term(self.nodes.len())) && !moves.is_empty() {
            moves.remove(moves.len() / 2);
        }
        let mut a = self.arithmetic;
        let mut value = vec![0.0; shape.iter().product()];
        for m in &moves {
            let term = a.mul(m.factor, self.nodes[args[m.arg]].value[m.from]);
            value[m.to] = a.add(value[m.to], term);
        }
        self.arithmetic = a;
        self.push(shape, value, args, Back::Moves(moves))
    }

    /// `[batch, m, k] x [batch, k, n]`.
    pub fn matmul(&mut self, x: Var, y: Var) -> Var {
        let ([batch, m, k], n) = (three(self.shape(x)), self.shape(y)[2]);
        assert_eq!(self.shape(y), [batch, k, n]);
        let mut a = self.arithmetic;
        let (left, right) = (&self.nodes[x].value, &self.nodes[y].value);
        let mut value = vec![0.0; batch * m * n];
        for (i, sum) in value.iter_mut().enumerate() {
            let (b, row, column) = (i / (m * n), i / n % m, i % n);
            for j in 0..k {
                let term = a.mul(left[(b * m + row) * k + j], right[(b * k + j) * n + column]);
                *sum = a.add(*sum, term);
            }
        }
        self.arithmetic = a;
        self.push(&[batch, m, n], value, &[x, y], Back::Matmul)
    }

    /// Rounds a value that has not been used yet to f16 or bf16, to nearest even. Gradients pass unchanged.
    pub fn round(&mut self, x: Var, dtype: DType) {
        let quantity = self.nodes[x].value.clone();
        let distance = quantity.iter().map(|&v| to_midpoint(v, dtype)).collect();
        self.nodes[x].value.iter_mut().for_each(|v| *v = rounded(*v, dtype));
        self.branches.push(Branch { tied: quantity.clone(), quantity, distance });
    }

    /// The gradient of a scalar with respect to every value.
    pub fn backward(&mut self, loss: Var) -> Vec<Option<Vec<f64>>> {
        let mut grads: Vec<Option<Vec<f64>>> = (0..self.nodes.len()).map(|_| None).collect();
        grads[loss] = Some(vec![1.0]);
        let mut a = self.arithmetic;
        for x in (0..=loss).rev() {
            let Some(dy) = grads[x].take() else { continue };
            let node = &self.nodes[x];
            for (i, &arg) in node.args.iter().enumerate() {
                let lost = self.fault == Some(Fault::Gradient(x)) && i == 0;
                if self.nodes[arg].tracked && !lost {
                    let own = self.own_gradient(&mut a, node, i, &dy);
                    grads[arg] = Some(match grads[arg].take() {
                        None => own,
                        Some(sum) => sum.iter().zip(&own).map(|(&s, &d)| a.add(s, d)).collect(),
                    });
                }
            }
            grads[x] = Some(dy);
        }
        self.arithmetic = a;
        grads
    }

    /// Returns the gradient of argument `i` of a value from the value's own.
    fn own_gradient(&self, a: &mut Arithmetic, node: &Node, i: usize, dy: &[f64]) -> Vec<f64> {
        let mut dx = vec![0.0; self.nodes[node.args[i]].value.len()];
        match &node.back {
            Back::None => {}
            Back::Local(slopes) => {
                dx.iter_mut().zip(dy).zip(&slopes[i]).for_each(|((dx, &dy), &slope)| *dx = a.mul(dy, slope));
            }
            Back::Moves(moves) => {
                for m in moves.iter().filter(|m| m.arg == i) {
                    let term = a.mul(dy[m.to], m.factor);
                    dx[m.from] = a.add(dx[m.from], term);
                }
            }
            Back::Matmul => {
                let ([batch, m, k], n) = (three(self.shape(node.args[0])), node.shape[2]);
                let other = self.value(node.args[1 - i]);
                for at in 0..batch * m * n * k {
                    let (b, row, column, j) = (at / (m * n * k), at / (n * k) % m, at / k % n, at % k);
                    let (left, right) = ((b * m + row) * k + j, (b * k + j) * n + column);
                    let (to, from) = if i == 0 { (left, right) } else { (right, left) };
                    let term = a.mul(dy[(b * m + row) * n + column], other[from]);
                    dx[to] = a.add(dx[to], term);
                }
            }
        }
        dx
    }
}

fn three(shape: &[usize]) -> [usize; 3] {
    shape.try_into().expect("three axes")
}

/// The nearest number of this type.
pub fn rounded(v: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f16::from_f64(v).to_f64(),
        DType::Bf16 => bf16::from_f64(v).to_f64(),
        _ => v as f32 as f64,
    }
}

/// Returns the distance from `v` to the nearest number that rounds to a neighbouring f16 or bf16.
fn to_midpoint(v: f64, dtype: DType) -> f64 {
    let of_bits = |bits: u16| match dtype {
        DType::F16 => f16::from_bits(bits).to_f64(),
        _ => bf16::from_bits(bits).to_f64(),
    };
    let bits = match dtype {
        DType::F16 => f16::from_f64(v).to_bits(),
        _ => bf16::from_f64(v).to_bits(),
    };
    // The neighbours away from and towards zero. At zero, the other neighbour is the subnormal of opposite sign.
    let (h, outer) = (of_bits(bits), of_bits(bits + 1));
    let inner = if bits & 0x7fff == 0 { -outer } else { of_bits(bits - 1) };
    (v - (h + outer) / 2.0).abs().min((v - (h + inner) / 2.0).abs())
}
