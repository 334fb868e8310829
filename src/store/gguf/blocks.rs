//! Decodes blocks to f32, by the formulas of ggml
//! (<https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c>). This is the reference for packed matrices.

use super::types::GgufType;
use half::{bf16, f16};

/// Appends the elements of whole blocks to `out`.
pub(super) fn decode(kind: GgufType, bytes: &[u8], out: &mut Vec<f32>) {
    let [_, size] = kind.block();
    for block in bytes.chunks_exact(size) {
        expand(kind, block, out);
    }
}

/// Appends the elements of one block: `w = scale q + minimum`, with the scales of the element's group.
fn expand(kind: GgufType, block: &[u8], out: &mut Vec<f32>) {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    match kind {
        GgufType::F32 => out.push(f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
        GgufType::F16 => out.push(half(0)),
        GgufType::BF16 => out.push(bf16::from_le_bytes([block[0], block[1]]).to_f32()),
        GgufType::Q8_0 => out.extend(block[2..34].iter().map(|&q| half(0) * f32::from(q as i8))),
        GgufType::Q4_0 => out.extend(nibbles(&block[2..]).map(|q| half(0) * (f32::from(q) - 8.0))),
        GgufType::Q4_1 => out.extend(nibbles(&block[4..]).map(|q| half(0) * f32::from(q) + half(2))),
        GgufType::Q5_0 => {
            out.extend(fives(&block[2..6], &block[6..]).map(|q| half(0) * (f32::from(q) - 16.0)));
        }
        GgufType::Q5_1 => {
            out.extend(fives(&block[4..8], &block[8..]).map(|q| half(0) * f32::from(q) + half(2)));
        }
        GgufType::Q2K => {
            let scale = |g: usize| [half(80) * f32::from(block[g] & 15), half(82) * f32::from(block[g] >> 4)];
            affine(16, scale, |c| twos(&block[16..80], c), out);
        }
        GgufType::Q3K => {
            let scales = signed_scales(&block[96..108]);
            let level = |c: usize| {
                let high = block[c % 32] >> (c / 32) & 1;
                (twos(&block[32..96], c) | high << 2) as i8 - 4
            };
            signed(|g| half(108) * f32::from(scales[g]), level, out);
        }
        GgufType::Q4K => {
            let scale = |g| pair(half(0), half(2), &block[4..16], g);
            affine(32, scale, |c| fours(&block[16..144], c), out);
        }
        GgufType::Q5K => {
            let scale = |g| pair(half(0), half(2), &block[4..16], g);
            let level = |c: usize| fours(&block[48..176], c) | (block[16 + c % 32] >> (c / 32) & 1) << 4;
            affine(32, scale, level, out);
        }
        GgufType::Q6K => {
            // Two halves of 128 elements. A byte of `ql` has elements of quarters 0 and 2, or 1 and 3.
            let level = |c: usize| {
                let (h, quarter, i) = (c / 128, c / 32 % 4, c % 32);
                let low = block[64 * h + 32 * (quarter % 2) + i] >> (4 * (quarter / 2)) & 15;
                let high = block[128 + 32 * h + i] >> (2 * quarter) & 3;
                (low | high << 4) as i8 - 32
            };
            signed(|g| half(208) * f32::from(block[192 + g] as i8), level, out);
        }
    }
}

/// Low nibbles are elements 0 to 15, high ones 16 to 31.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    let bytes = bytes[..16].iter();
    bytes.clone().map(|b| b & 15).chain(bytes.map(|b| b >> 4))
}

/// [`nibbles`] with bit `c` of `high` above element `c`.
fn fives(high: &[u8], low: &[u8]) -> impl Iterator<Item = u8> {
    nibbles(low).enumerate().map(|(c, q)| q | (high[c / 8] >> (c % 8) & 1) << 4)
}

/// Element `c` of 256 with 4 bits: of 64 elements, the first 32 are low nibbles and the others high ones.
fn fours(bytes: &[u8], c: usize) -> u8 {
    bytes[32 * (c / 64) + c % 32] >> (4 * (c / 32 % 2)) & 15
}

/// Element `c` of 256 with 2 bits: of 128 elements, each 32 are at the same bits of 32 bytes.
fn twos(bytes: &[u8], c: usize) -> u8 {
    bytes[32 * (c / 128) + c % 32] >> (2 * (c / 32 % 4)) & 3
}

/// Scale and minimum of group `g` of Q4_K and Q5_K.
fn pair(d: f32, m: f32, bytes: &[u8], g: usize) -> [f32; 2] {
    let [s, t] = pair_bytes(bytes, g);
    [d * f32::from(s), m * f32::from(t)]
}

/// The numbers of 6 bits of group `g`: the first 8 bytes have those of groups 0 to 3 and the upper two bits of the others,
/// whose lower four bits follow.
fn pair_bytes(bytes: &[u8], g: usize) -> [u8; 2] {
    if g < 4 {
        return [bytes[g] & 63, bytes[4 + g] & 63];
    }
    let low = bytes[4 + g];
    [low & 15 | bytes[g - 4] >> 6 << 4, low >> 4 | bytes[g] >> 6 << 4]
}

/// The scales of Q3_K: four lower bits in 8 bytes and two upper bits in 4 bytes, less 32.
fn signed_scales(bytes: &[u8]) -> [i8; 16] {
    std::array::from_fn(|g| {
        let low = bytes[g % 8] >> (4 * (g / 8)) & 15;
        let high = bytes[8 + g % 4] >> (2 * (g / 4)) & 3;
        (low | high << 4) as i8 - 32
    })
}

fn affine(group: usize, scale: impl Fn(usize) -> [f32; 2], level: impl Fn(usize) -> u8, out: &mut Vec<f32>) {
    for g in 0..256 / group {
        let [scale, minimum] = scale(g);
        out.extend((0..group).map(|i| scale * f32::from(level(group * g + i)) - minimum));
    }
}

fn signed(scale: impl Fn(usize) -> f32, level: impl Fn(usize) -> i8, out: &mut Vec<f32>) {
    for g in 0..16 {
        let scale = scale(g);
        out.extend((0..16).map(|i| scale * f32::from(level(16 * g + i))));
    }
}
