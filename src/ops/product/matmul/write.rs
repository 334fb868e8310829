//! From a product to its dispatches. The inner axis is cut into parts if the device would otherwise be idle, and into
//! pieces if a thread would take too many turns. Rows or batches are cut into halves if a dispatch would take too long.

use super::Epilogue;
use super::choose::choose;
use super::core::{Core, MOST_GROUPS, Problem};
use super::parts::Cut;
use super::product::{Prepared, Product, Right, Rows};
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::tensor::Tensor;

/// The most bytes to whose multiples an adapter may want bindings to be aligned.
const ALIGN: usize = 256;

/// Returns which of `size` entries begins nearest to the middle of those that begin at a multiple of [`ALIGN`] bytes.
fn middle_of(size: usize, entry_bytes: usize) -> Option<usize> {
    let aligned = |at: &usize| (at * entry_bytes).is_multiple_of(ALIGN);
    (1..size).filter(aligned).min_by_key(|at| at.abs_diff(size / 2))
}

impl Prepared {
    /// The kernel for the parts of a cut, or `None` if a thread's loops would be too long.
    fn core_of(&self, cut: Cut, gpu: &Gpu) -> Option<Core> {
        let core = choose(gpu, &cut.part_of(&self.problem));
        (cut.len <= core.longest(self.load.as_ref().map_or(0, |load| load.turns))).then_some(core)
    }

    /// How to cut the inner axis, and the kernel for the parts. `None` if one part is best.
    pub fn cut(&self, gpu: &Gpu) -> Option<(Cut, Core)> {
        let cut = Cut::of(gpu.class(), &self.problem)?;
        Some((cut, self.core_of(cut, gpu)?))
    }

    /// The cut into at most so many parts, and the kernel for them.
    pub fn cut_into(&self, parts: usize, gpu: &Gpu) -> Option<(Cut, Core)> {
        let cut = Cut::into(self.problem.k, parts);
        Some((cut, self.core_of(cut, gpu)?))
    }
}

impl Product<'_> {
    /// Computes the product into `y`, in one dispatch or, if there are few tiles, in parts of the inner axis.
    pub fn write(self, y: &Tensor) {
        let [m, n, k] = self.sizes(y.shape());
        if m * n == 0 || y.count() == 0 {
            return;
        }
        if k == 0 {
            if !self.accumulate {
                self.finish(Tensor::zeros(y.gpu(), y.shape()), y);
            }
            return;
        }
        if y.dtype().is_half() && !n.is_multiple_of(4) {
            return self.write_wide(y);
        }
        let right;
        let product = if self.rhs.is_fused(m, y.gpu().class()) {
            self
        } else {
            right = self.rhs.made();
            Product { rhs: Right::Tensor(&right), ..self }
        };
        let prepared = product.prepare(y.shape());
        match prepared.cut(y.gpu()) {
            Some(cut) => product.in_parts(y, &prepared, cut),
            None => product.launch_prepared(y, &prepared),
        }
    }

    /// Computes the product in f32, and then converts it: for results of 16 bits that are no whole vectors, or that
    /// several launches add to.
    fn write_wide(self, y: &Tensor) {
        let wide = Tensor::empty(y.gpu(), self.op, y.shape(), DType::F32);
        if self.accumulate {
            y.clone().write_to(self.op, &wide, false);
        }
        let op = self.op;
        self.write(&wide);
        wide.write_to(op, y, false);
    }

    /// Computes the products of the parts of the inner axis, then their sum.
    fn in_parts(self, y: &Tensor, prepared: &Prepared, (cut, core): (Cut, Core)) {
        let problem = &prepared.problem;
        let Problem { batch, m, n, k, .. } = *problem;
        let sums = Tensor::empty(y.gpu(), self.op, [batch * cut.parts, m, n], DType::F32);
        // Several dispatches if one would take too long, each for some of the parts.
        let each = (cut.parts / problem.launches(y.gpu().class())).max(1);
        if let Right::Tensor(right) = self.rhs
            && each < cut.parts
            && batch == 1
        {
            for first in (0..cut.parts).step_by(each) {
                let own = first * cut.len..k.min((first + each) * cut.len);
                let (lhs, rhs) = (self.lhs.slice(-1, own.clone()), right.slice(-2, own.clone()));
                let some = Product { lhs: &lhs, rhs: Right::Tensor(&rhs), ..self };
                let cut = Cut { parts: own.len().div_ceil(cut.len), ..cut };
                let to = sums.slice(0, first..first + cut.parts);
                some.write_parts(&some.prepare(y.shape()), (cut, core), &to, false);
            }
        } else {
            self.write_parts(prepared, (cut, core), &sums, false);
        }
        self.join(&sums, y, problem, cut);
    }

    /// Computes the product into parts that are still to be added up. `shape` is that of the result, `[m, n]` or
    /// `[batch, m, n]`. Returns `[batch * parts, m, n]` and the number of parts.
    pub fn sums(self, shape: &[usize]) -> (Tensor, usize) {
        let (gpu, prepared) = (self.lhs.gpu(), self.prepare(shape));
        let Problem { batch, m, n, .. } = prepared.problem;
        let new = |shape: &[usize]| Tensor::empty(gpu, self.op, shape, DType::F32);
        match prepared.cut(gpu).filter(|_| prepared.problem.launches(gpu.class()) == 1) {
            Some((cut, core)) => {
                let sums = new(&[batch * cut.parts, m, n]);
                self.write_parts(&prepared, (cut, core), &sums, false);
                (sums, cut.parts)
            }
            None => {
                let whole = new(shape);
                self.launch_prepared(&whole, &prepared);
                (whole.reshape([batch, m, n]), 1)
            }
        }
    }

    /// Writes the product of each part to `sums [.., parts, m, n]`, or adds it.
    pub fn write_parts(&self, prepared: &Prepared, cut: (Cut, Core), sums: &Tensor, accumulate: bool) {
        // Rows are scattered as the sums are stored.
        let rows = if matches!(self.rows, Rows::Scattered { .. }) { Rows::All } else { self.rows };
        let inner = Product { rows, accumulate, ..Product::new(self.op, self.lhs, self.rhs) };
        inner.dispatch_parts(sums, prepared, cut.1, cut.0);
    }

    /// Computes the product with the kernel chosen for it, in one dispatch unless a limit forbids it.
    pub fn launch(self, y: &Tensor) {
        let prepared = self.prepare(y.shape());
        self.launch_prepared(y, &prepared);
    }

    fn launch_prepared(self, y: &Tensor, prepared: &Prepared) {
        let (gpu, problem) = (y.gpu(), &prepared.problem);
        let class = gpu.class();
        let long = problem.launches(class) > 1;
        let many = || Core::by_table(class, problem).grid(problem).iter().any(|&n| n > MOST_GROUPS);
        if (long || many())
            && let Some(middle) = self.middle(y)
        {
            return self.in_halves(y, middle);
        }
        let core = choose(gpu, problem);
        let load = prepared.load.as_ref().map_or(0, |load| load.turns);
        let most = core.longest(load);
        if problem.k > most && y.dtype().is_half() {
            return self.write_wide(y);
        }
        if problem.k > most {
            return self.in_pieces(y, if load > 0 { core.longest(0) } else { most });
        }
        self.dispatch(y, prepared, core);
    }

    /// Computes the product in pieces of an inner axis that is too long for one launch. Each piece adds to the ones
    /// before.
    fn in_pieces(self, y: &Tensor, most: usize) {
        let k = self.lhs.shape()[self.lhs.shape().len() - 1];
        let right = self.rhs.made();
        let plain = self.is_plain();
        let sum = if plain { y.clone() } else { Tensor::empty(y.gpu(), self.op, y.shape(), DType::F32) };
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

    /// Returns where the rows, or the entries of the first axis, can be split in two. Every adapter must be able to bind
    /// the second half, so it starts at a multiple of [`ALIGN`] bytes of the result, of lists and of gates. Rows of 16
    /// bits are whole vectors.
    fn middle(&self, y: &Tensor) -> Option<usize> {
        if y.shape().len() == 2 {
            let rows = self.sizes(y.shape())[0];
            return (rows >= 256).then(|| (rows / 2).next_multiple_of(128));
        }
        let plain = !matches!(self.rows, Rows::Scattered { .. }) && self.is_plain();
        let size = y.shape()[0];
        middle_of(size, y.count() / size.max(1) * y.dtype().size()).filter(|_| plain)
    }

    /// Computes two halves: a driver's watchdog ends a dispatch that takes seconds, and one with too many workgroups is
    /// refused.
    fn in_halves(self, y: &Tensor, half: usize) {
        let axes = y.shape().len();
        let right = self.rhs.made();
        let size = if axes == 2 { self.sizes(y.shape())[0] } else { y.shape()[0] };
        for own in [0..half, half..size] {
            let of = |x: &Tensor| x.slice(0, own.clone());
            let [list, gate] = match self.rows {
                Rows::All => [None, None],
                // All parts of an inner axis have the same rows.
                Rows::Gathered(list) => [Some(if axes == 2 { of(list) } else { list.clone() }), None],
                Rows::Scattered { list, gate } => [Some(of(list)), Some(of(gate))],
            };
            let rows = match (&list, &gate) {
                (None, _) => Rows::All,
                (Some(list), None) => Rows::Gathered(list),
                (Some(list), Some(gate)) => Rows::Scattered { list, gate },
            };
            // A broadcast operand is the same for both halves of the batches.
            let batches =
                |x: &Tensor| if x.shape().len() == axes && x.shape()[0] > 1 { of(x) } else { x.clone() };
            let (lhs, rhs) = match (axes, &gate) {
                (2, _) if matches!(rows, Rows::Gathered(_)) => (self.lhs.clone(), right.clone()),
                (2, _) => (of(self.lhs), right.clone()),
                _ => (batches(self.lhs), batches(&right)),
            };
            // A layer passes its residual in its own shape.
            let residual = self.epilogue.residual.map(|r| of(&r.detach().reshape(*y.shape())));
            let [before, slope] = [self.before, self.slope].map(|x| x.map(of));
            let epilogue = Epilogue { residual: residual.as_ref(), ..self.epilogue };
            let (before, slope) = (before.as_ref(), slope.as_ref());
            let (lhs, rhs) = (&lhs, Right::Tensor(&rhs));
            let to = if gate.is_some() { y.clone() } else { of(y) };
            Product { lhs, rhs, rows, epilogue, before, slope, ..self }.launch(&to);
        }
    }

    /// Applies the epilogue to a computed sum, as elementwise ops.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A quarter of 256 bytes in f32 is an eighth of them in f16.
    #[test]
    fn halves_begin_where_every_adapter_can_bind_them() {
        let elements = 32;
        let middle = |size, dtype: DType| middle_of(size, elements * dtype.size());
        assert_eq!([middle(6, DType::F32), middle(7, DType::F32)], [Some(2); 2]);
        assert_eq!([middle(6, DType::F16), middle(7, DType::Bf16)], [Some(4); 2]);
        assert_eq!([middle(2, DType::F32), middle(4, DType::F16)], [None; 2]);
        assert_eq!([middle_of(9, 256), middle_of(1, 256), middle_of(256, 1)], [Some(4), None, None]);
    }
}
