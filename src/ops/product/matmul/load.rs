//! A weight that is computed as it is read: the part of a sharing kind that a product knows.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::stored;
use crate::tensor::Tensor;

/// How a kernel reads a site's weight: a WGSL fragment, and what it reads.
///
/// The fragment defines `fn load_site(row: u32, col: u32) -> vec4<f32>`, which returns the weights of one row at the columns
/// `col .. col + 3`, and 0 outside of the matrix. `col` is a multiple of 4, and may be beyond the last column, as `row` may be
/// beyond the last row. It binds its stored tensors in group 0 at 1, 2 and 3, and reads rows, columns and two numbers of its own
/// from `site_numbers()`, a `vec4<u32>`. `hash(x, seed)` and `hash2(x, y, seed)` are there. Every kernel for products uses the
/// same fragment, so its functions and constants have names of their own.
pub struct Load {
    pub(crate) fragment: &'static str,
    /// The fragment's text, or `None` for the file `lib/FRAGMENT.wgsl`.
    pub(crate) wgsl: Option<&'static str>,
    /// The stored tensors, by the fragment's names, at the bindings 1, 2, 3. They are contiguous and of 32 bits.
    pub(crate) tensors: Vec<(&'static str, Tensor)>,
    /// The kernel's `p.site`: rows, columns and two numbers that the kind defines.
    pub(crate) params: [u32; 4],
    /// Turns of the loops in one call of `load_site`.
    pub(crate) turns: usize,
    /// Values for the fragment's `const NAME: u32`.
    pub(crate) constants: Vec<(&'static str, u32)>,
    /// The file `lib/PRIVATE.wgsl`, which adds what this site has beside the shared weight, for fragments that provide for
    /// it.
    pub(crate) private: Option<&'static str>,
    /// Bits of a weight as stored, if a kernel for few rows can read the fragment in units of 32 columns (`matmul_packed`).
    pub(crate) packed: Option<f64>,
    /// Whether a caller outside of the crate has changed it. Then it is compiled with bounds checks, whoever wrote the fragment.
    pub(crate) changed: bool,
}

impl Load {
    /// A file's fragment with these tensors and numbers, without loops, constants or a private part.
    pub(crate) fn new(
        fragment: &'static str,
        tensors: Vec<(&'static str, Tensor)>,
        params: [u32; 4],
    ) -> Load {
        let (turns, constants, private, packed) = (0, vec![], None, None);
        Load { fragment, wgsl: None, tensors, params, turns, constants, private, packed, changed: false }
    }

    /// The load of a stored matrix, contiguous and f32.
    pub(crate) fn stored(theta: Tensor) -> Load {
        let [rows, columns] = [theta.shape()[0], theta.shape()[1]].map(|n| n as u32);
        Load::new("site_tied", vec![("theta", theta)], [rows, columns, 0, 0])
    }

    /// A fragment of your own text, with the tensors that it reads, by its names for them, the weight's rows and columns, and
    /// two numbers for `site_numbers().zw`. Errors call it `name`. It is compiled with bounds checks.
    ///
    /// The tensors are cast to f32 if they have floats, made contiguous and taken out of the graph, because gradients come from
    /// [`Site::reduce`](super::super::site::Site::reduce).
    ///
    /// # Panics
    /// When there is none or are more than three tensors, or a size exceeds 32 bits.
    #[track_caller]
    pub fn wgsl(
        name: &'static str,
        text: &'static str,
        tensors: &[(&'static str, &Tensor)],
        [rows, columns]: [usize; 2],
        numbers: [u32; 2],
    ) -> Load {
        let count = tensors.len();
        assert!((1..=3).contains(&count), "{name}: a fragment reads one to three tensors, not {count}");
        let size = [rows, columns].map(|n| u32::try_from(n).ok());
        let [Some(rows), Some(columns)] = size else { panic!("{name}: [{rows}, {columns}] exceeds 32 bits") };
        let dense = |x: &Tensor| {
            let x = x.detach();
            if x.dtype().is_float() { x.cast(DType::F32).contiguous() } else { x.contiguous() }
        };
        let tensors = tensors.iter().map(|(name, x)| (*name, dense(x))).collect();
        Load { wgsl: Some(text), ..Load::new(name, tensors, [rows, columns, numbers[0], numbers[1]]) }
    }

    /// States the most turns that the loops in one call of `load_site` make. Without loops, none.
    pub fn turns(self, turns: usize) -> Load {
        Load { turns, changed: true, ..self }
    }

    /// The weight's `[rows, columns]`, as the fragment knows them.
    pub(crate) fn size(&self) -> [usize; 2] {
        [self.params[0], self.params[1]].map(|n| n as usize)
    }

    /// Sets the fragment's `const NAME: u32 = ..u;`, which stands in column 0. Each value makes a kernel of its own.
    pub fn constant(mut self, name: &'static str, value: u32) -> Load {
        self.constants.push((name, value));
        Load { changed: true, ..self }
    }

    /// Whether the fragment provides for a private part, and has none yet.
    pub(crate) fn takes_private(&self) -> bool {
        let own = self.wgsl.is_none() && ["site_tied", "site_packed"].contains(&self.fragment);
        own && self.private.is_none()
    }

    /// Adds what the file `lib/PRIVATE.wgsl` computes to the weight. It reads `tensors`, contiguous and f32, at the bindings 2
    /// and 3, and `site_numbers().zw`. Its loops make so many turns.
    pub(crate) fn with_private(
        mut self,
        private: &'static str,
        tensors: impl IntoIterator<Item = (&'static str, Tensor)>,
        numbers: [u32; 2],
        turns: usize,
    ) -> Load {
        debug_assert!(self.takes_private(), "{}: no place for {private}", self.fragment);
        self.tensors.extend(tensors);
        let ([rows, columns, ..], [z, w]) = (self.params, numbers);
        let (params, turns) = ([rows, columns, z, w], self.turns + turns);
        Load { params, turns, private: Some(private), packed: None, ..self }
    }

    /// Adds `scale b a` to the weight: `a [rank, columns]` and `b [rows, rank]`, contiguous and f32.
    pub(crate) fn with_low_rank(self, [a, b]: [&Tensor; 2], scale: f32) -> Load {
        let (rank, tensors) = (a.shape()[0], [("lora_a", a.clone()), ("lora_b", b.clone())]);
        self.with_private("private_low_rank", tensors, [rank as u32, scale.to_bits()], rank)
    }

    pub(crate) fn set(&self, source: Source) -> Source {
        let source = match self.wgsl {
            None => source.slot("site", self.fragment),
            Some(text) => source.slot_text("site", self.fragment, text),
        };
        let source = if self.changed { source.foreign() } else { source };
        let source = self.private.into_iter().fold(source, |source, private| source.slot("private", private));
        self.constants.iter().fold(source, |source, (name, value)| source.u32(*name, *value))
    }

    pub(crate) fn bind<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        self.tensors.iter().fold(launch, |launch, (name, tensor)| launch.bind(*name, tensor))
    }

    /// Materialises the weight `[rows, columns]` in this type, which has floats.
    pub(crate) fn expand(&self, op: &'static str, [rows, columns]: [usize; 2], dtype: DType) -> Tensor {
        let (own, gpu) = (self.size(), self.tensors[0].1.gpu());
        assert!(
            own == [rows, columns],
            "{op}: its load is of a weight {own:?}, and its size is [{rows}, {columns}]"
        );
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
