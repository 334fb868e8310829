//! Rounded matrices in the layouts of packed matrices, of GGUF and of compressed-tensors.

use super::round::Rounded;
use super::search::{Form, Rounding, Stored};
use crate::error::{Error, Result};
use crate::share::packed::{Packing, Scales};
use crate::store::gguf::GgufType;
use crate::store::{Entry, FileDType};
use half::{bf16, f16};
use serde_json::{Value, json};
use std::collections::BTreeMap;

impl Rounded {
    /// The words of packed rows and their packing, which decode to [`Rounded::values`] bit for bit.
    ///
    /// # Errors
    /// [`Error::Config`] for bits and groups that [`Packing`] does not have.
    pub fn to_packing(&self) -> Result<(Packing, Vec<u32>)> {
        let [rows, columns] = self.shape;
        let scales = match (self.rounding.form, self.rounding.stored) {
            (Form::Symmetric, Stored::F16) => Scales::Symmetric,
            (Form::Symmetric, Stored::BF16) => Scales::SymmetricBf16,
            (Form::Affine, Stored::F16) => Scales::Affine,
            (Form::Zero, Stored::F16) => Scales::Zero,
            (Form::Zero, Stored::BF16) => Scales::ZeroBf16,
            _ => Scales::Float,
        };
        let packing = match self.rounding.group {
            Some(group) => Packing::new(self.rounding.bits, group, scales)?,
            None => Packing::rows(self.rounding.bits, columns, scales)?,
        };
        let (words, groups) = (packing.row_words(columns), self.groups());
        let mut all = vec![0; rows * words];
        for (r, row) in all.chunks_exact_mut(words.max(1)).enumerate() {
            packing.write_levels(&self.levels[r * columns..][..columns], row);
            for g in 0..groups {
                let at = r * groups + g;
                let offset = match scales {
                    Scales::Zero | Scales::ZeroBf16 => f32::from(self.zeros[at]),
                    _ => self.offsets[at],
                };
                packing.write_scale(row, columns, g, [self.scales[at], offset]);
            }
        }
        Ok((packing, all))
    }

    /// The blocks of a GGUF tensor and its type, which decode to [`Rounded::values`].
    ///
    /// # Errors
    /// [`Error::Config`] when no type of GGUF has this rounding.
    pub fn to_gguf(&self) -> Result<(GgufType, Vec<u8>)> {
        let whole = self.group() == 32 && self.shape[1].is_multiple_of(32);
        let kind = self.rounding.gguf_type().filter(|_| whole).ok_or_else(|| {
            Error::config(format!(
                "quant: {} bits in groups of {}, {:?} with scales in {:?}, in rows of {}: GGUF has groups of 32 with scales in \
                 F16, of 4 or 5 bits Symmetric or Affine, or of 8 bits Symmetric",
                self.rounding.bits,
                self.group(),
                self.rounding.form,
                self.rounding.stored,
                self.shape[1]
            ))
        })?;
        let mut all = Vec::with_capacity(self.levels.len() / 32 * kind.block()[1]);
        for (b, levels) in self.levels.as_chunks::<32>().0.iter().enumerate() {
            all.extend(f16::from_f32(self.scales[b]).to_le_bytes());
            if self.rounding.form == Form::Affine {
                all.extend(f16::from_f32(self.offsets[b]).to_le_bytes());
            }
            match self.rounding.bits {
                8 => all.extend(levels.map(|q| q ^ 128)),
                bits => {
                    if bits == 5 {
                        let high = levels.iter().enumerate().map(|(c, q)| u32::from(q >> 4) << c);
                        all.extend(high.sum::<u32>().to_le_bytes());
                    }
                    all.extend((0..16).map(|c| levels[c] & 15 | levels[c + 16] << 4));
                }
            }
        }
        Ok((kind, all))
    }

    /// The tensors of compressed-tensors' format `pack-quantized`, as a folder of Hugging Face has them in the place of
    /// `PREFIX.weight`: levels in 32-bit words, scales, the zeros of [`Form::Zero`], and the shape. The settings that belong
    /// to them are [`Rounding::compressed_config`].
    ///
    /// # Errors
    /// As [`Rounding::compressed_config`], and for groups that do not divide the columns.
    pub fn to_compressed(&self, prefix: &str) -> Result<Vec<Entry<'static>>> {
        self.rounding.check_compressed()?;
        let columns = self.shape[1];
        if columns == 0 || !columns.is_multiple_of(self.group()) {
            return Err(Error::config(format!(
                "quant: `{prefix}`: groups of {} do not divide {columns} columns, as compressed-tensors needs",
                self.group()
            )));
        }
        let mut parts = self.compressed_parts();
        parts.insert(SHAPE, shape_bytes(self.shape));
        let entry = |(what, dtype, shape): (&'static str, FileDType, Vec<usize>)| {
            Entry::bytes(format!("{prefix}.{what}"), dtype, &shape, parts.remove(what).unwrap_or_default())
        };
        Ok(self.rounding.compressed_layout(self.shape).into_iter().map(entry).collect())
    }

    /// The bytes of the tensors of [`Rounding::compressed_layout`] by their names, but for the shape. Those of some rows can be
    /// appended to those of the rows above them, if these are a multiple of 8, because zeros run down the rows.
    pub(super) fn compressed_parts(&self) -> BTreeMap<&'static str, Vec<u8>> {
        let (columns, bits) = (self.shape[1].max(1), self.rounding.bits as usize);
        let of = |x: &f32| match self.rounding.stored {
            Stored::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
            Stored::BF16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
            Stored::F32 => x.to_le_bytes().to_vec(),
        };
        let levels = self.levels.chunks_exact(columns).flat_map(|row| sequence(row, bits)).collect();
        let mut all = BTreeMap::from([(PACKED, levels), (SCALE, self.scales.iter().flat_map(of).collect())]);
        if self.rounding.form == Form::Zero {
            all.insert(ZERO_POINT, self.compressed_zeros());
        }
        all
    }

    /// Zeros in words that run down the rows.
    fn compressed_zeros(&self) -> Vec<u8> {
        let (bits, groups) = (self.rounding.bits as usize, self.groups());
        let mut words = vec![0u32; (self.shape[0] * bits).div_ceil(32) * groups];
        for (i, &zero) in self.zeros.iter().enumerate() {
            let (r, g) = (i / groups, i % groups);
            words[r * bits / 32 * groups + g] |= u32::from(zero) << (r * bits % 32);
        }
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}

/// The tensors that compressed-tensors has in the place of `weight`.
const PACKED: &str = "weight_packed";
const SCALE: &str = "weight_scale";
pub(super) const SHAPE: &str = "weight_shape";
const ZERO_POINT: &str = "weight_zero_point";

/// The bytes of `weight_shape`.
pub(super) fn shape_bytes(shape: [usize; 2]) -> Vec<u8> {
    shape.iter().flat_map(|&n| (n as i64).to_le_bytes()).collect()
}

impl Stored {
    /// The type of scales in a safetensors file.
    pub(super) fn dtype(self) -> FileDType {
        match self {
            Stored::F16 => FileDType::F16,
            Stored::BF16 => FileDType::BF16,
            Stored::F32 => FileDType::F32,
        }
    }
}

/// Levels of 4 or 8 bits one after the other, filled up with 0 to whole words.
fn sequence(levels: &[u8], bits: usize) -> Vec<u8> {
    let mut all: Vec<u8> = match bits {
        8 => levels.to_vec(),
        _ => levels.chunks(2).map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4).collect(),
    };
    all.resize(all.len().next_multiple_of(4), 0);
    all
}

impl Rounding {
    /// The type of GGUF that has these levels and scales.
    pub(super) fn gguf_type(&self) -> Option<GgufType> {
        if self.group != Some(32) || self.stored != Stored::F16 {
            return None;
        }
        match (self.bits, self.form) {
            (4, Form::Symmetric) => Some(GgufType::Q4_0),
            (4, Form::Affine) => Some(GgufType::Q4_1),
            (5, Form::Symmetric) => Some(GgufType::Q5_0),
            (5, Form::Affine) => Some(GgufType::Q5_1),
            (8, Form::Symmetric) => Some(GgufType::Q8_0),
            _ => None,
        }
    }

    /// The tensors in the place of a matrix in a folder: the ends of their names, types and sizes, for what
    /// [`Rounding::check_compressed`] allows.
    pub(super) fn compressed_layout(
        &self,
        [rows, columns]: [usize; 2],
    ) -> Vec<(&'static str, FileDType, Vec<usize>)> {
        let words = |levels: usize| (levels * self.bits as usize).div_ceil(32);
        let groups = self.group.map_or(1, |group| columns / group);
        let mut all = vec![
            (PACKED, FileDType::I32, vec![rows, words(columns)]),
            (SCALE, self.stored.dtype(), vec![rows, groups]),
            (SHAPE, FileDType::I64, vec![2]),
        ];
        if self.form == Form::Zero {
            all.push((ZERO_POINT, FileDType::I32, vec![words(rows), groups]));
        }
        all
    }

    fn check_compressed(&self) -> Result<()> {
        if matches!(self.bits, 4 | 8) && self.form != Form::Affine {
            return Ok(());
        }
        Err(Error::config(format!(
            "quant: {} bits {:?}: folders have levels of 4 or 8 bits, Symmetric or Zero",
            self.bits, self.form
        )))
    }

    /// The object `quantization_config` of `config.json` that belongs to [`Rounded::to_compressed`]. `ignore` are the names of
    /// linear layers that are not rounded, such as `lm_head`.
    ///
    /// # Errors
    /// [`Error::Config`] for other bits than 4 and 8, and for [`Form::Affine`].
    pub fn compressed_config(&self, ignore: &[&str]) -> Result<Value> {
        compressed_config(&[(*self, vec!["Linear".into()])], ignore)
    }
}

/// The object `quantization_config` of layers that are rounded in several ways. Targets and `ignore` are names of modules,
/// classes of them, or regular expressions behind `re:`.
pub(super) fn compressed_config(
    groups: &[(Rounding, Vec<String>)],
    ignore: &[impl AsRef<str>],
) -> Result<Value> {
    let mut all = serde_json::Map::new();
    for (i, (rounding, targets)) in groups.iter().enumerate() {
        rounding.check_compressed()?;
        let strategy = if rounding.group.is_some() { "group" } else { "channel" };
        let settings = json!({
            "targets": targets,
            "weights": {
                "num_bits": rounding.bits,
                "type": "int",
                "symmetric": rounding.form == Form::Symmetric,
                "strategy": strategy,
                "group_size": rounding.group,
                "dynamic": false,
            },
        });
        all.insert(format!("group_{i}"), settings);
    }
    Ok(json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": all,
        "ignore": ignore.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::scratch::Folder;
    use crate::quant::round;
    use crate::store::gguf::repack;
    use crate::store::{QuantConfig, Shards, save};

    fn weights(count: usize) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 0.37).sin() * (1.0 + (i as f32 * 0.011).cos()) + 0.1).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        // The sign of zero does not count: a fused multiply-add gives 0 where a negative scale times 0 is -0.
        values.iter().map(|x| (x + 0.0).to_bits()).collect()
    }

    #[test]
    fn packed_rows_have_the_values() {
        let w = weights(5 * 80);
        for form in [Form::Symmetric, Form::Affine, Form::Zero] {
            for stored in [Stored::F16, Stored::BF16, Stored::F32] {
                for bits_of_level in [2, 3, 4, 5, 6, 8] {
                    for group in [Some(16), Some(32), Some(64), None] {
                        let rounding =
                            Rounding { group, ..Rounding::new(bits_of_level, form).stored(stored) };
                        let rounded = round("w", &w, [5, 80], &rounding).unwrap();
                        let (packing, words) = rounded.to_packing().unwrap();
                        assert_eq!(
                            bits(&packing.decode(&words, 80)),
                            bits(&rounded.values()),
                            "{rounding:?}"
                        );
                    }
                }
            }
        }
        let odd = |rounding| round("w", &w, [5, 80], &rounding).unwrap().to_packing();
        assert!(
            odd(Rounding::new(7, Form::Zero)).is_err()
                && odd(Rounding::new(4, Form::Zero).group(20)).is_err()
        );
    }

    #[test]
    fn blocks_have_the_values() {
        let w = weights(4 * 96);
        for (bits_of_level, form) in [
            (4, Form::Symmetric),
            (4, Form::Affine),
            (5, Form::Symmetric),
            (5, Form::Affine),
            (8, Form::Symmetric),
        ] {
            let rounded = round("w", &w, [4, 96], &Rounding::new(bits_of_level, form)).unwrap();
            let (kind, bytes) = rounded.to_gguf().unwrap();
            let packing = kind.packing().unwrap();
            assert_eq!((packing, repack(kind, &bytes, 96)), rounded.to_packing().unwrap());
        }
        let none = round("w", &w, [4, 96], &Rounding::new(4, Form::Zero)).unwrap().to_gguf().unwrap_err();
        assert!(none.to_string().contains("4 bits in groups of 32, Zero with scales in F16"), "{none}");
        assert!(round("w", &w, [8, 48], &Rounding::new(4, Form::Affine)).unwrap().to_gguf().is_err());
    }

    /// The reader of such folders was compared with the package compressed-tensors.
    #[test]
    fn folders_have_the_values() {
        let (w, folder) = (weights(9 * 96), Folder::new("quant-folder"));
        for form in [Form::Symmetric, Form::Zero] {
            for stored in [Stored::F16, Stored::BF16, Stored::F32] {
                for rounding in [
                    Rounding::new(4, form).stored(stored),
                    Rounding::new(4, form).stored(stored).rows(),
                    Rounding::new(8, form).stored(stored).group(48),
                ] {
                    let rounded = round("w", &w, [9, 96], &rounding).unwrap();
                    let path = folder.join("m.safetensors");
                    save(&path, rounded.to_compressed("model.w").unwrap(), &[].into()).unwrap();
                    let config =
                        QuantConfig::from_json(&rounding.compressed_config(&["lm_head"]).unwrap()).unwrap();
                    let read =
                        config.packed(&Shards::open(&path).unwrap(), "model.w.weight").unwrap().unwrap();
                    let (packing, words) = rounded.to_packing().unwrap();
                    assert_eq!(read, (packing, [9, 96], words), "{rounding:?}");
                }
            }
        }
        let refused =
            |rounding: Rounding| round("w", &w, [9, 96], &rounding).unwrap().to_compressed("w").is_err();
        assert!(refused(Rounding::new(4, Form::Affine)) && refused(Rounding::new(5, Form::Zero)));
        assert!(refused(Rounding::new(4, Form::Zero).group(64)));
    }
}
