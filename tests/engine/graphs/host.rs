//! A reverse-mode tape on the host: row-major f64 arrays, plain loops, and nothing of the library but its names.
//!
//! There are four primitives: a function of each element, a function of two elements, weighted moves of elements (every
//! view, sum and lookup is one), and the batched matrix product. A tape with noise rounds each result, each partial sum
//! and each derivative to f32 after a random relative push of a few roundoffs: what differs between it and the exact tape
//! is what f32 arithmetic costs in this graph.

use half::f16;

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

/// How gradients go back through a value.
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

/// A place where a small change makes a jump.
pub struct Branch {
    /// The numbers that decide.
    pub quantity: Vec<f64>,
    /// How far each is from deciding otherwise. At 0 the rule for a tie holds, if nothing is rounded before.
    pub distance: Vec<f64>,
    /// What must be free of rounding for that.
    pub tied: Vec<f64>,
}

/// A fault to be injected, so that tests see that they would see it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fault {
    /// One of the moves that make this value is left out, both ways.
    Term(Var),
    /// This value's gradient does not reach its first argument.
    Gradient(Var),
}

/// Arithmetic in f64, or in f32 with random pushes.
#[derive(Clone, Copy)]
struct Arithmetic {
    noise: Option<u64>,
}

impl Arithmetic {
    /// A number in `[-1, 1)`: splitmix64.
    fn random(state: &mut u64) -> f64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as i64 as f64 / (1u64 << 63) as f64
    }

    /// The result of an operation that IEEE rounds correctly: what f32 holds, it gives.
    fn rounded(&mut self, x: f64) -> f64 {
        if x as f32 as f64 == x { x } else { self.pushed(x, U * x.abs()) }
    }

    /// `x`, as far off as `size` says, rounded to f32.
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

    /// Says that the sign of `quantity` decides something.
    pub fn branch(&mut self, quantity: Vec<f64>, tied: Vec<f64>) {
        let distance = quantity.iter().map(|q| q.abs()).collect();
        self.branches.push(Branch { quantity, distance, tied });
    }

    /// `f` gives value and derivative. Devices' functions are a few roundoffs off, of the result, of what a roundoff of the
    /// argument makes, and of `floor` where they promise no relative error.
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

    /// `f` gives the value and both derivatives, of two arrays of one shape: sums, differences, products.
    pub fn zip(&mut self, x: Var, y: Var, f: impl Fn(f64, f64) -> [f64; 3]) -> Var {
        self.zipped(x, y, f, Arithmetic::rounded)
    }

    /// `x / y`, which devices round less well.
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

    /// Rounds a value that nobody has used yet to f16, to nearest even. Gradients pass.
    pub fn half(&mut self, x: Var) {
        let quantity = self.nodes[x].value.clone();
        let distance = quantity.iter().map(|&v| to_midpoint(v)).collect();
        self.nodes[x].value.iter_mut().for_each(|v| *v = f16::from_f64(*v).to_f64());
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

    /// What argument `i` of a value gets from it.
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

/// From `v` to the nearest number that rounds to the next f16.
fn to_midpoint(v: f64) -> f64 {
    let h = f16::from_f64(v);
    // Away from and towards zero; beyond zero lies the subnormal of the other sign, as far as the one of this.
    let outer = f16::from_bits(h.to_bits() + 1).to_f64();
    let inner = if h.to_bits() & 0x7fff == 0 { -outer } else { f16::from_bits(h.to_bits() - 1).to_f64() };
    let h = h.to_f64();
    (v - (h + outer) / 2.0).abs().min((v - (h + inner) / 2.0).abs())
}
