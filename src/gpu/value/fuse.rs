//! Elementwise chains: expressions over values, and the kernels that compute them.
//!
//! An expression becomes one generated kernel when something needs its elements. Inner values of the chain that
//! somebody else still holds (a tape that saved them, a variable) are written by the same kernel, so that nothing is
//! computed twice. Inner values that nobody else holds are never stored. Arithmetic is four lanes wide and in f32, u32
//! or i32. f16 and bf16 are unpacked as they are read and rounded to nearest even as they are written.

use super::text::{Operation, THREADS, Term, Text, Walk};
use super::{Place, Value};
use crate::dtype::DType;
use crate::gpu::kernel::{Launch, Param, grid};
use crate::gpu::shader::Source;
use crate::gpu::{Gpu, recording, variants};
use crate::shape::{Shape, Strides, collapse};
use std::collections::HashMap;
use std::sync::Arc;

/// The most operations in one expression, which bounds the generated kernel.
const MAX_NODES: usize = 40;
/// The most pending values in a chain of dependencies. Views count too, although no kernel fuses across a view. This
/// bounds the depth of recursion.
const MAX_DEPTH: usize = 64;
/// The most scalars, sizes and strides of one kernel, apart from `n` and the grid's width.
const MAX_WORDS: usize = 30;
/// The most workgroups along an axis of a grid, on any adapter.
const MOST_ON_AXIS: usize = 65_535;
/// The names of the arrays that a kernel reads (`X`) and writes (`Y`), as many as any adapter binds.
const X: [&str; 16] =
    ["x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15"];
const Y: [&str; 16] =
    ["y0", "y1", "y2", "y3", "y4", "y5", "y6", "y7", "y8", "y9", "y10", "y11", "y12", "y13", "y14", "y15"];

/// One elementwise operation. In the template, `$0`, `$1`, ... are the arguments as `vec4`s.
pub(crate) struct Expr {
    op: &'static str,
    template: &'static str,
    shape: Shape,
    args: Vec<Arg>,
    nodes: usize,
    leaves: usize,
    words: usize,
    depth: usize,
}

/// An argument of an elementwise operation.
#[derive(Clone)]
pub(crate) enum Arg {
    /// A value walked with these strides over the expression's shape.
    Operand { value: Arc<Value>, strides: Strides, offset: usize },
    /// A number that is the same for every element. It is a parameter, not part of the generated source.
    Scalar(Scalar),
}

/// A number of the type that the template expects.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Scalar {
    F32(f32),
}

impl Scalar {
    fn param(self) -> Param {
        match self {
            Scalar::F32(x) => x.into(),
        }
    }
}

impl Expr {
    /// Returns an expression that fits in one kernel. Arguments that do not fit are computed first. So are pending
    /// values from outside the step whose code this thread runs, so that no replay repeats them.
    pub fn new(gpu: &Gpu, op: &'static str, template: &'static str, shape: Shape, args: Vec<Arg>) -> Expr {
        let recording = recording::number(gpu);
        let most = gpu.max_bindings() - 1;
        for arg in &args {
            if let Arg::Operand { value, .. } = arg
                && value.expr().is_some_and(|e| e.depth >= MAX_DEPTH || value.recording != recording)
            {
                value.place();
            }
        }
        let mut expr = Expr { op, template, shape, args, nodes: 1, leaves: 0, words: 0, depth: 1 };
        expr.measure();
        // Too large for one kernel: arguments are materialised, largest first, until the rest fits.
        while expr.nodes > MAX_NODES || expr.leaves > most || expr.words > MAX_WORDS {
            let largest = expr.pending_args().max_by_key(|(_, inner)| inner.words * 64 + inner.nodes);
            match largest {
                Some((value, _)) => drop(value.place()),
                None => break,
            }
            expr.measure();
        }
        expr
    }

    pub fn op(&self) -> &'static str {
        self.op
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn operands(&self) -> impl Iterator<Item = &Arc<Value>> {
        self.args.iter().filter_map(|arg| match arg {
            Arg::Operand { value, .. } => Some(value),
            Arg::Scalar(_) => None,
        })
    }

    /// Launches the kernel that computes `root`, the value of this expression, into `place`.
    pub fn run(self: &Arc<Expr>, root: &Value, place: &Place, accumulate: bool) {
        if root.count > 0 {
            Program::new(root, self).run(place, accumulate);
        }
    }

    /// The arguments that would become part of this expression's kernel, because they are pending and walked in their
    /// own order.
    fn pending_args(&self) -> impl Iterator<Item = (&Arc<Value>, Arc<Expr>)> {
        self.args.iter().filter_map(|arg| match arg {
            Arg::Operand { value, strides, offset } => {
                self.inlines(value, strides, *offset).map(|inner| (value, inner))
            }
            Arg::Scalar(_) => None,
        })
    }

    fn inlines(&self, value: &Value, strides: &Strides, offset: usize) -> Option<Arc<Expr>> {
        let same_walk = offset == 0 && value.count == self.shape.count() && *strides == self.shape.strides();
        // A pending value with the same elements but another shape has operands that are walked differently.
        value.pending().filter(|inner| same_walk && inner.shape == self.shape)
    }

    /// Counts what the generated kernel would hold. Repeated values count each time, so this is an upper bound.
    fn measure(&mut self) {
        let (mut nodes, mut leaves, mut words, mut depth) = (1, 0, 0, 1);
        // The walk of a scalar has one axis of size 1.
        let axes = self.shape.len().max(1);
        for arg in &self.args {
            match arg {
                Arg::Scalar(_) => words += 1,
                Arg::Operand { value, strides, offset } => {
                    depth = depth.max(value.expr().map_or(0, |inner| inner.depth) + 1);
                    if let Some(inner) = self.inlines(value, strides, *offset) {
                        nodes += inner.nodes;
                        // If somebody else computes it in the meantime, it becomes a leaf itself.
                        leaves += inner.leaves.max(1);
                        words += inner.words;
                    } else {
                        leaves += 1;
                        let plain = *strides == self.shape.strides() && *offset == 0;
                        words += if plain { 0 } else { axes + 1 };
                    }
                }
            }
        }
        let strided = words > 0;
        (self.nodes, self.leaves, self.depth) = (nodes, leaves, depth);
        self.words = words + if strided { axes } else { 0 };
    }
}

struct Leaf {
    value: Arc<Value>,
    place: Place,
    strides: Strides,
    /// The offset of the view. A use of the same value with the same strides and offset is the same leaf.
    offset: usize,
    /// What the kernel adds to its indices. 0 if the place already begins at the view's first element.
    start: usize,
    strided: bool,
}

impl Leaf {
    fn is_whole(&self, sizes: &[usize], strides: &[usize]) -> bool {
        let last = sizes.len() - 1;
        let steps = strides[..last].iter().chain([&self.start, &sizes[last]]);
        strides[last] == 1 && steps.into_iter().all(|step| step.is_multiple_of(4))
    }
}

/// Returns how many of the first axes of a walk can be the grid's, so that they cost no division. All that is left
/// inside them must fill its workgroups, or nearly.
fn on_grid(sizes: &[usize]) -> usize {
    let threads = THREADS as usize;
    let fits = |outer: usize| {
        let inner: usize = sizes[outer..].iter().product();
        let vectors = inner / 4;
        sizes[..outer].iter().all(|&size| size <= MOST_ON_AXIS)
            && sizes[sizes.len() - 1].is_multiple_of(4)
            && vectors.div_ceil(threads) <= MOST_ON_AXIS
            && (vectors.is_multiple_of(threads) || vectors >= 4 * threads)
    };
    (1..=2).rev().find(|&outer| outer < sizes.len() && fits(outer)).unwrap_or(0)
}

/// A kernel being generated.
struct Program<'a> {
    root: &'a Value,
    shape: Shape,
    op: &'static str,
    leaves: Vec<Leaf>,
    scalars: Vec<Scalar>,
    operations: Vec<Operation>,
    /// The variable of each inlined value, by the value's address, and how many arguments refer to it.
    inlined: HashMap<*const Value, (usize, usize)>,
    /// Inlined values in order of computation.
    order: Vec<(Arc<Value>, usize)>,
}

impl<'a> Program<'a> {
    fn new(root: &'a Value, expr: &Arc<Expr>) -> Self {
        let mut program = Program {
            root,
            shape: expr.shape,
            op: expr.op,
            leaves: Vec::new(),
            scalars: Vec::new(),
            operations: Vec::new(),
            inlined: HashMap::new(),
            order: Vec::new(),
        };
        let last = program.emit(expr, root.dtype);
        debug_assert_eq!(last + 1, program.operations.len());
        program
    }

    /// Adds the operations of `expr`, and returns the number of the last one.
    fn emit(&mut self, expr: &Expr, dtype: DType) -> usize {
        let terms = expr.args.iter().map(|arg| self.term(expr, arg)).collect();
        self.operations.push(Operation { template: expr.template.into(), dtype, terms });
        self.operations.len() - 1
    }

    fn term(&mut self, expr: &Expr, arg: &Arg) -> Term {
        match arg {
            Arg::Scalar(scalar) => {
                self.scalars.push(*scalar);
                Term::Number(self.scalars.len() - 1)
            }
            Arg::Operand { value, strides, offset } => {
                let Some(inner) = expr.inlines(value, strides, *offset) else {
                    return Term::Read(self.leaf(value, strides, *offset));
                };
                let key = Arc::as_ptr(value);
                if let Some((variable, uses)) = self.inlined.get_mut(&key) {
                    *uses += 1;
                    return Term::Made(*variable);
                }
                let variable = self.emit(&inner, value.dtype);
                self.inlined.insert(key, (variable, 1));
                self.order.push((value.clone(), variable));
                Term::Made(variable)
            }
        }
    }

    fn leaf(&mut self, value: &Arc<Value>, strides: &Strides, offset: usize) -> usize {
        let known = self
            .leaves
            .iter()
            .position(|l| Arc::ptr_eq(&l.value, value) && l.strides == *strides && l.offset == offset);
        known.unwrap_or_else(|| {
            let align = self.root.gpu.limits().min_storage_buffer_offset_alignment as u64;
            let bytes = (offset * value.dtype.size()) as u64;
            let plain = *strides == self.shape.strides() && bytes.is_multiple_of(align);
            let mut place = value.place();
            if plain {
                place.offset += bytes;
            }
            let start = if plain { 0 } else { offset };
            self.leaves.push(Leaf {
                value: value.clone(),
                place,
                strides: *strides,
                offset,
                start,
                strided: !plain,
            });
            self.leaves.len() - 1
        })
    }

    fn run(mut self, place: &Place, accumulate: bool) {
        let gpu = self.root.gpu.clone();
        let room = gpu.max_bindings().saturating_sub(self.leaves.len() + 1);
        let outputs = self.held_elsewhere(room);
        let (sizes, strides, strided) = self.walks();
        let outer = if strided.is_empty() { 0 } else { on_grid(&sizes) };
        let source = self.source(&outputs, accumulate, &sizes, &strides, &strided, outer);
        let groups = |count: usize| count.div_ceil(4).div_ceil(THREADS as usize);
        let inner: usize = sizes[outer..].iter().product();
        let grid = match outer {
            0 => grid(groups(self.root.count)),
            1 => [groups(inner) as u32, sizes[0] as u32, 1],
            _ => [groups(inner) as u32, sizes[1] as u32, sizes[0] as u32],
        };
        let mut launch = Launch::new(self.op, &source, "main", grid).turns(0).set("n", self.root.count);
        if !strided.is_empty() {
            launch = sizes.iter().enumerate().fold(launch, |l, (a, &size)| l.set(format!("size{a}"), size));
        }
        if outer > 0 {
            launch = launch.set("inner", inner);
        }
        for (&leaf, strides) in strided.iter().zip(&strides) {
            for (a, &step) in strides.iter().enumerate() {
                launch = launch.set(format!("t{leaf}_{a}"), step);
            }
            launch = launch.set(format!("o{leaf}"), self.leaves[leaf].start);
        }
        for (i, scalar) in self.scalars.iter().enumerate() {
            launch = launch.set(format!("s{i}"), scalar.param());
        }
        for (i, Leaf { value, place, strided, .. }) in self.leaves.iter().enumerate() {
            let count = if *strided { value.count } else { self.root.count };
            launch = launch.bind(X[i], place.part(value.dtype.buffer_bytes(count)));
        }
        launch = launch.bind_mut(Y[0], place.part(self.root.dtype.buffer_bytes(self.root.count)));
        let mut places = Vec::new();
        for (i, (value, _)) in outputs.iter().enumerate() {
            let bytes = value.dtype.buffer_bytes(value.count);
            let made = Place { buffer: gpu.alloc(self.op, bytes), offset: 0 };
            launch = launch.bind_mut(Y[i + 1], made.part(bytes));
            places.push(made);
        }
        gpu.launch(launch);
        for ((value, _), made) in outputs.iter().zip(places) {
            value.store(made);
        }
    }

    /// Returns the inlined values that somebody outside this expression holds, latest first, at most `room` of them.
    /// The kernel stores them too.
    fn held_elsewhere(&mut self, room: usize) -> Vec<(Arc<Value>, usize)> {
        let order = std::mem::take(&mut self.order);
        let mut held: Vec<_> = order
            .into_iter()
            .filter(|(value, _)| {
                let (_, uses) = self.inlined[&Arc::as_ptr(value)];
                // One reference is ours, in `order`.
                Arc::strong_count(value) > uses + 1
            })
            .collect();
        held.reverse();
        held.truncate(room);
        held
    }

    /// Returns the merged sizes, each strided leaf's merged strides, and which leaves are strided.
    fn walks(&self) -> (Vec<usize>, Vec<Vec<usize>>, Vec<usize>) {
        let strided: Vec<usize> = (0..self.leaves.len()).filter(|&i| self.leaves[i].strided).collect();
        let operands: Vec<Strides> = strided.iter().map(|&i| self.leaves[i].strides).collect();
        let (mut sizes, mut strides) = collapse(&self.shape, &operands);
        if sizes.is_empty() {
            sizes.push(1);
            strides.iter_mut().for_each(|s| s.push(0));
        }
        (sizes, strides, strided)
    }

    fn source(
        &mut self,
        outputs: &[(Arc<Value>, usize)],
        accumulate: bool,
        sizes: &[usize],
        strides: &[Vec<usize>],
        strided: &[usize],
        outer: usize,
    ) -> Source {
        let mut walks = vec![Walk::Plain; self.leaves.len()];
        for (&leaf, strides) in strided.iter().zip(strides) {
            walks[leaf] = match strides[strides.len() - 1] {
                _ if self.leaves[leaf].is_whole(sizes, strides) => Walk::Whole,
                0 => Walk::Repeated,
                _ => Walk::Strided,
            };
        }
        let operations = std::mem::take(&mut self.operations);
        let text = Text {
            reads: self.leaves.iter().map(|leaf| leaf.value.dtype).zip(walks).collect(),
            numbers: self.scalars.len(),
            writes: std::iter::once(operations.len() - 1)
                .chain(outputs.iter().map(|(_, made)| *made))
                .collect(),
            operations,
            accumulate,
            axes: sizes.len(),
            together: sizes[sizes.len() - 1].is_multiple_of(4),
            outer,
        };
        if variants::is_held() { text.listed() } else { text.source() }
    }
}
