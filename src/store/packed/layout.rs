//! Brings the levels of each method into the units of packed rows.

use crate::error::{Error, Result};
use crate::share::packed::{Packing, Scales};
use crate::store::{FileDType, Shards};

/// A packed matrix on the host: its packing, rows and columns, and the words of all rows.
pub type PackedRows = (Packing, [usize; 2], Vec<u32>);

/// The tensors in the place of one weight.
pub(super) struct Source<'a> {
    pub weights: &'a Shards,
    /// What the names begin with, with the point.
    pub prefix: &'a str,
}

/// 32-bit words of a tensor of two axes.
struct Words<'a> {
    bytes: &'a [u8],
    columns: usize,
}

impl Words<'_> {
    fn at(&self, row: usize, column: usize) -> u32 {
        let at = 4 * (row * self.columns + column);
        u32::from_le_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
    }
}

/// Scales and zeros, both by row and group.
struct Pairs<'a> {
    packing: Packing,
    scale: Box<dyn Fn(usize, usize) -> f32 + 'a>,
    zero: Option<Box<dyn Fn(usize, usize) -> u32 + 'a>>,
}

impl<'a> Source<'a> {
    fn name(&self, what: &str) -> String {
        format!("{}{what}", self.prefix)
    }

    pub fn has(&self, what: &str) -> bool {
        self.weights.contains(&self.name(what))
    }

    fn wrong(&self, what: &str, message: impl std::fmt::Display) -> Error {
        Error::format(self.weights.path(), format!("tensor `{}`: {message}", self.name(what)))
    }

    /// Sizes of a tensor of two axes.
    fn shape(&self, what: &str) -> Result<[usize; 2]> {
        let shape = &self.weights.info(&self.name(what))?.shape;
        shape[..].try_into().map_err(|_| self.wrong(what, format!("{shape:?} has not two axes")))
    }

    /// The bytes of a tensor of this type and shape.
    fn bytes_of(&self, what: &str, dtype: FileDType, shape: &[usize]) -> Result<&'a [u8]> {
        let name = self.name(what);
        let info = self.weights.info(&name)?;
        if info.dtype != dtype || info.shape != shape {
            return Err(self.wrong(what, format!("{} {:?} is not {dtype} {shape:?}", info.dtype, info.shape)));
        }
        self.weights.bytes(&name)
    }

    fn words(&self, what: &str, shape: [usize; 2]) -> Result<Words<'a>> {
        Ok(Words { bytes: self.bytes_of(what, FileDType::I32, &shape)?, columns: shape[1] })
    }

    /// Reads scales of this shape, and how they are stored. Only finite ones are taken.
    fn scales(&self, what: &str, shape: [usize; 2], zeros: bool) -> Result<(Vec<f32>, Scales)> {
        let name = self.name(what);
        let (file, name) = self.weights.find(&name)?;
        let scales = match (file.expect(name, &shape)?.dtype, zeros) {
            (FileDType::F16, false) => Scales::Symmetric,
            (FileDType::BF16, false) => Scales::SymmetricBf16,
            (FileDType::F16, true) => Scales::Zero,
            (FileDType::BF16, true) => Scales::ZeroBf16,
            _ => Scales::Float,
        };
        let all = file.tensor_f32(name)?;
        if let Some(i) = all.iter().position(|x| !x.is_finite()) {
            let [r, c] = [i / shape[1], i % shape[1]];
            return Err(self.wrong(
                what,
                format!(
                    "the scale at [{r}, {c}] is {}; the file is damaged, or what wrote it failed",
                    all[i]
                ),
            ));
        }
        Ok((all, scales))
    }

    fn packing(&self, bits: u32, group: usize, columns: usize, scales: Scales) -> Result<Packing> {
        if group >= columns {
            Packing::rows(bits, columns, scales)
        } else {
            Packing::new(bits, group, scales)
        }
    }

    /// `pack-quantized` of compressed-tensors, with one of these numbers of bits.
    pub fn compressed(&self, bits: &[u32]) -> Result<PackedRows> {
        let shape = self.name("weight_shape");
        let (file, name) = self.weights.find(&shape)?;
        let shape = file.tensor_u32(name)?;
        let [rows, columns] = shape[..]
            .try_into()
            .map(|pair: [u32; 2]| pair.map(|n| n as usize))
            .map_err(|_| self.wrong("weight_shape", format!("{shape:?} has not two numbers")))?;
        let words = |bits: u32| columns.saturating_mul(bits as usize).div_ceil(32);
        let has = self.shape("weight_packed")?;
        let bits = bits.iter().copied().find(|&bits| has == [rows, words(bits)]).ok_or_else(|| {
            self.wrong(
                "weight_packed",
                format!("{has:?} has not the words of {rows} rows of {columns} with {bits:?} bits"),
            )
        })?;
        if self.has("weight_g_idx") {
            return Err(self.wrong("weight_g_idx", "columns in another order (actorder) are not read"));
        }
        let packed = self.words("weight_packed", has)?;
        let (pairs, shape) = self.compressed_pairs(bits, [rows, columns])?;
        let unit = |r: usize, unit: usize, out: &mut [u32]| {
            sequential(out, |k| {
                let at = bits as usize * unit + k;
                let left = (bits as usize * columns).saturating_sub(32 * at);
                if left == 0 { 0 } else { packed.at(r, at) & u32::MAX >> (32 - left.min(32)) }
            });
        };
        Ok((pairs.packing, shape, build(&pairs, shape, unit)))
    }

    /// `int-quantized` of compressed-tensors: signed bytes.
    pub fn bytes(&self) -> Result<PackedRows> {
        let shape = self.shape("weight")?;
        let bytes = self.bytes_of("weight", FileDType::I8, &shape)?;
        let (pairs, shape) = self.compressed_pairs(8, shape)?;
        let columns = shape[1];
        let unit = |r: usize, unit: usize, out: &mut [u32]| {
            for (c, &byte) in bytes[r * columns..][..columns].iter().enumerate().skip(32 * unit).take(32) {
                out[c % 32 / 4] |= u32::from(byte ^ 128) << (8 * (c % 4));
            }
        };
        Ok((pairs.packing, shape, build(&pairs, shape, unit)))
    }

    /// Scales and zeros of compressed-tensors, for a weight of this shape.
    fn compressed_pairs(&self, bits: u32, [rows, columns]: [usize; 2]) -> Result<(Pairs<'a>, [usize; 2])> {
        let [_, groups] = self.shape("weight_scale")?;
        if columns == 0 || groups == 0 || !columns.is_multiple_of(groups) {
            return Err(self.wrong("weight_scale", format!("{groups} groups in {columns} columns")));
        }
        let zeros = self.has("weight_zero_point");
        let (scale, scales) = self.scales("weight_scale", [rows, groups], zeros)?;
        let zero = zeros.then(|| self.compressed_zeros(bits, rows, groups)).transpose()?;
        let packing = self.packing(bits, columns / groups, columns, scales)?;
        let scale = Box::new(move |r: usize, g: usize| scale[r * groups + g]);
        Ok((Pairs { packing, scale, zero }, [rows, columns]))
    }

    /// Zeros as words down the rows, or as signed bytes.
    fn compressed_zeros(
        &self,
        bits: u32,
        rows: usize,
        groups: usize,
    ) -> Result<Box<dyn Fn(usize, usize) -> u32 + 'a>> {
        let what = "weight_zero_point";
        if self.weights.dtype(&self.name(what))? == FileDType::I8 {
            let bytes = self.bytes_of(what, FileDType::I8, &[rows, groups])?;
            let middle = 1 << (bits - 1);
            // A byte below -middle would be no level; it becomes level 0.
            return Ok(Box::new(move |r, g| (i32::from(bytes[r * groups + g] as i8) + middle).max(0) as u32));
        }
        let bits = bits as usize;
        let words = self.words(what, [(rows * bits).div_ceil(32), groups])?;
        Ok(Box::new(move |r, g| words.at(r * bits / 32, g) >> (r * bits % 32) & ((1 << bits) - 1)))
    }

    /// GPTQ. `add` is added to its stored zeros, and `ordered` weights name the group of each column.
    pub fn gptq(&self, bits: u32, group: Option<usize>, add: u32, ordered: bool) -> Result<PackedRows> {
        let [words, rows] = self.shape("qweight")?;
        let in_word = 32 / bits as usize;
        let columns = words.saturating_mul(in_word);
        let levels = self.words("qweight", [words, rows])?;
        let group = group.unwrap_or(columns).max(1);
        if ordered || self.has("g_idx") {
            self.in_order(columns, group)?;
        }
        let place = |r: usize| [r / in_word, r % in_word * bits as usize];
        let pairs = self.outputs(bits, group, [rows, columns], place, add)?;
        let unit = |r: usize, unit: usize, out: &mut [u32]| {
            sequential(out, |k| {
                let at = bits as usize * unit + k;
                if at < words { levels.at(at, r) } else { 0 }
            });
        };
        Ok((pairs.packing, [rows, columns], build(&pairs, [rows, columns], unit)))
    }

    /// Refuses columns whose groups are not one behind the other.
    fn in_order(&self, columns: usize, group: usize) -> Result<()> {
        let groups = self.name("g_idx");
        let (file, name) = self.weights.find(&groups)?;
        let groups = file.tensor_i32(name)?;
        let wrong = groups.iter().enumerate().find(|&(c, &g)| usize::try_from(g) != Ok(c / group));
        match wrong {
            _ if groups.len() != columns => {
                Err(self.wrong("g_idx", format!("{} numbers for {columns} columns", groups.len())))
            }
            Some((c, g)) => Err(self.wrong(
                "g_idx",
                format!(
                    "column {c} is in group {g}: columns in the order of activations (act order, `desc_act`) are not read; \
                     take a model without it"
                ),
            )),
            None => Ok(()),
        }
    }

    /// AWQ of version GEMM.
    pub fn awq(&self, group: Option<usize>) -> Result<PackedRows> {
        let [columns, words] = self.shape("qweight")?;
        let rows = words.saturating_mul(8);
        let levels = self.words("qweight", [columns, words])?;
        let group = group.unwrap_or(columns).max(1);
        // Place `k` of a word has output `ORDER[k]` of its eight.
        const PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
        let place = |r: usize| [r / 8, 4 * PLACES[r % 8]];
        let pairs = self.outputs(4, group, [rows, columns], place, 0)?;
        let unit = |r: usize, unit: usize, out: &mut [u32]| {
            let [word, shift] = place(r);
            for c in 32 * unit..columns.min(32 * unit + 32) {
                let level = levels.at(c, word) >> shift & 15;
                out[c % 16 / 4] |= level << (8 * (c % 4) + 4 * (c % 32 / 16));
            }
        };
        Ok((pairs.packing, [rows, columns], build(&pairs, [rows, columns], unit)))
    }

    /// Scales and zeros of GPTQ and AWQ, whose columns are outputs. `place` is the word of an output among the zeros, and its
    /// first bit there.
    fn outputs(
        &self,
        bits: u32,
        group: usize,
        [rows, columns]: [usize; 2],
        place: impl Fn(usize) -> [usize; 2] + 'a,
        add: u32,
    ) -> Result<Pairs<'a>> {
        let in_word = 32 / bits as usize;
        if !rows.is_multiple_of(in_word) {
            return Err(
                self.wrong("qweight", format!("{rows} outputs are no whole words of {in_word} zeros"))
            );
        }
        let groups = columns.div_ceil(group);
        let (scale, scales) = self.scales("scales", [groups, rows], true)?;
        let zeros = self.words("qzeros", [groups, rows / in_word])?;
        let packing = self.packing(bits, group, columns, scales)?;
        let zero = move |r: usize, g: usize| {
            let [word, shift] = place(r);
            (zeros.at(g, word) >> shift & ((1 << bits) - 1)) + add
        };
        Ok(Pairs { packing, scale: Box::new(move |r, g| scale[g * rows + r]), zero: Some(Box::new(zero)) })
    }
}

/// Writes all rows. `unit` writes the levels of 32 columns to words that are 0.
fn build(pairs: &Pairs, [rows, columns]: [usize; 2], unit: impl Fn(usize, usize, &mut [u32])) -> Vec<u32> {
    let packing = pairs.packing;
    let (words, bits) = (packing.row_words(columns), packing.bits() as usize);
    let mut all = vec![0; rows * words];
    for (r, row) in all.chunks_exact_mut(words.max(1)).enumerate() {
        let levels = &mut row[..packing.scales_at(columns)];
        levels.chunks_exact_mut(bits).enumerate().for_each(|(u, out)| unit(r, u, out));
        for g in 0..packing.groups(columns) {
            let scale = (pairs.scale)(r, g);
            let zero = pairs.zero.as_ref().map_or(packing.middle(), |zero| zero(r, g) as f32);
            let offset = match packing.scales() {
                Scales::Float => -zero * scale,
                _ => zero,
            };
            packing.write_scale(row, columns, g, [scale, offset]);
        }
    }
    all
}

/// Writes a unit of 32 columns from words that have its levels one after the other: four of 4 bits or eight of 8 bits.
fn sequential(out: &mut [u32], word: impl Fn(usize) -> u32) {
    if out.len() == 8 {
        out.iter_mut().enumerate().for_each(|(k, out)| *out = word(k));
        return;
    }
    // Columns 0 to 15 are the low nibbles of 16 bytes, and columns 16 to 31 the high ones.
    for half in 0..2 {
        let bytes = spread(word(half)) | spread(word(half + 2)) << 4;
        out[2 * half] = bytes as u32;
        out[2 * half + 1] = (bytes >> 32) as u32;
    }
}

/// Gives each of eight nibbles a byte.
fn spread(word: u32) -> u64 {
    let mut x = u64::from(word);
    x = (x | x << 16) & 0x0000_ffff_0000_ffff;
    x = (x | x << 8) & 0x00ff_00ff_00ff_00ff;
    (x | x << 4) & 0x0f0f_0f0f_0f0f_0f0f
}
