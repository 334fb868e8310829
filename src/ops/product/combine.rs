//! Weights of many layers from one dictionary of atoms, in one pass forward and one backward.

use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Input};
use crate::ops::float;
use crate::shape::Shape;
use crate::tape::{self, Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

/// The most sums of `dc` that a thread keeps in registers.
const SUMS: usize = 64;
/// The most vectors that a thread of the backward pass takes.
const SPAN: usize = 4096;
/// The most atoms that a thread keeps in registers. With more atoms, the products are matmuls.
const MOST_ATOMS: usize = 32;

fn source(atoms: usize, layers: usize, accumulate: bool) -> Source {
    let sizes = Source::file("combine").u32("ATOMS", atoms as u32).u32("LAYERS", layers as u32);
    sizes.bool("ACCUMULATE", accumulate)
}

#[derive(Clone, Copy)]
struct Sizes {
    layers: usize,
    atoms: usize,
    /// Elements per atom.
    size: usize,
}

impl Sizes {
    fn kernel(&self) -> bool {
        self.atoms <= MOST_ATOMS && self.size.is_multiple_of(4)
    }

    /// Returns a launch for the layers from `first` on. `threads` is the number of threads of the backward pass.
    fn launch<'a>(
        &self,
        source: &'a Source,
        entry: &'a str,
        grid: [u32; 3],
        first: usize,
        threads: usize,
    ) -> Launch<'a> {
        Launch::new("combine", source, entry, grid)
            .set("width", self.size / 4)
            .set("layers", self.layers)
            .set("first", first)
            .set("threads", threads)
    }

    fn forward(&self, atoms: &Tensor, coefficients: &Tensor) -> Tensor {
        let w = Tensor::empty(atoms.gpu(), "combine", [self.layers, self.size], DType::F32);
        let width = self.size / 4;
        let grid = grid(width.div_ceil(64));
        let source = source(self.atoms, 1, false);
        let launch = self.launch(&source, "forward", grid, 0, 0).bind("d", atoms).bind("c", coefficients);
        atoms.gpu().launch(launch.bind_mut("w", &w).turns(self.layers));
        w
    }

    /// Number of workgroups of the backward pass: twice as many as keep the device busy, to hide the memory's latency.
    /// Each thread leaves one number per coefficient to be added up later, so the number of workgroups is limited to keep
    /// these below a quarter of the operands' bytes.
    fn groups(&self, class: &DeviceClass) -> usize {
        let width = self.size / 4;
        let bytes = (4 * (self.atoms + self.layers) * self.size) as f64;
        let affordable = bytes / 4.0 / (64 * 8 * self.layers * self.atoms) as f64;
        let busy = (2 * class.in_flight() / 64).min(affordable as usize).max(1);
        width.div_ceil(64).min(busy.max(width.div_ceil(64 * SPAN))).min(65535)
    }

    /// Writes the gradients of the atoms to `dd`, and returns those of the coefficients.
    fn backward(&self, d: &Tensor, c: &Tensor, dw: &Tensor, dd: &Tensor, accumulate: bool) -> Tensor {
        let gpu = d.gpu();
        let width = self.size / 4;
        let groups = self.groups(gpu.class());
        let threads = groups * 64;
        let at_once = (SUMS / self.atoms).max(1);
        let mut sums = Vec::new();
        for first in (0..self.layers).step_by(at_once) {
            let layers = at_once.min(self.layers - first);
            let dc = Tensor::empty(gpu, "combine", [layers * self.atoms, threads], DType::F32);
            let source = source(self.atoms, layers, accumulate || first > 0);
            let launch = self.launch(&source, "backward", grid(groups), first, threads).bind("d", d);
            let launch = launch.bind("c", c).bind("dw", dw).bind_mut("dd", dd).bind_mut("dc", &dc);
            gpu.launch(launch.turns(width.div_ceil(threads)));
            sums.push(dc.sum(1));
        }
        let all = if sums.len() == 1 {
            sums.remove(0)
        } else {
            Tensor::concat(&sums.iter().collect::<Vec<_>>(), 0)
        };
        all.reshape([self.layers, self.atoms])
    }
}

impl Tensor {
    /// Returns `w[l] = sum_s c[l, s] atoms[s]` for every layer `l`. `self` is the atoms `[S, ..]`, `coefficients` is
    /// `[L, S]`, and each of the `L` results has the shape of an atom. One pass reads `S` atoms and writes `L` weights.
    ///
    /// Derivatives, in one pass as well: `datoms[s] = sum_l c[l, s] dw[l]`, `dc[l, s] = <dw[l], atoms[s]>`.
    /// Source: MASA, arXiv 2508.04581.
    ///
    /// # Panics
    /// When the shapes do not fit, or a type is not a float. Floats of 16 bits are converted to f32.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let atoms = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]); // 2 atoms of shape [2]
    /// let coefficients = Tensor::from_slice(&gpu, &[1f32, 0.0, 10.0, 1.0], [2, 2]);
    /// let weights = atoms.combine(&coefficients);
    /// assert_eq!(weights[0].to_vec::<f32>()?, [1.0, 2.0]);
    /// assert_eq!(weights[1].to_vec::<f32>()?, [13.0, 24.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn combine(&self, coefficients: &Tensor) -> Vec<Tensor> {
        same_gpu("combine", &[self, coefficients]);
        let (d, c) = (self.shape(), coefficients.shape());
        assert!(
            d.len() >= 2 && c.len() == 2 && c[1] == d[0] && d.count() > 0 && c[0] > 0,
            "combine: atoms {d}, coefficients {c}; they must be [S, ..] and [L, S]"
        );
        if [self, coefficients].iter().any(|x| x.dtype() != DType::F32) {
            return float("combine", self).combine(&float("combine", coefficients));
        }
        let shape = Shape::new(&d[1..]);
        let sizes = Sizes { layers: c[0], atoms: d[0], size: shape.count() };
        let part = |w: &Tensor, l: usize| w.slice(0, l..l + 1).reshape(shape);
        if !sizes.kernel() {
            let w = coefficients.matmul_f32(&self.reshape([sizes.atoms, sizes.size]));
            return (0..sizes.layers).map(|l| part(&w, l)).collect();
        }
        let (atoms, coefficients_now) = (self.detach().contiguous(), coefficients.detach().contiguous());
        let w = sizes.forward(&atoms, &coefficients_now);
        let mut layers: Vec<Tensor> = (0..sizes.layers).map(|l| part(&w, l)).collect();
        let op = || {
            let (atoms, coefficients) = (Saved::new(&atoms), Saved::new(&coefficients_now));
            Box::new(Combine { sizes, atoms, coefficients }) as Box<dyn Op>
        };
        tape::record_parts(&mut layers, &[self, coefficients], op);
        layers
    }
}

struct Combine {
    sizes: Sizes,
    atoms: Saved,
    coefficients: Saved,
}

impl Op for Combine {
    fn name(&self) -> &'static str {
        "combine"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let (d, c) = (self.atoms.get("combine"), self.coefficients.get("combine"));
        let sizes = &self.sizes;
        let Some(any) = dy.iter().flatten().next() else { return };
        let dw = sink.joined(dy, sizes.layers).unwrap_or_else(|| {
            let zeros = Tensor::zeros(any.gpu(), *any.shape());
            let all: Vec<&Tensor> =
                (0..sizes.layers).map(|l| dy.get(l).and_then(Option::as_ref).unwrap_or(&zeros)).collect();
            Tensor::stack(&all, 0)
        });
        let mut dc = None;
        if sink.needs(0) {
            sink.add_with(0, |into| {
                let (dd, accumulate) = into.output(d.gpu(), "combine", *d.shape());
                dc = Some(sizes.backward(d, c, &dw, &dd, accumulate));
                dd
            });
        } else {
            let dd = Tensor::empty(d.gpu(), "combine", *d.shape(), DType::F32);
            dc = Some(sizes.backward(d, c, &dw, &dd, false));
        }
        if let Some(dc) = dc.filter(|_| sink.needs(1)) {
            sink.add(1, dc);
        }
    }
}

fn combine64(atoms: &Array, c: &Array) -> Array {
    let [layers, count] = [c.shape[0], c.shape[1]];
    let size = atoms.data.len() / count;
    let mut shape = atoms.shape.to_vec();
    shape[0] = layers;
    Array::from_fn(&shape[..], |i| {
        (0..count).map(|s| c.data[i / size * count + s] * atoms.data[s * size + i % size]).sum()
    })
}

pub(super) fn cases() -> Vec<Case> {
    let stack = |x: &[Tensor]| Tensor::stack(&x[0].combine(&x[1]).iter().collect::<Vec<_>>(), 0);
    let mut all = Vec::new();
    for (layers, atoms, a, b) in [
        (1, 1, 1, 4),
        (6, 2, 3, 4),
        (5, 3, 7, 5),
        (12, 8, 4, 8),
        (3, 33, 2, 4),
        (4, 2, 64, 4),
        (2, 2, 17, 68),
    ] {
        let inputs = vec![Input::normal([atoms, a, b]), Input::normal([layers, atoms])];
        all.push(Case::new(format!("{layers} layers of {atoms} atoms {a} {b}"), inputs, stack, |x| {
            combine64(&x[0], &x[1])
        }));
    }
    // Not every layer is used: the gradient of an unused one is zero.
    let inputs = vec![Input::normal([2, 16, 4]), Input::normal([4, 2])];
    let some = |x: &[Tensor]| {
        let w = x[0].combine(&x[1]);
        w[1].mul(&w[3])
    };
    all.push(Case::new("two layers of four", inputs, some, |x| {
        let w = combine64(&x[0], &x[1]);
        Array::from_fn([16, 4], |i| w.data[64 + i] * w.data[192 + i])
    }));
    all
}
