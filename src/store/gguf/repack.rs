//! Rearranges the blocks of GGUF into the rows of [`Packing`](crate::share::packed::Packing), without decoding them.
//!
//! The bits of levels and scales stay as they are and only move, many at once in a word of the host.

use super::types::GgufType;

/// The parts of a row of packed words.
struct Row<'a> {
    low: &'a mut [u32],
    high: &'a mut [u32],
    scales: &'a mut [u32],
    /// Blocks of the row.
    blocks: usize,
}

/// Rearranges whole rows of so many columns into the rows of `kind.packing()`.
///
/// # Panics
/// When the type is one of floats, when a row is no whole number of blocks, or the bytes are no whole number of rows.
#[track_caller]
pub fn repack(kind: GgufType, bytes: &[u8], columns: usize) -> Vec<u32> {
    let packing = kind.packing().unwrap_or_else(|| panic!("repack: {kind} is not packed"));
    let [elements, size] = kind.block();
    assert!(columns.is_multiple_of(elements), "repack: {columns} columns in blocks of {elements} of {kind}");
    let (blocks, words) = (columns / elements, packing.row_words(columns));
    if blocks == 0 {
        return Vec::new();
    }
    let row_bytes = blocks * size;
    assert!(bytes.len().is_multiple_of(row_bytes), "repack: {} bytes in rows of {row_bytes}", bytes.len());
    let mut all = vec![0; bytes.len() / row_bytes * words];
    let [low, high] = packing.parts();
    let units = columns / 32;
    for (row, bytes) in all.chunks_exact_mut(words).zip(bytes.chunks_exact(row_bytes)) {
        let (low, rest) = row.split_at_mut(units * low);
        let (high, scales) = rest.split_at_mut(units * high);
        write_row(kind, bytes, Row { low, high, scales, blocks });
    }
    all
}

fn write_row(kind: GgufType, bytes: &[u8], row: Row) {
    match kind {
        GgufType::F32 | GgufType::F16 | GgufType::BF16 => {}
        GgufType::Q8_0 => q8_0(bytes, row),
        GgufType::Q4_0 => q4_0(bytes, row),
        GgufType::Q4_1 => q4_1(bytes, row),
        GgufType::Q5_0 => q5_0(bytes, row),
        GgufType::Q5_1 => q5_1(bytes, row),
        GgufType::Q2K => q2_k(bytes, row),
        GgufType::Q3K => q3_k(bytes, row),
        GgufType::Q4K => q4_k(bytes, row),
        GgufType::Q5K => q5_k(bytes, row),
        GgufType::Q6K => q6_k(bytes, row),
    }
}

/// The four bytes at `at` as a word.
#[inline]
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The eight bytes at `at` as a word.
#[inline]
fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

/// Writes the 16 bits at `at` as half `g` of the words.
#[inline]
fn half(words: &mut [u32], g: usize, bytes: &[u8], at: usize) {
    words[g / 2] |= u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]])) << (16 * (g % 2));
}

/// Copies bytes to as many words as there are.
#[inline]
fn copy(words: &mut [u32], bytes: &[u8]) {
    bytemuck::cast_slice_mut::<u32, u8>(words).copy_from_slice(bytes);
}

/// A signed byte is its level less 128, so only the sign bit changes.
fn q8_0(bytes: &[u8], row: Row) {
    let (blocks, units) = (bytes.as_chunks::<34>().0, row.low.as_chunks_mut::<8>().0);
    for (g, (block, unit)) in blocks.iter().zip(units).enumerate() {
        half(row.scales, g, block, 0);
        copy(unit, &block[2..]);
        unit.iter_mut().for_each(|w| *w ^= 0x8080_8080);
    }
}

fn q4_0(bytes: &[u8], row: Row) {
    let (blocks, units) = (bytes.as_chunks::<18>().0, row.low.as_chunks_mut::<4>().0);
    for (g, (block, unit)) in blocks.iter().zip(units).enumerate() {
        half(row.scales, g, block, 0);
        copy(unit, &block[2..]);
    }
}

fn q4_1(bytes: &[u8], row: Row) {
    let (blocks, units) = (bytes.as_chunks::<20>().0, row.low.as_chunks_mut::<4>().0);
    for ((block, unit), scales) in blocks.iter().zip(units).zip(row.scales) {
        *scales = word(block, 0);
        copy(unit, &block[4..]);
    }
}

fn q5_0(bytes: &[u8], row: Row) {
    let (blocks, units) = (bytes.as_chunks::<22>().0, row.low.as_chunks_mut::<4>().0);
    for (g, (block, unit)) in blocks.iter().zip(units).enumerate() {
        half(row.scales, g, block, 0);
        row.high[g] = word(block, 2);
        copy(unit, &block[6..]);
    }
}

fn q5_1(bytes: &[u8], row: Row) {
    let (blocks, units) = (bytes.as_chunks::<24>().0, row.low.as_chunks_mut::<4>().0);
    for (g, (block, unit)) in blocks.iter().zip(units).enumerate() {
        row.scales[g] = word(block, 0);
        row.high[g] = word(block, 4);
        copy(unit, &block[8..]);
    }
}

fn q2_k(bytes: &[u8], row: Row) {
    let (scales, low) = (row.scales.as_chunks_mut::<5>().0, row.low.as_chunks_mut::<16>().0);
    for ((block, scales), low) in bytes.as_chunks::<84>().0.iter().zip(scales).zip(low) {
        scales[0] = word(block, 80);
        copy(&mut scales[1..], &block[..16]);
        twos(&block[16..80], low);
    }
}

fn q3_k(bytes: &[u8], row: Row) {
    let (scales, halves) = row.scales.split_at_mut(4 * row.blocks);
    let scales = scales.as_chunks_mut::<4>().0.iter_mut();
    let parts = row.low.as_chunks_mut::<16>().0.iter_mut().zip(row.high.as_chunks_mut::<8>().0);
    for (b, ((block, scales), (low, high))) in
        bytes.as_chunks::<110>().0.iter().zip(scales).zip(parts).enumerate()
    {
        half(halves, b, block, 108);
        *scales = signed_scales(&block[96..108]);
        twos(&block[32..96], low);
        *high = planes(&block[..32]);
    }
}

fn q4_k(bytes: &[u8], row: Row) {
    let (scales, low) = (row.scales.as_chunks_mut::<5>().0, row.low.as_chunks_mut::<32>().0);
    for ((block, scales), low) in bytes.as_chunks::<144>().0.iter().zip(scales).zip(low) {
        pairs(block, scales);
        for chunk in 0..4 {
            fours(&block[16 + 32 * chunk..], 0, &mut low[8 * chunk..]);
            fours(&block[16 + 32 * chunk..], 4, &mut low[8 * chunk + 4..]);
        }
    }
}

fn q5_k(bytes: &[u8], row: Row) {
    let scales = row.scales.as_chunks_mut::<5>().0.iter_mut();
    let parts = row.low.as_chunks_mut::<32>().0.iter_mut().zip(row.high.as_chunks_mut::<8>().0);
    for ((block, scales), (low, high)) in bytes.as_chunks::<176>().0.iter().zip(scales).zip(parts) {
        pairs(block, scales);
        *high = planes(&block[16..48]);
        for chunk in 0..4 {
            fours(&block[48 + 32 * chunk..], 0, &mut low[8 * chunk..]);
            fours(&block[48 + 32 * chunk..], 4, &mut low[8 * chunk + 4..]);
        }
    }
}

fn q6_k(bytes: &[u8], row: Row) {
    let (scales, halves) = row.scales.split_at_mut(4 * row.blocks);
    let scales = scales.as_chunks_mut::<4>().0.iter_mut();
    let parts = row.low.as_chunks_mut::<32>().0.iter_mut().zip(row.high.as_chunks_mut::<16>().0);
    for (b, ((block, scales), (low, high))) in
        bytes.as_chunks::<210>().0.iter().zip(scales).zip(parts).enumerate()
    {
        half(halves, b, block, 208);
        copy(scales, &block[192..208]);
        // A half of 128 columns has its units 0 and 1 in the low nibbles of 64 bytes, and 2 and 3 in the high ones.
        for unit in 0..8 {
            let from = 64 * (unit / 4) + 32 * (unit % 2);
            fours(&block[from..], 4 * (unit / 2 % 2), &mut low[4 * unit..]);
        }
        twos(&block[128..192], high);
    }
}

/// Writes the unit whose columns are at the same four bits of 32 bytes: columns 16 to 31 go above columns 0 to 15.
#[inline]
fn fours(bytes: &[u8], shift: usize, unit: &mut [u32]) {
    for (i, out) in unit.iter_mut().enumerate().take(4) {
        let [first, second] = [word(bytes, 4 * i), word(bytes, 16 + 4 * i)];
        *out = first >> shift & 0x0f0f_0f0f | (second >> shift & 0x0f0f_0f0f) << 4;
    }
}

/// Writes 8 units of 2 bits. Unit `u` is at the same two bits of 32 bytes, and each 8 of them go to the next two bits.
#[inline]
fn twos(bytes: &[u8], units: &mut [u32; 16]) {
    for (u, unit) in units.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let (from, shift) = (32 * (u / 4), 2 * (u % 4));
        let mut all = 0;
        for k in 0..4 {
            all |= (long(bytes, from + 8 * k) >> shift & 0x0303_0303_0303_0303) << (2 * k);
        }
        *unit = [all as u32, (all >> 32) as u32];
    }
}

/// Word `u` of the result has bit `u` of each of 32 bytes.
#[inline]
fn planes(bytes: &[u8]) -> [u32; 8] {
    let mut all = [0; 8];
    for k in 0..4 {
        let rows = transpose(long(bytes, 8 * k)).to_le_bytes();
        for (word, row) in all.iter_mut().zip(rows) {
            *word |= u32::from(row) << (8 * k);
        }
    }
    all
}

/// Transposes a matrix of 8 by 8 bits, whose rows are bytes, by exchanging squares of 1, 2 and 4 bits (Warren, Hacker's
/// Delight, 7-3).
#[inline]
fn transpose(mut x: u64) -> u64 {
    for (shift, mask) in [(7, 0x00aa_00aa_00aa_00aa), (14, 0x0000_cccc_0000_cccc), (28, 0xf0f0_f0f0)] {
        let moved = (x ^ x >> shift) & mask;
        x ^= moved ^ moved << shift;
    }
    x
}

/// Writes `d` and `m` of Q4_K and Q5_K, and the two bytes of each group.
#[inline]
fn pairs(block: &[u8], scales: &mut [u32; 5]) {
    scales[0] = word(block, 0);
    // Bytes of a word are groups. The third word has the lower four bits of groups 4 to 7, and the upper two bits of the
    // first two words the others.
    let [first, second, third] = [4, 8, 12].map(|at| word(block, at));
    let s = [first & 0x3f3f_3f3f, third & 0x0f0f_0f0f | first >> 2 & 0x3030_3030];
    let t = [second & 0x3f3f_3f3f, third >> 4 & 0x0f0f_0f0f | second >> 2 & 0x3030_3030];
    for g in 0..8 {
        let [s, t] = [s, t].map(|all| all[g / 4] >> (8 * (g % 4)) & 0xff);
        scales[1 + g / 2] |= (s | t << 8) << (16 * (g % 2));
    }
}

/// The 16 scales of Q3_K as signed bytes.
#[inline]
fn signed_scales(bytes: &[u8]) -> [u32; 4] {
    let high = word(bytes, 8);
    std::array::from_fn(|i| {
        let low = word(bytes, 4 * (i % 2)) >> (4 * (i / 2)) & 0x0f0f_0f0f;
        let level = low | (high >> (2 * i) & 0x0303_0303) << 4;
        // Each byte is 0 to 63, and 32 is taken from it. With 128 added none borrows from the next one.
        ((level | 0x8080_8080) - 0x2020_2020) ^ 0x8080_8080
    })
}
