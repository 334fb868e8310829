//! A weight that is computed as it is read: the part of a sharing kind that a product knows.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::stored;
use crate::tensor::Tensor;

/// How a kernel reads a site's weight.
pub struct Load {
    /// The file `lib/FRAGMENT.wgsl`, which defines `load_site(row, col)`: columns `col .. col + 3` of one row, and 0
    /// outside. `col` is a multiple of 4.
    pub fragment: &'static str,
    /// The stored tensors, by the fragment's names, at the bindings 1, 2, 3. They are contiguous and of 32 bits.
    pub tensors: Vec<(&'static str, Tensor)>,
    /// The kernel's `p.site`: rows, columns and two numbers that the kind defines.
    pub params: [u32; 4],
    /// Turns of the loops in one call of `load_site`.
    pub turns: usize,
    /// Values for the fragment's `const NAME: u32`.
    pub constants: Vec<(&'static str, u32)>,
    /// The file `lib/PRIVATE.wgsl`, which adds what this site has beside the shared weight, for fragments that provide for
    /// it.
    pub private: Option<&'static str>,
    /// Bits of a weight as stored, if a kernel for few rows can read the fragment in units of 32 columns (`matmul_packed`).
    pub packed: Option<f64>,
}

impl Load {
    /// A fragment with these tensors and numbers, without loops, constants or a private part.
    pub fn new(fragment: &'static str, tensors: Vec<(&'static str, Tensor)>, params: [u32; 4]) -> Load {
        Load { fragment, tensors, params, turns: 0, constants: vec![], private: None, packed: None }
    }

    /// Adds `scale b a` to the weight: `a [rank, columns]` and `b [rows, rank]`, contiguous and f32.
    pub(crate) fn with_low_rank(mut self, [a, b]: [&Tensor; 2], scale: f32) -> Load {
        let rank = a.shape()[0];
        self.tensors.extend([("lora_a", a.clone()), ("lora_b", b.clone())]);
        let [rows, columns, ..] = self.params;
        let params = [rows, columns, rank as u32, scale.to_bits()];
        Load { params, turns: self.turns + rank, private: Some("private_low_rank"), packed: None, ..self }
    }

    pub(crate) fn set(&self, source: Source) -> Source {
        let source = source.slot("site", self.fragment);
        let source = self.private.into_iter().fold(source, |source, private| source.slot("private", private));
        self.constants.iter().fold(source, |source, (name, value)| source.u32(*name, *value))
    }

    pub(crate) fn bind<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        self.tensors.iter().fold(launch, |launch, (name, tensor)| launch.bind(*name, tensor))
    }

    /// Materialises the weight `[rows, columns]` in this type, which has floats.
    pub(crate) fn expand(&self, op: &'static str, [rows, columns]: [usize; 2], dtype: DType) -> Tensor {
        let gpu = self.tensors[0].1.gpu();
        // Pairs of 16 bits are written in whole vectors only.
        let whole = columns.is_multiple_of(4);
        if dtype.is_half() && !whole {
            return self.expand(op, [rows, columns], DType::F32).cast(dtype);
        }
        let y = Tensor::empty(gpu, op, [rows, columns], dtype);
        let grid = grid((rows * columns.div_ceil(4)).div_ceil(64));
        let source = self.set(Source::file("site_expand"));
        let source = if whole { source.slot("pieces", "site_pieces_of_4") } else { source };
        let source = stored::set(source, &[("out", dtype)]);
        let launch = self.bind(Launch::new(op, &source, "main", grid)).bind_mut("y", &y);
        gpu.launch(launch.set("site", self.params).turns(self.turns).reuse(2));
        y
    }
}
