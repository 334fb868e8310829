//! A weight that is made as it is read: what a product knows of a sharing kind.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::tensor::Tensor;

/// How a kernel reads a site's weight.
pub struct Load {
    /// The file `lib/FRAGMENT.wgsl`, which defines `load_site(row, col)`: columns `col .. col + 3` of one row, 0 outside.
    pub fragment: &'static str,
    /// What is stored, by the fragment's names, at the bindings 1, 2, 3; contiguous f32.
    pub tensors: Vec<(&'static str, Tensor)>,
    /// The kernel's `p.site`: rows, columns and two numbers of the kind's own.
    pub params: [u32; 4],
    /// Turns of the loops in one `load_site`.
    pub turns: usize,
    /// Values of the fragment's `const NAME: u32`.
    pub constants: Vec<(&'static str, u32)>,
}

impl Load {
    pub(crate) fn set(&self, source: Source) -> Source {
        let source = source.slot("site", self.fragment);
        self.constants.iter().fold(source, |source, (name, value)| source.u32(*name, *value))
    }

    pub(crate) fn bind<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        self.tensors.iter().fold(launch, |launch, (name, tensor)| launch.bind(*name, tensor))
    }

    /// The weight `[rows, columns]`, stored.
    pub(crate) fn expand(&self, op: &'static str, [rows, columns]: [usize; 2]) -> Tensor {
        let gpu = self.tensors[0].1.gpu();
        let y = Tensor::empty(gpu, op, [rows, columns], DType::F32);
        let grid = grid((rows * columns.div_ceil(4)).div_ceil(64));
        let source = self.set(Source::file("site_expand"));
        let launch = self.bind(Launch::new(op, &source, "main", grid)).bind_mut("y", &y);
        gpu.launch(launch.set("site", self.params).turns(self.turns).reuse(2));
        y
    }
}
