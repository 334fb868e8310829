//! Robust weight signatures: the change of the weights by training on corrupted data, stored in few bits. It can be added to
//! a model, scaled, and removed. Source: Cai et al., arXiv 2302.12480; the projection is our reading of it.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::merge::Weights;
use crate::store::{Entry, File, FileDType, save};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

/// `robust - (<robust, clean> / <clean, clean>) clean` for some tensors. Each row is rounded to whole multiples of its own step.
#[derive(Clone, Debug, PartialEq)]
pub struct Signature {
    bits: u32,
    parts: BTreeMap<String, Part>,
}

#[derive(Clone, Debug, PartialEq)]
struct Part {
    shape: Vec<usize>,
    /// One step per row.
    steps: Vec<f32>,
    /// Multiples of the steps, `bits` each, offset so that none is negative, low bits first.
    packed: Vec<u8>,
}

impl Signature {
    /// Computes the signature of the tensors that `keep` accepts, at 2 to 8 bits per number. The shallow layers hold most of it.
    ///
    /// # Errors
    /// When a tensor is missing in one of the models or has another shape there, or a file or the device fails.
    ///
    /// # Panics
    /// When `bits` is outside `2..=8`.
    #[track_caller]
    pub fn extract(
        gpu: &Gpu,
        clean: &dyn Weights,
        robust: &dyn Weights,
        keep: impl Fn(&str) -> bool,
        bits: u32,
    ) -> Result<Signature> {
        assert!((2..=8).contains(&bits), "signature: {bits} bits; use 2 to 8");
        let mut parts = BTreeMap::new();
        for name in clean.names().into_iter().filter(|name| keep(name)) {
            let (c, r) = (clean.read(gpu, &name)?, robust.read(gpu, &name)?);
            if c.shape() != r.shape() {
                let message = format!(
                    "signature: `{name}` is {} in one model and {} in the other",
                    c.shape(),
                    r.shape()
                );
                return Err(Error::config(message));
            }
            let zero = Tensor::scalar(gpu, 0.0);
            let length = c.square().sum_all();
            let along = zero.where_mask(&length.eq(&zero), &r.mul(&c).sum_all().div(&length));
            let values = r.sub(&c.mul(&along)).to_vec::<f32>()?;
            parts.insert(name, Part::round(c.shape(), &values, bits));
        }
        Ok(Signature { bits, parts })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.parts.values().map(|part| part.packed.len() + 4 * part.steps.len()).sum()
    }

    /// Returns a tensor of the signature, or `None` if it has no tensor of this name.
    pub fn tensor(&self, gpu: &Gpu, name: &str) -> Option<Tensor> {
        let part = self.parts.get(name)?;
        Some(Tensor::from_slice(gpu, &part.values(self.bits), &part.shape[..]))
    }

    /// Writes the signature as safetensors. The file is replaced atomically.
    ///
    /// # Errors
    /// When the file cannot be written; an old file is left intact.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let entries = self.parts.iter().flat_map(|(name, part)| {
            let (n, rows) = (part.packed.len(), part.steps.len());
            [
                Entry::bytes(format!("{name}{PACKED}"), FileDType::U8, &[n], &part.packed[..]),
                Entry::f32(format!("{name}{STEPS}"), &[rows], &part.steps),
            ]
        });
        let shapes = self.parts.iter().map(|(name, part)| (name.clone(), part.shape.clone()));
        let shapes = serde_json::json!(shapes.collect::<BTreeMap<String, Vec<usize>>>()).to_string();
        let notes = [(BITS.to_string(), self.bits.to_string()), (SHAPES.to_string(), shapes)].into();
        save(path, entries, &notes)
    }

    /// Reads a file of [`Signature::save`].
    ///
    /// # Errors
    /// When the file cannot be read or is not a signature.
    pub fn load(path: impl AsRef<Path>) -> Result<Signature> {
        let file = File::open(path.as_ref())?;
        let wrong = || Error::format(file.path(), "no valid signature");
        let text = |key: &str| file.metadata().get(key).ok_or_else(wrong);
        let bits: u32 = text(BITS)?.parse().map_err(|_| wrong())?;
        let shapes: BTreeMap<String, Vec<usize>> =
            serde_json::from_str(text(SHAPES)?).map_err(|_| wrong())?;
        let mut parts = BTreeMap::new();
        for (name, shape) in shapes {
            let steps = file.tensor_f32(&format!("{name}{STEPS}"))?;
            let packed = file.bytes(&format!("{name}{PACKED}"))?.to_vec();
            let n = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size)).ok_or_else(wrong)?;
            let bytes = n.checked_mul(bits as usize).map(|n| n.div_ceil(8));
            if !(2..=8).contains(&bits) || bytes != Some(packed.len()) || steps.len() != rows(&shape) {
                return Err(wrong());
            }
            parts.insert(name, Part { shape, steps, packed });
        }
        Ok(Signature { bits, parts })
    }
}

const PACKED: &str = "/packed";
const STEPS: &str = "/steps";
const BITS: &str = "tiebeam.signature.bits";
const SHAPES: &str = "tiebeam.signature.shapes";

fn rows(shape: &[usize]) -> usize {
    if shape.len() > 1 { shape[0] } else { 1 }
}

impl Part {
    fn round(shape: &[usize], values: &[f32], bits: u32) -> Part {
        let most = (1i32 << (bits - 1)) - 1;
        let mut steps = Vec::new();
        let mut packed = vec![0u8; (values.len() * bits as usize).div_ceil(8)];
        for (r, row) in values.chunks((values.len() / rows(shape)).max(1)).enumerate() {
            let step = row.iter().fold(0.0f32, |m, x| m.max(x.abs())) / most as f32;
            for (i, x) in row.iter().enumerate() {
                let level = if step > 0.0 { (x / step).round() as i32 } else { 0 };
                let (word, at) = ((level + most) as u16, (r * row.len() + i) * bits as usize);
                let [low, high] = (word << (at % 8)).to_le_bytes();
                packed[at / 8] |= low;
                if high > 0 {
                    packed[at / 8 + 1] |= high;
                }
            }
            steps.push(step);
        }
        // An empty tensor has no rows to iterate over, but `load` expects its steps.
        steps.resize(rows(shape), 0.0);
        Part { shape: shape.to_vec(), steps, packed }
    }

    fn values(&self, bits: u32) -> Vec<f32> {
        let most = (1i32 << (bits - 1)) - 1;
        let n: usize = self.shape.iter().product();
        let row = (n / self.steps.len().max(1)).max(1);
        let level = |i: usize| {
            let at = i * bits as usize;
            let next = self.packed.get(at / 8 + 1).copied().unwrap_or(0);
            let word = u16::from_le_bytes([self.packed[at / 8], next]) >> (at % 8);
            i32::from(word & ((1 << bits) - 1)) - most
        };
        (0..n).map(|i| level(i) as f32 * self.steps[i / row]).collect()
    }
}

/// Weights with scaled signatures, which are added when a tensor is read.
pub struct Patched<'a> {
    /// The weights without signatures.
    pub weights: &'a dyn Weights,
    /// The signatures and their scales.
    pub signatures: Vec<(&'a Signature, f32)>,
}

impl Weights for Patched<'_> {
    fn names(&self) -> Vec<String> {
        self.weights.names()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.weights.shape(name)
    }

    fn is_float(&self, name: &str) -> bool {
        self.weights.is_float(name)
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        let mut x = self.weights.read(gpu, name)?;
        for (signature, scale) in &self.signatures {
            let Some(part) = signature.tensor(gpu, name) else { continue };
            if part.shape() != x.shape() {
                let message =
                    format!("signature: `{name}` is {} and the model has {}", part.shape(), x.shape());
                return Err(Error::config(message));
            }
            x = x.add(&part.scale(*scale));
        }
        Ok(x)
    }
}
