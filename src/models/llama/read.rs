//! Makes a model of named tensors.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::lm::{FeedForward, LINEARS, Lm, LmBlock, LmConfig, TokenTable};
use crate::nn::{Attention, Embedding, Linear, Mlp, Norm};
use crate::ops::product::site::Site;
use crate::ops::sequence::rope::Rope;
use crate::share::{Packed, Packing, Tied};
use crate::store::Weights;
use crate::tensor::Tensor;
use std::collections::BTreeSet;
use std::sync::Arc;

/// In which form weights are kept on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Form {
    /// As they are stored: packed, in 16 bits or in f32. To run a model.
    #[default]
    Stored,
    /// As leaves in f32. To train a model, or to convert it.
    F32,
}

/// The names that a format uses, without `.weight` and `.bias`.
pub(super) struct Names {
    pub embedding: &'static str,
    pub norm: &'static str,
    pub head: &'static str,
    pub layer: fn(usize) -> String,
    pub norms: [&'static str; 2],
    pub linears: [&'static str; 7],
    /// What is in files and is not computed with, by the ends of names.
    pub ignored: &'static [&'static str],
}

/// The linear layers' names in models of Hugging Face, in the order of [`LINEARS`].
pub(crate) const PATHS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

pub(super) const HUGGING_FACE: Names = Names {
    embedding: "model.embed_tokens",
    norm: "model.norm",
    head: "lm_head",
    layer: |l| format!("model.layers.{l}."),
    norms: ["input_layernorm", "post_attention_layernorm"],
    linears: PATHS,
    // Old files have the plain frequencies, which the configuration gives too.
    ignored: &["rotary_emb.inv_freq"],
};

/// A matrix as a file has it.
pub(super) enum Matrix {
    Packed(Packing, Vec<u32>),
    Tensor(Tensor),
}

/// Named tensors of a file or folder.
pub(super) trait Tensors {
    /// All names.
    fn names(&self) -> Vec<String>;
    /// The sizes of a tensor.
    fn shape(&self, name: &str) -> Result<Vec<usize>>;
    /// Checks the header: that the tensor is there, has these sizes and a type that is read.
    fn check(&self, name: &str, want: &[usize]) -> Result<()> {
        fits(name, &self.shape(name)?, want)
    }
    /// A matrix as it is to be used. The tensor is no leaf yet.
    fn matrix(&self, gpu: &Gpu, name: &str) -> Result<Matrix>;
    /// A vector in f32.
    fn vector(&self, gpu: &Gpu, name: &str) -> Result<Tensor>;
}

/// Checks the sizes of a tensor.
pub(super) fn fits(name: &str, found: &[usize], want: &[usize]) -> Result<()> {
    match found == want {
        true => Ok(()),
        false => Err(Error::config(format!("tensor `{name}` is {found:?}, the sizes ask for {want:?}"))),
    }
}

/// A leaf, unless the tensor is tracked: then the model trains what it was computed from.
fn leaf(x: Tensor) -> Tensor {
    if x.is_tracked() { x } else { x.requires_grad() }
}

/// Any [`Weights`], in f32.
pub(super) struct Floats<'a>(pub &'a dyn Weights);

impl Tensors for Floats<'_> {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }
    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.0.shape(name)
    }
    fn matrix(&self, gpu: &Gpu, name: &str) -> Result<Matrix> {
        Ok(Matrix::Tensor(self.0.read(gpu, name)?))
    }
    fn vector(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        self.0.read(gpu, name)
    }
}

/// Which head a model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// One of its own, which must be there.
    Own,
    /// One of its own if the file has it, else the table of token vectors.
    AsFound,
}

/// What is read, and what has been read of it.
pub(super) struct Reader<'a> {
    gpu: &'a Gpu,
    tensors: &'a dyn Tensors,
    names: &'a Names,
    config: LmConfig,
    /// Biases that must be there. Others are read if they are.
    biases: [bool; 7],
    present: BTreeSet<String>,
    /// Is told how many blocks have been read.
    watch: &'a dyn Fn(usize) -> Result<()>,
}

impl<'a> Reader<'a> {
    pub fn new(gpu: &'a Gpu, tensors: &'a dyn Tensors, names: &'a Names, config: LmConfig) -> Reader<'a> {
        let present = tensors.names().into_iter().collect();
        Reader { gpu, tensors, names, config, biases: [false; 7], present, watch: &|_| Ok(()) }
    }

    /// `watch` is told how many blocks have been read, and may end it with an error.
    pub fn watch(self, watch: &'a dyn Fn(usize) -> Result<()>) -> Reader<'a> {
        Reader { watch, ..self }
    }

    /// These linear layers of a block must have biases.
    pub fn biases(self, biases: [bool; 7]) -> Reader<'a> {
        Reader { biases, ..self }
    }

    fn fits(&self, name: &str, want: &[usize]) -> Result<()> {
        fits(name, &self.tensors.shape(name)?, want)
    }

    fn vector(&self, name: &str, size: usize) -> Result<Tensor> {
        self.fits(name, &[size])?;
        let x = self.tensors.vector(self.gpu, name)?;
        x.check()?;
        Ok(leaf(x))
    }

    fn matrix(&self, name: &str, size: [usize; 2]) -> Result<Matrix> {
        self.fits(name, &size)?;
        let matrix = self.tensors.matrix(self.gpu, name)?;
        if let Matrix::Tensor(x) = &matrix {
            x.check()?;
        }
        Ok(matrix)
    }

    fn packed(&self, name: &str, size: [usize; 2], packing: Packing, words: &[u32]) -> Result<Packed> {
        let packed = Packed::checked(self.gpu, packing, size, words)
            .map_err(|e| Error::config(format!("tensor `{name}`: {e}")))?;
        packed.error()?;
        Ok(packed)
    }

    fn linear(&self, path: &str, size: [usize; 2], biased: bool) -> Result<Linear> {
        let name = format!("{path}.weight");
        let site: Arc<dyn Site> = match self.matrix(&name, size)? {
            Matrix::Packed(packing, words) => self.packed(&name, size, packing, &words)?.shared(),
            Matrix::Tensor(x) => Tied::new(&leaf(x)).shared(),
        };
        let bias = format!("{path}.bias");
        let has = biased || self.present.contains(&bias);
        let bias = has.then(|| self.vector(&bias, size[0])).transpose()?;
        Ok(Linear::from_site(site, bias))
    }

    fn norm(&self, path: &str) -> Result<Norm> {
        let c = &self.config;
        Ok(Norm { gain: self.vector(&format!("{path}.weight"), c.width)?, bias: None, eps: c.eps })
    }

    fn table(&self) -> Result<TokenTable> {
        let (name, c) = (format!("{}.weight", self.names.embedding), &self.config);
        let size = [c.vocab, c.width];
        Ok(match self.matrix(&name, size)? {
            Matrix::Packed(packing, words) => TokenTable::Packed(self.packed(&name, size, packing, &words)?),
            Matrix::Tensor(x) => TokenTable::Stored(Embedding { table: leaf(x) }),
        })
    }

    fn layer(&self, l: usize) -> Result<LmBlock> {
        let prefix = (self.names.layer)(l);
        let sizes = self.config.linears();
        let linear = |i: usize| {
            let path = format!("{prefix}{}", self.names.linears[i]);
            self.linear(&path, sizes[i].1, self.biases[i])
        };
        let norm = |i: usize| self.norm(&format!("{prefix}{}", self.names.norms[i]));
        let (c, norm1) = (&self.config, norm(0)?);
        let [q, k, v, o] = [linear(0)?, linear(1)?, linear(2)?, linear(3)?];
        let attention = Attention { q, k, v, o, heads: c.heads, kv_heads: c.kv_heads };
        let norm2 = norm(1)?;
        let [gate, up, down] = [linear(4)?, linear(5)?, linear(6)?];
        let mlp = Mlp { gate: Some(gate), up, down, activation: c.mlp.activation() };
        Ok(LmBlock { norm1, attention, norm2, mlp: FeedForward::Dense(mlp) })
    }

    /// Reads the model. `frequencies` and a factor are those of the rotary angles.
    pub fn model(&self, head: Head, (frequencies, factor): (Vec<f64>, f64)) -> Result<Lm> {
        let c = &self.config;
        check(self.tensors, self.names, c, head, self.biases)?;
        let embedding = self.table()?;
        let mut blocks = Vec::with_capacity(c.depth.min(1024));
        for l in 0..c.depth {
            blocks.push(self.layer(l)?);
            // Uploads leave the host before the next block comes.
            self.gpu.flush()?;
            (self.watch)(l + 1)?;
        }
        let own = match head {
            Head::Own => true,
            Head::AsFound => self.present.contains(&format!("{}.weight", self.names.head)),
        };
        let head = own.then(|| self.linear(self.names.head, [c.vocab, c.width], false)).transpose()?;
        let norm = self.norm(self.names.norm)?;
        let rope = Some(Rope::with_frequencies(self.gpu, c.context, &frequencies, factor, c.pairing));
        // Biases are those that were found.
        let biased = |name: &str| blocks.iter().any(|block: &LmBlock| block.linear(name).bias.is_some());
        let config = c.clone().tied_head(head.is_none()).biases(LINEARS.map(biased));
        Ok(Lm { made: Vec::new(), config, embedding, positions: None, blocks, norm, head, rope })
    }
}

/// Checks the headers of all tensors, before anything is read: that each that is needed is there in its sizes, and that there is
/// none that is not needed, which would mean another computation. Returns the number of weights.
pub(super) fn check(
    tensors: &dyn Tensors,
    names: &Names,
    c: &LmConfig,
    head: Head,
    biases: [bool; 7],
) -> Result<usize> {
    c.check("llama")?;
    let present: BTreeSet<String> = tensors.names().into_iter().collect();
    let mut used = BTreeSet::new();
    let mut count = 0usize;
    let mut need = |name: String, want: &[usize]| {
        tensors.check(&name, want)?;
        count = count.saturating_add(want.iter().product());
        used.insert(name);
        Ok::<_, Error>(())
    };
    need(format!("{}.weight", names.embedding), &[c.vocab, c.width])?;
    let own_head = format!("{}.weight", names.head);
    if head == Head::Own || present.contains(&own_head) {
        need(own_head, &[c.vocab, c.width])?;
    }
    let head_bias = format!("{}.bias", names.head);
    if present.contains(&head_bias) {
        need(head_bias, &[c.vocab])?;
    }
    need(format!("{}.weight", names.norm), &[c.width])?;
    for l in 0..c.depth {
        let prefix = (names.layer)(l);
        for norm in names.norms {
            need(format!("{prefix}{norm}.weight"), &[c.width])?;
        }
        for ((linear, (_, size)), biased) in names.linears.iter().zip(c.linears()).zip(biases) {
            need(format!("{prefix}{linear}.weight"), &size)?;
            let bias = format!("{prefix}{linear}.bias");
            if biased || present.contains(&bias) {
                need(bias, &size[..1])?;
            }
        }
    }
    let known = |name: &&String| used.contains(*name) || names.ignored.iter().any(|end| name.ends_with(end));
    let left: Vec<&String> = present.iter().filter(|name| !known(name)).collect();
    match left.first() {
        None => Ok(count),
        Some(first) => Err(Error::config(format!(
            "tensor `{first}` (of {} such) is in the file and in no model of this kind that is computed; the file needs \
             another program",
            left.len()
        ))),
    }
}

impl Lm {
    /// Reads weights with the names of Hugging Face's Llama models, such as [`crate::store::Shards`], as leaves in f32. Those that are
    /// tracked, as [`crate::store::Tracked`] has them, stay what they are.
    /// `config` supplies what they do not contain ([`LmConfig::from_json`]). Weights without a head have the table of token
    /// vectors for one, and biases are read if they are there, because `config` says nothing of either.
    /// [`Published`](super::Published) checks both against `config.json`.
    ///
    /// # Errors
    /// [`Error::Format`] when a tensor is missing, [`Error::Config`] when it has another shape, or when there is a tensor that
    /// these models do not have; when the device fails.
    pub fn from_weights(gpu: &Gpu, weights: &dyn Weights, config: LmConfig) -> Result<Lm> {
        config.check("llama")?;
        let frequencies = config.rope_scaling.frequencies(config.head_dim(), config.rope_base);
        Reader::new(gpu, &Floats(weights), &HUGGING_FACE, config).model(Head::AsFound, frequencies)
    }
}
