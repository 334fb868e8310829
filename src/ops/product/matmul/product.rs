//! One product: its slots, bindings and parameters, and its dispatch with a given kernel.

use super::core::{Core, Problem};
use super::load::Load;
use super::operand::{Operand, operand};
use super::parts::{Cut, Join};
use super::table::THIN;
use super::{Activation, Epilogue};
use crate::dtype::DType;
use crate::gpu::kernel::{Launch, MOST_TURNS, Part, Work};
use crate::gpu::shader::Source;
use crate::gpu::{DeviceClass, Tiles};
use crate::ops::stored;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// The right side of a product.
#[derive(Clone, Copy)]
pub(in crate::ops) enum Right<'a> {
    Tensor(&'a Tensor),
    /// The transpose of two contiguous f32 matrices, one below the other.
    Stacked(&'a Tensor, &'a Tensor),
    /// A weight that is not stored, or its transpose: `load` tells how kernels read it, `whole` materialises it. Only the
    /// one that is used is called. `compact` weights take little time to read.
    Made {
        load: &'a dyn Fn() -> Load,
        whole: &'a dyn Fn() -> Tensor,
        transposed: bool,
        compact: bool,
    },
}

/// With more rows than this, a site's weight is materialised once instead of being computed in every tile's load. In a
/// fused product, each tile of rows computes every weight again. With more than a few tiles, that costs more than writing
/// `[out, in]` once and reading it back in vectors.
const FUSED_ROWS: usize = 64;

/// A right side as the kernel reads it.
struct Read {
    fragment: &'static str,
    dtype: DType,
    binds: Vec<(&'static str, Part)>,
    slots: Vec<(&'static str, &'static str)>,
    load: Option<Load>,
    /// The position in memory, as `p.rhs` expects it. For a weight that the loads compute, the sharing kind's own
    /// numbers.
    words: [u32; 4],
    any: usize,
}

impl Right<'_> {
    /// Whether a weight that is not stored is computed in the product's own loads.
    pub fn is_fused(self, rows: usize, class: &DeviceClass) -> bool {
        let Right::Made { compact, .. } = self else { return false };
        // The tiles of CPU drivers are small, and unpack every weight many times.
        let most = if compact && class.tiles == Tiles::Registers { THIN } else { FUSED_ROWS };
        rows <= most
    }

    /// Returns the right side as a tensor. A weight that is not stored is materialised now.
    pub fn made(self) -> Tensor {
        match self {
            Right::Tensor(tensor) => tensor.clone(),
            Right::Stacked(w, tail) => Tensor::concat(&[w, tail], 0).t(),
            Right::Made { whole, transposed: false, .. } => whole(),
            Right::Made { whole, transposed: true, .. } => whole().t(),
        }
    }

    fn read(self, rows: usize, batch: &Shape, class: &DeviceClass) -> Read {
        let (load, transposed) = match self {
            Right::Stacked(w, tail) if Read::stacks(w, tail) => return Read::stacked(w, tail),
            Right::Made { load, transposed, .. } if self.is_fused(rows, class) => (load(), transposed),
            _ => return Read::tensor(&self.made(), batch),
        };
        Read {
            fragment: match (transposed, load.packed) {
                (true, Some(_)) => "rhs_packed",
                (true, None) => "rhs_site_transposed",
                (false, _) => "rhs_site",
            },
            dtype: DType::F32,
            binds: load.tensors.iter().map(|(name, tensor)| (*name, tensor.into())).collect(),
            slots: vec![],
            words: load.params,
            any: 0,
            load: Some(load),
        }
    }
}

impl Read {
    /// Whether blocks of 4 x 4 of two matrices are whole vectors of one of them.
    fn stacks(w: &Tensor, tail: &Tensor) -> bool {
        let [rows, columns] = [w.shape()[0], w.shape()[1]];
        // Matrix units have no such load.
        !w.gpu().rounds_products()
            && [rows, columns, w.offset, tail.offset].iter().all(|v| v.is_multiple_of(4))
    }

    fn stacked(w: &Tensor, tail: &Tensor) -> Read {
        let words = [0, w.shape()[1], 0, w.shape()[0]].map(|v| v as u32);
        let binds = vec![("rhs", w.into()), ("tail", tail.into())];
        let (fragment, dtype) = ("rhs_stacked", DType::F32);
        Read { fragment, dtype, binds, slots: vec![], load: None, words, any: 0 }
    }

    fn tensor(x: &Tensor, batch: &Shape) -> Read {
        let Operand { fragment, dtype, part, words, any } = operand(x, batch, true);
        let slots = Operand::word(dtype, true).into_iter().collect();
        let words = words.map(|v| v as u32);
        Read { fragment, dtype, binds: vec![("rhs", part)], slots, load: None, words, any }
    }
}

/// A product whose operands are laid out for the kernels.
pub(in crate::ops) struct Prepared {
    pub problem: Problem,
    reads: Vec<(&'static str, Part)>,
    slots: Vec<(&'static str, &'static str)>,
    /// The load of a weight that is computed as it is read.
    pub load: Option<Load>,
    /// `p.lhs` and `p.rhs`.
    words: [[u32; 4]; 2],
    any: [usize; 2],
    /// Size of the inner one of two batch axes.
    inner: usize,
    /// Number of rows from which a list of rows chooses.
    listed: usize,
}

/// How results are stored: slots, what they read, and the length of the first axis of a result that a list chooses from.
struct Store {
    slots: Vec<(&'static str, &'static str)>,
    reads: Vec<(&'static str, Part)>,
    listed: usize,
    activation: Activation,
}

impl Store {
    fn set(&self, source: Source) -> Source {
        let source = self.slots.iter().fold(source, |s, (slot, fragment)| s.slot(*slot, *fragment));
        match self.activation {
            Activation::None => source,
            activation => source.u32("ACTIVATION", activation as u32),
        }
    }

    fn bind<'a>(self, launch: Launch<'a>, y: &Tensor, before: Option<&Tensor>) -> Launch<'a> {
        let launch = self.reads.into_iter().fold(launch, |launch, (name, part)| launch.bind(name, part));
        let launch = launch.bind_mut("y", y);
        match before {
            Some(before) => launch.bind_mut("before", before),
            None => launch,
        }
    }
}

/// Which rows take part, given by a list of u32.
#[derive(Clone, Copy)]
pub(in crate::ops) enum Rows<'a> {
    All,
    /// Row `i` of the product is computed from row `list[i]` of the left side.
    Gathered(&'a Tensor),
    /// Row `i` of the product, times `gate[i]`, goes to row `list[i]` of the result.
    Scattered {
        list: &'a Tensor,
        gate: &'a Tensor,
    },
}

/// `y [batch, m, n] = lhs rhs` with an epilogue.
///
/// Ops call [`Product::write`], in `write.rs`. If the device would otherwise be idle, it cuts the inner axis into parts
/// ([`Cut`]), whatever the operands and the store are. If not, it launches the whole product, in one dispatch unless a
/// limit forbids it. A dispatch that takes too long or has too many workgroups is split into two halves of rows or
/// batches; if a thread's loops are too long, the inner axis is split into pieces. Each half or piece is launched in the
/// same way, and is never cut into parts. The table's kernel decides about parts and halves, the kernel that is
/// dispatched (a measured one, if there is one) about pieces.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Product<'a> {
    pub op: &'static str,
    pub lhs: &'a Tensor,
    pub rhs: Right<'a>,
    pub rows: Rows<'a>,
    pub epilogue: Epilogue<'a>,
    pub accumulate: bool,
    /// Receives the input of the activation, beside the result. Needs a bias.
    pub before: Option<&'a Tensor>,
    /// The result is multiplied by GELU's derivative at this input. Not combined with anything else.
    pub slope: Option<&'a Tensor>,
}

impl<'a> Product<'a> {
    pub fn new(op: &'static str, lhs: &'a Tensor, rhs: Right<'a>) -> Product<'a> {
        let epilogue = Epilogue::default();
        Product { op, lhs, rhs, rows: Rows::All, epilogue, accumulate: false, before: None, slope: None }
    }

    /// Returns `m`, `n` and `k` of the product whose result has this shape.
    pub fn sizes(&self, y: &[usize]) -> [usize; 3] {
        let m = match self.rows {
            Rows::All => y[y.len() - 2],
            Rows::Gathered(list) | Rows::Scattered { list, .. } => list.count(),
        };
        [m, y[y.len() - 1], self.lhs.shape()[self.lhs.shape().len() - 1]]
    }

    /// Whether results are stored without an epilogue.
    pub fn is_plain(&self) -> bool {
        let Epilogue { bias, activation, residual } = self.epilogue;
        let plain = bias.is_none() && activation == Activation::None && residual.is_none();
        plain && self.before.is_none() && self.slope.is_none()
    }

    /// Determines how the kernel will read its operands for a result of this shape, and the problem by which it is chosen.
    pub fn prepare(&self, y: &[usize]) -> Prepared {
        let gpu = self.lhs.gpu();
        let batch = Shape::new(&y[..y.len() - 2]);
        let [m, n, k] = self.sizes(y);
        let mut left = operand(self.lhs, &batch, false);
        let mut reads: Vec<(&'static str, Part)> = Vec::with_capacity(8);
        let mut listed = 0;
        if let Rows::Gathered(list) = self.rows {
            debug_assert_eq!(left.fragment, "lhs_plain");
            left.fragment = "lhs_gathered";
            listed = self.lhs.shape()[self.lhs.shape().len() - 2];
            reads.push(("rows", list.into()));
        }
        reads.push(("lhs", left.part));
        let right = self.rhs.read(m, &batch, gpu.class());
        let mut slots = right.slots;
        slots.extend([("lhs", left.fragment), ("rhs", right.fragment)]);
        reads.extend(right.binds);
        slots.extend(Operand::word(left.dtype, false));
        let problem = Problem {
            m,
            n,
            k,
            batch: batch.count(),
            left: left.fragment,
            right: right.fragment,
            dtype: Problem::operands([left.dtype, right.dtype], gpu.rounds_products()),
            coop: None,
            bits: right.load.as_ref().and_then(|load| load.packed),
        };
        let inner = if batch.is_empty() { 1 } else { batch[batch.len() - 1] };
        let (words, any) = ([left.words.map(|v| v as u32), right.words], [left.any, right.any]);
        Prepared { problem: problem.on(gpu), reads, slots, load: right.load, words, any, inner, listed }
    }

    /// Computes the product in one dispatch of this kernel, whatever its sizes. If a thread would take too many turns,
    /// the result carries that error.
    pub fn dispatch(&self, y: &Tensor, prepared: &Prepared, core: Core) {
        self.dispatch_parts(y, prepared, core, Cut { parts: 1, len: prepared.problem.k });
    }

    /// Computes the products of all parts of the inner axis in one dispatch of this kernel, into `y [.., parts, m, n]`.
    pub fn dispatch_parts(&self, y: &Tensor, prepared: &Prepared, core: Core, cut: Cut) {
        let (gpu, Prepared { problem, load, .. }) = (y.gpu(), prepared);
        let Problem { m, n, k, .. } = *problem;
        let most = core.longest(load.as_ref().map_or(0, |load| load.turns));
        let slots = prepared.slots.iter().filter(|(slot, _)| core.has_slot(slot));
        let mut source = slots
            .fold(core.source(gpu.class()), |s, (slot, fragment)| s.slot(*slot, core.fragment(fragment)));
        let scattered = matches!(self.rows, Rows::Scattered { .. });
        if y.dtype() == DType::F32 {
            source = core.with_store(gpu.class(), source, problem, (self.store_fragment(), scattered));
        }
        if let Some(load) = load {
            source = load.set(source);
        }
        if core.is_blocked(cut.len) {
            source = source.bool("BLOCKED", true);
        }
        // Without edges, a kernel is one more variant to compile, so only drivers with fast compilers get it.
        if !gpu.class().slow_compiler && core.fits(problem) {
            source = source.bool("EDGES", false);
        }
        let store = self.store(y, n);
        let source = store.set(source);
        let grid = core.grid(&cut.part_of(problem)).map(|v| v as u32);
        let reuse = (m.min(n) / 8).max(1) as u32;
        // The most turns, in proportion to this inner axis's share of the longest.
        let turns = cut.len * MOST_TURNS / most;
        let launch = Launch::new(self.op, &source, "main", grid)
            .set("m", m)
            .set("n", n)
            .set("k", k)
            .set("part", cut.len)
            .set("batch_inner", prepared.inner)
            .set("lhs", prepared.words[0])
            .set("rhs", prepared.words[1])
            .set("any", prepared.any)
            .set("rows", prepared.listed.max(store.listed))
            .turns(turns)
            .reuse(reuse)
            .work(Work { flops: problem.flops(), parts: cut.parts });
        let reads = prepared.reads.iter().cloned();
        let launch = reads.fold(launch, |launch, (name, part)| launch.bind(name, part));
        gpu.launch(store.bind(launch, y, self.before));
    }

    /// Adds up the parts `[.., parts, m, n]` of this product in order, and stores the result.
    pub fn join(&self, sums: &Tensor, y: &Tensor, problem: &Problem, cut: Cut) {
        let Problem { batch, m, n, .. } = *problem;
        let join = Join::of(y.gpu().class(), [batch, m, n], cut.parts);
        let store = self.store(y, n);
        let source = store.set(join.source(n));
        let launch = join.launch(self.op, &source, sums, [m, n]);
        let launch = launch.set("lhs", [0u32; 4]).set("rows", store.listed);
        y.gpu().launch(store.bind(launch, y, self.before));
    }

    /// Adds up products with `coefficients.shape()[1]` atoms in `parts` parts each, `sums [atoms, parts, m, n]`, where row
    /// `i` weighs the atoms by `coefficients[layers[i]]`, and stores the result.
    pub fn join_weighted(self, sums: &Tensor, y: &Tensor, parts: usize, listed: [&Tensor; 2]) {
        let [layers, coefficients] = listed;
        let [count, atoms] = [coefficients.shape()[0], coefficients.shape()[1]];
        let [m, n] = [y.shape()[0], y.shape()[1]];
        let join = Join::of(y.gpu().class(), [1, m, n], atoms * parts);
        let store = self.store(y, n);
        let source = store.set(join.source(n).slot("weights", "weights_listed"));
        let launch = join.launch(self.op, &source, sums, [m, n]);
        let launch = launch.bind("layers", layers).bind("coefficients", coefficients);
        let launch = launch.set("lhs", [parts, atoms, count, 0].map(|v| v as u32)).set("rows", 0usize);
        y.gpu().launch(store.bind(launch, y, None));
    }

    /// Determines how results are stored.
    fn store(&self, y: &Tensor, n: usize) -> Store {
        let Epilogue { bias, activation, residual } = self.epilogue;
        let mut slots = vec![("store", self.store_fragment())];
        let mut reads: Vec<(&'static str, Part)> = Vec::new();
        let mut listed = 0;
        if let Rows::Scattered { list, gate } = self.rows {
            slots.push(("place", "place_scattered"));
            listed = y.shape()[0];
            reads.extend([("rows", list.into()), ("gate", gate.into())]);
        }
        if n.is_multiple_of(4) {
            slots.push(("pieces", "pieces_of_4"));
        }
        slots.extend(stored::fragments(&[("out", y.dtype())]));
        let as_type = |x: &Tensor, dtype| Part::from(&x.detach().cast(dtype).contiguous());
        reads.extend(bias.map(|bias| ("bias", as_type(bias, DType::F32))));
        reads.extend(residual.map(|residual| ("residual", as_type(residual, y.dtype()))));
        reads.extend(self.slope.map(|at| ("before", at.into())));
        Store { slots, reads, listed, activation }
    }

    fn store_fragment(&self) -> &'static str {
        let Epilogue { bias, activation, residual } = self.epilogue;
        debug_assert!(self.before.is_none() || bias.is_some() && residual.is_none() && !self.accumulate);
        debug_assert!(self.slope.is_none() || bias.is_none() && residual.is_none() && !self.accumulate);
        match (self.accumulate, bias, residual) {
            _ if self.before.is_some() => "store_bias_both",
            _ if self.slope.is_some() => "store_slope",
            (true, ..) => "store_accumulate",
            (_, None, None) if activation == Activation::None => "store_plain",
            (_, None, None) => "store_activation",
            (_, Some(_), None) => "store_bias",
            (_, None, Some(_)) => "store_residual",
            (_, Some(_), Some(_)) => "store_bias_residual",
        }
    }
}
