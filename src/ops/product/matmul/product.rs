//! One product: its slots, bindings and parameters, launched.

use super::core::{Core, MOST_GROUPS, Problem, choose};
use super::operand::{self, Operand, operand};
use super::parts::Cut;
use super::{Activation, Epilogue};
use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Bind, Launch, MOST_TURNS, Work};
use crate::ops::product::site::{Load, Site};
use crate::ops::reduction::reduce;
use crate::ops::words;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// The right side of a product: a tensor, or a site's `W` or `W^T`.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    Tensor(&'a Tensor),
    Weight { site: &'a dyn Site, transposed: bool },
}

/// Rows above which a site's weight is made once instead of in every tile's load. Fused, a tile of rows makes each weight
/// anew: with more than a few tiles that costs more than writing `[out, in]` once and reading it back as vectors.
const FUSED_ROWS: usize = 64;

/// A right side as the kernel reads it.
struct Read {
    fragment: &'static str,
    half: bool,
    binds: Vec<Bind>,
    slots: Vec<(&'static str, &'static str)>,
    load: Option<Load>,
    words: [usize; 4],
    any: usize,
    site: [u32; 4],
}

impl Right<'_> {
    /// Whether a weight that is not stored is made in the product's own loads.
    fn is_fused(self, rows: usize) -> bool {
        matches!(self, Right::Weight { site, .. } if rows <= FUSED_ROWS && site.stored().is_none())
    }

    /// The right side as a tensor, of a weight that is not stored made now.
    fn made(self) -> Tensor {
        match self {
            Right::Tensor(tensor) => tensor.clone(),
            Right::Weight { site, transposed } => {
                let w = site.stored().unwrap_or_else(|| site.expand());
                if transposed { w.t() } else { w }
            }
        }
    }

    fn read(self, rows: usize, batch: &Shape) -> Read {
        let (site, transposed) = match self {
            Right::Weight { site, transposed } if self.is_fused(rows) => (site, transposed),
            _ => return Read::tensor(&self.made(), batch),
        };
        let load = site.load();
        Read {
            fragment: if transposed { "rhs_site_transposed" } else { "rhs_site" },
            half: false,
            binds: load.tensors.iter().zip(1..).map(|(t, binding)| t.bind(binding)).collect(),
            slots: vec![],
            words: [0; 4],
            any: 0,
            site: load.params,
            load: Some(load),
        }
    }
}

impl Read {
    fn tensor(x: &Tensor, batch: &Shape) -> Read {
        let Operand { fragment, half, bind, words, any } = operand(x, batch, true);
        let slots = if half { vec![("rhs_word", "rhs_f16")] } else { vec![] };
        Read { fragment, half, binds: vec![bind], slots, load: None, words, any, site: [0; 4] }
    }
}

/// Which rows take part, by a list of u32.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a> {
    All,
    /// Row `i` of the product is made from row `list[i]` of the left side.
    Gathered(&'a Tensor),
    /// Row `i` of the product, times `gate[i]`, belongs to row `list[i]` of the result.
    Scattered {
        list: &'a Tensor,
        gate: &'a Tensor,
    },
}

/// `y [batch, m, n] = lhs rhs` and what comes with it.
///
/// [`Product::write`] is where ops come in: it cuts the inner axis into parts ([`Cut`]) where the device would be idle otherwise, or
/// hands the whole to [`Product::launch`]. That is one dispatch, unless a limit stands in the way: of time or workgroups (then in two
/// halves of rows or batches), or of a thread's loops (then in pieces of the inner axis), each of which is launched again. It never
/// cuts into parts. All of these are decided by the table's kernel; the dispatch itself takes the one that was measured.
pub(super) struct Product<'a> {
    pub op: &'static str,
    pub lhs: &'a Tensor,
    pub rhs: Right<'a>,
    pub rows: Rows<'a>,
    pub epilogue: Epilogue<'a>,
    pub accumulate: bool,
    /// Takes what the activation is applied to, beside the result; with a bias.
    pub before: Option<&'a Tensor>,
    /// The result is multiplied by GELU's derivative there; with nothing else.
    pub slope: Option<&'a Tensor>,
    /// Batches that are parts of one product's inner axis.
    pub parts: usize,
}

impl<'a> Product<'a> {
    pub fn new(op: &'static str, lhs: &'a Tensor, rhs: Right<'a>) -> Product<'a> {
        let epilogue = Epilogue::default();
        Product {
            op,
            lhs,
            rhs,
            rows: Rows::All,
            epilogue,
            accumulate: false,
            before: None,
            slope: None,
            parts: 1,
        }
    }

    /// `m`, `n` and `k` of the product whose result is `y`.
    fn sizes(&self, y: &Tensor) -> [usize; 3] {
        let axes = y.shape().len();
        let m = match self.rows {
            Rows::All => y.shape()[axes - 2],
            Rows::Gathered(list) | Rows::Scattered { list, .. } => list.count(),
        };
        [m, y.shape()[axes - 1], self.lhs.shape()[self.lhs.shape().len() - 1]]
    }

    /// Makes it, `y` its result: in one dispatch, or in parts of the inner axis where tiles are few.
    pub fn write(self, y: &Tensor) {
        let [m, n, k] = self.sizes(y);
        if m * n == 0 || y.count() == 0 {
            return;
        }
        if k == 0 {
            if !self.accumulate {
                self.finish(Tensor::zeros(y.gpu(), y.shape()), y);
            }
            return;
        }
        if self.rhs.is_fused(m) {
            return self.launch(y);
        }
        let right = self.rhs.made();
        let product = Product { rhs: Right::Tensor(&right), ..self };
        let scattered = matches!(product.rows, Rows::Scattered { .. });
        match product.cut(y, &right).filter(|_| !scattered) {
            Some(cut) => product.in_parts(y, &right, cut),
            None => product.launch(y),
        }
    }

    /// How to cut the inner axis of two matrices.
    fn cut(&self, y: &Tensor, right: &Tensor) -> Option<Cut> {
        if y.shape().len() > 2 {
            return None;
        }
        let [m, n, k] = self.sizes(y);
        let ((left, left_half), (right, right_half)) =
            (operand::slot(self.lhs, false), operand::slot(right, true));
        let half = left_half && right_half || y.gpu().rounds_products();
        let problem = Problem { m, n, k, batch: 1, left, right, half, coop: None };
        Cut::of(y.gpu().class(), &problem.on(y.gpu()))
    }

    /// Part by part of the inner axis, then their sum.
    fn in_parts(self, y: &Tensor, right: &Tensor, cut: Cut) {
        let [m, n, _] = self.sizes(y);
        let parts = Tensor::empty(y.gpu(), self.op, [cut.parts, m, n], DType::F32);
        self.write_parts(right, cut, &parts, false);
        if self.is_plain() && !self.accumulate {
            return reduce::sum_parts(self.op, &parts, y);
        }
        let sum = parts.sum(0);
        if self.is_plain() { sum.write_to(self.op, y, true) } else { self.finish(sum, y) }
    }

    /// Whether results are stored as they are.
    fn is_plain(&self) -> bool {
        let Epilogue { bias, activation, residual } = self.epilogue;
        let plain = bias.is_none() && activation == Activation::None && residual.is_none();
        plain && self.before.is_none() && self.slope.is_none()
    }

    /// Launches it, `y` its result.
    pub fn launch(self, y: &Tensor) {
        let (gpu, axes) = (y.gpu(), y.shape().len());
        let batch = Shape::new(&y.shape()[..axes - 2]);
        let [m, n, k] = self.sizes(y);
        let mut left = operand(self.lhs, &batch, false);
        let mut binds = vec![y.bind_mut(4)];
        let mut slots = vec![];
        let mut listed = 0;
        match self.rows {
            Rows::All => {}
            Rows::Gathered(list) => {
                debug_assert_eq!(left.fragment, "lhs_plain");
                left.fragment = "lhs_gathered";
                listed = self.lhs.shape()[self.lhs.shape().len() - 2];
                binds.push(list.bind(7));
            }
            Rows::Scattered { list, gate } => {
                slots.push(("place", "place_scattered"));
                listed = y.shape()[0];
                binds.extend([list.bind(7), gate.bind(8)]);
            }
        }
        slots.push(("lhs", left.fragment));
        binds.push(left.bind);
        let right = self.rhs.read(m, &batch);
        slots.extend(right.slots);
        slots.push(("rhs", right.fragment));
        binds.extend(right.binds);
        if left.half {
            slots.push(("lhs_word", "lhs_f16"));
        }
        let Epilogue { bias, activation, residual } = self.epilogue;
        binds.extend(bias.map(|bias| bias.detach().cast(DType::F32).contiguous().bind(5)));
        binds.extend(residual.map(|residual| residual.detach().cast(DType::F32).contiguous().bind(6)));
        binds.extend(self.slope.map(|at| at.bind(6)));
        binds.extend(self.before.map(|before| before.bind_mut(9)));
        if n.is_multiple_of(4) {
            slots.push(("pieces", "pieces_of_4"));
        }
        slots.push(("store", self.store()));

        let half = left.half && right.half || gpu.rounds_products();
        let problem = Problem {
            m,
            n,
            k,
            batch: batch.count(),
            left: left.fragment,
            right: right.fragment,
            half,
            coop: None,
        };
        let problem = problem.on(gpu);
        let class = gpu.class();
        let long = class.seconds(problem.operand_bytes(), problem.flops()) > DeviceClass::LONGEST;
        let many = || Core::by_table(class, &problem).grid(&problem).iter().any(|&n| n > MOST_GROUPS);
        if (long || many())
            && let Some(middle) = self.middle(y)
        {
            return self.in_halves(y, middle);
        }
        let core = choose(gpu, &problem);
        let load = right.load.as_ref().map_or(0, |load| load.turns);
        let most = core.longest(load);
        if k > most {
            return self.in_pieces(y, &batch, if load > 0 { core.longest(0) } else { most });
        }
        let mut source =
            slots.iter().fold(core.source(gpu.lanes()), |s, (slot, fragment)| s.slot(*slot, *fragment));
        if let Some(load) = &right.load {
            source = load.set(source);
        }
        if activation != Activation::None {
            source = source.u32("ACTIVATION", activation as u32);
        }
        if core.is_blocked(k) {
            source = source.bool("BLOCKED", true);
        }
        // Another text to compile: only where many tiles gain from it.
        if !gpu.class().slow_compiler && core.fits(&problem) {
            source = source.bool("EDGES", false);
        }
        let inner = if batch.is_empty() { 1 } else { batch[batch.len() - 1] };
        let params: Vec<u32> = [m, n, k, inner]
            .iter()
            .chain(&left.words)
            .chain(&right.words)
            .chain(&[left.any, right.any, listed, 0])
            .map(|&v| v as u32)
            .chain(right.site)
            .collect();
        let grid = core.grid(&problem).map(|v| v as u32);
        let reuse = (m.min(n) / 8).max(1) as u32;
        let (op, params) = (self.op, words(&params));
        // As many as it may make for an axis as long as it may be, and of this one its share.
        let turns = k * MOST_TURNS / most;
        let work = Work { flops: problem.flops(), parts: self.parts };
        gpu.launch(Launch { op, source: &source, entry: "main", binds, params, grid, turns, reuse, work });
    }

    /// Piece by piece of an inner axis that is too long for one launch, each adding to the ones before.
    fn in_pieces(self, y: &Tensor, batch: &Shape, most: usize) {
        let k = self.lhs.shape()[self.lhs.shape().len() - 1];
        let right = self.rhs.made();
        let plain = self.is_plain();
        let sum = if plain { y.clone() } else { Tensor::empty(y.gpu(), self.op, y.shape(), DType::F32) };
        debug_assert_eq!(batch.len() + 2, sum.shape().len());
        for first in (0..k).step_by(most) {
            let piece = first..k.min(first + most);
            let (lhs, rhs) = (self.lhs.slice(-1, piece.clone()), right.slice(-2, piece));
            let accumulate = self.accumulate || first > 0;
            Product { rows: self.rows, accumulate, ..Product::new(self.op, &lhs, Right::Tensor(&rhs)) }
                .launch(&sum);
        }
        if !plain {
            self.finish(sum, y);
        }
    }

    /// Where its rows, or the entries of its first axis, can be made one half after the other: at a place that every adapter can bind,
    /// which is a multiple of 64 elements of what is written, of lists and of gates.
    fn middle(&self, y: &Tensor) -> Option<usize> {
        if y.shape().len() == 2 {
            let rows = self.sizes(y)[0];
            return (rows >= 256).then(|| (rows / 2).next_multiple_of(128));
        }
        let (size, step) = (y.shape()[0], y.count() / y.shape()[0].max(1));
        let plain = !matches!(self.rows, Rows::Scattered { .. }) && self.is_plain();
        // The nearest to the middle of those places.
        let aligned = |at: &usize| (at * step).is_multiple_of(64);
        (1..size).filter(aligned).min_by_key(|at| at.abs_diff(size / 2)).filter(|_| plain)
    }

    /// In two halves: a dispatch that takes seconds ends in a driver's watchdog, and one of too many workgroups is refused.
    fn in_halves(self, y: &Tensor, half: usize) {
        let axes = y.shape().len();
        let right = self.rhs.made();
        let size = if axes == 2 { self.sizes(y)[0] } else { y.shape()[0] };
        for own in [0..half, half..size] {
            let of = |x: &Tensor| x.slice(0, own.clone());
            let [list, gate] = match self.rows {
                Rows::All => [None, None],
                // Parts of an inner axis all have the same rows.
                Rows::Gathered(list) => [Some(if axes == 2 { of(list) } else { list.clone() }), None],
                Rows::Scattered { list, gate } => [Some(of(list)), Some(of(gate))],
            };
            let rows = match (&list, &gate) {
                (None, _) => Rows::All,
                (Some(list), None) => Rows::Gathered(list),
                (Some(list), Some(gate)) => Rows::Scattered { list, gate },
            };
            // A broadcast operand has no part of its own in a half of the batches.
            let batches =
                |x: &Tensor| if x.shape().len() == axes && x.shape()[0] > 1 { of(x) } else { x.clone() };
            let (lhs, rhs) = match (axes, &gate) {
                (2, _) if matches!(rows, Rows::Gathered(_)) => (self.lhs.clone(), right.clone()),
                (2, _) => (of(self.lhs), right.clone()),
                _ => (batches(self.lhs), batches(&right)),
            };
            // A layer's residual comes in the shape of its caller.
            let residual = self.epilogue.residual.map(|r| of(&r.detach().reshape(*y.shape())));
            let [before, slope] = [self.before, self.slope].map(|x| x.map(of));
            let epilogue = Epilogue { residual: residual.as_ref(), ..self.epilogue };
            let (before, slope) = (before.as_ref(), slope.as_ref());
            let (lhs, rhs) = (&lhs, Right::Tensor(&rhs));
            let to = if gate.is_some() { y.clone() } else { of(y) };
            Product { lhs, rhs, rows, epilogue, before, slope, ..self }.launch(&to);
        }
    }

    fn store(&self) -> &'static str {
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

    /// The epilogue alone, as elementwise ops on a sum that is there.
    fn finish(&self, sum: Tensor, y: &Tensor) {
        let Epilogue { bias, activation, residual } = self.epilogue;
        let sum = bias.map_or(sum.clone(), |bias| sum.add(&bias.detach()));
        if let Some(before) = self.before {
            sum.clone().write_to(self.op, before, false);
        }
        let sum = match self.slope {
            Some(at) => Tensor::lazy("slope", "$0 * dgelu($1)", DType::F32, *y.shape(), &[&sum, at]),
            None => activation.apply(&sum),
        };
        let last = residual.map_or(sum.clone(), |r| sum.add(&r.detach().reshape(*y.shape())));
        last.write_to(self.op, y, false);
    }
}
