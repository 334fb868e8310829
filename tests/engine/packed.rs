//! The laws of packed weights: the device unpacks the bits that the host does, products are those with the unpacked weight, and what
//! is trained beside them gets its gradients.

use crate::support::{download, gpu, other_kernels};
use std::sync::Arc;
use tiebeam::nn::Linear;
use tiebeam::share::packed::{format::drawn, packings};
use tiebeam::share::{Packed, Packing, Scales, Site, Tied};
use tiebeam::{DType, Rng, Tensor};

/// Random words: any levels and any scales that are finite, subnormal ones and zeros among them.
fn any_words(packing: Packing, [rows, columns]: [usize; 2], seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    let mut words: Vec<u32> = drawn(packing, [rows, columns], seed);
    let row_words = packing.row_words(columns);
    let special = [0.0f32, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, 1.0 / 3.0];
    for row in words.chunks_exact_mut(row_words) {
        match packing.scales() {
            // The upper level is in f16: its bits below the exponent of infinity.
            Scales::Pairs | Scales::Nibbles | Scales::Signed => {
                let levels = columns.div_ceil(32) * packing.bits() as usize;
                row[levels..].fill_with(|| rng.below(1 << 32) as u32 & 0x7bff_7bff);
            }
            _ => {
                for g in 0..columns.div_ceil(packing.group()) {
                    let pick = |rng: &mut Rng| special[rng.below(special.len())];
                    let scale =
                        if rng.below(2) == 0 { pick(&mut rng) } else { rng.below(1000) as f32 * 1e-4 };
                    let offset = match packing.scales() {
                        Scales::Zero | Scales::ZeroBf16 => rng.below(300) as f32 - 20.0,
                        _ => pick(&mut rng),
                    };
                    packing.write_scale(row, columns, g, [scale, offset]);
                }
            }
        }
    }
    words
}

/// Columns that fill units and groups, and others, as far as a packing has them.
fn columns_of(packing: Packing) -> Vec<usize> {
    match packing.scales() {
        Scales::Pairs | Scales::Nibbles | Scales::Signed => vec![256, 768],
        _ => vec![1, 31, 32, 67, 100, 256],
    }
}

/// The bits of a weight. The sign of a zero may be either: compilers may turn `scale q - scale 8` into `scale (q - 8)`, which
/// changes nothing else because all of it is exact.
fn bits(weight: f32) -> u32 {
    if weight == 0.0 { 0 } else { weight.to_bits() }
}

#[test]
fn the_device_unpacks_the_bits_that_the_host_does() {
    for (name, packing) in packings() {
        for columns in columns_of(packing) {
            let rows = 5;
            let words = any_words(packing, [rows, columns], 3);
            let want = packing.decode(&words, columns);
            let site = Packed::new(gpu(), packing, [rows, columns], &words).unwrap();
            let got = site.expand().to_vec::<f32>().unwrap();
            // A scale of 24 bits times a level is not exact, and a fused multiply-add may round it otherwise.
            if packing.scales() == Scales::Float {
                let off = |(got, want): (&f32, &f32)| (got - want).abs() / want.abs().max(1e-3);
                assert!(got.iter().zip(&want).map(off).all(|off| off < 1e-5), "{name} {columns}");
                continue;
            }
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_eq!(bits(*got), bits(*want), "{name} {columns}: element {i}: {got} for {want}");
            }
            let ids = Tensor::from_slice(gpu(), &[4u32, 0, 4], [3]);
            let rows = site.rows(&ids).to_vec::<f32>().unwrap();
            let want = [4, 0, 4].iter().flat_map(|r| &want[r * columns..][..columns]);
            assert!(rows.iter().map(|w| bits(*w)).eq(want.map(|w| bits(*w))), "{name} {columns}: rows");
        }
    }
}

/// `scale q + offset` rounds once in f32, so that it does not matter whether a compiler fuses the two.
#[test]
fn a_fused_multiply_add_changes_no_bit() {
    for (name, packing) in packings() {
        // Scales in f32 have more bits than the product of a scale and a level can keep.
        if packing.scales() == Scales::Float {
            continue;
        }
        for columns in columns_of(packing) {
            let words = any_words(packing, [7, columns], 5);
            let row_words = packing.row_words(columns);
            for row in words.chunks_exact(row_words) {
                for c in 0..columns {
                    let [scale, offset] = packing.scale(row, columns, c);
                    let q = packing.level(row, columns, c) as f32;
                    let exact = f64::from(scale) * f64::from(q);
                    assert_eq!(f64::from(scale * q), exact, "{name}: {scale} times {q} is not exact in f32");
                    assert_eq!((scale * q + offset).to_bits(), scale.mul_add(q, offset).to_bits(), "{name}");
                }
            }
        }
    }
}

#[test]
fn every_level_makes_a_round_trip() {
    for (name, packing) in packings() {
        let columns = columns_of(packing).pop().unwrap();
        let top = 1usize << packing.bits();
        for shift in [0, 1, top / 2] {
            let levels: Vec<u8> = (0..columns).map(|c| ((c * 5 + shift) % top) as u8).collect();
            let mut row = vec![u32::MAX; packing.row_words(columns)];
            packing.write_levels(&levels, &mut row);
            let back: Vec<u8> = (0..columns).map(|c| packing.level(&row, columns, c) as u8).collect();
            assert_eq!(back, levels, "{name}");
        }
    }
}

/// A dot product of length K is within `4 u sqrt(K)` of the exact one, relative to the norm of its terms.
#[test]
fn products_are_those_with_the_unpacked_weight() {
    let mut rng = Rng::new(9);
    for (name, packing) in packings() {
        let columns = if packing.group() > 16 { 768 } else { 256 };
        for (rows, gpu) in
            [1, 2, 5, 8, 9, 64, 65].into_iter().flat_map(|m| [(m, gpu()), (m, other_kernels())])
        {
            let n = 13;
            let words = drawn(packing, [n, columns], 2);
            let weight = packing.decode(&words, columns);
            let mut x = vec![0.0f32; rows * columns];
            rng.fill_normal(&mut x);
            let site = Packed::new(gpu, packing, [n, columns], &words).unwrap().shared();
            let input = Tensor::from_slice(gpu, &x, [rows, columns]);
            let y = download(&Linear::from_site(site, None).forward(&input));
            for (i, got) in y.iter().enumerate() {
                let terms = || {
                    let pairs = x[i / n * columns..][..columns].iter().zip(&weight[i % n * columns..]);
                    pairs.map(|(a, b)| f64::from(*a) * f64::from(*b))
                };
                let (want, norm) = (terms().sum::<f64>(), terms().map(|t| t * t).sum::<f64>().sqrt());
                let bound = 4.0 * DType::F32.roundoff() * (columns as f64).sqrt() * norm;
                assert!(
                    (got - want).abs() <= bound,
                    "{name}, {rows} rows: {got} for {want}, bound {bound:e}"
                );
            }
        }
    }
}

#[test]
fn a_packed_weight_is_frozen_and_passes_gradients_on() {
    let packing = Packing::new(4, 32, Scales::Affine).unwrap();
    let words = drawn(packing, [6, 64], 4);
    let site = Packed::new(gpu(), packing, [6, 64], &words).unwrap();
    let dense = Tied::new(&site.expand()).shared();
    let packed = site.clone().shared();
    assert!(packed.leaves().is_empty() && packed.stored().is_none());
    for rows in [3, 70] {
        let data: Vec<f32> = (0..rows * 64).map(|i| (i % 7) as f32 - 3.0).collect();
        let of = |weight: &Arc<dyn Site>| {
            let x = Tensor::from_slice(gpu(), &data, [rows, 64]).requires_grad();
            let y = x.linear(weight, Default::default());
            let grads = y.mul(&y).sum_all().backward().unwrap();
            download(grads.get(&x).unwrap())
        };
        assert_eq!(of(&packed), of(&dense), "{rows} rows: sums of whole numbers are exact");
    }
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let says = |result: tiebeam::Result<Packing>, what: &str| {
        let error = result.expect_err("refused").to_string();
        assert!(error.contains(what), "{error}");
    };
    says(Packing::new(7, 32, Scales::Affine), "levels of 7 bits");
    says(Packing::new(4, 24, Scales::Affine), "groups of 24 columns");
    says(Packing::new(4, 0, Scales::Affine), "groups of 0");
    says(Packing::new(4, 64, Scales::Pairs), "has groups of 32");
    let refused = |packing, size, words: &[u32]| {
        Packed::new(gpu(), packing, size, words).err().expect("refused").to_string()
    };
    let pairs = Packing::new(4, 32, Scales::Pairs).unwrap();
    assert!(refused(pairs, [1, 64], &[0; 64]).contains("blocks of 256"));
    let affine = Packing::new(4, 32, Scales::Affine).unwrap();
    assert!(refused(affine, [2, 64], &[0; 3]).contains("needs 12 words a row, got 3"));
    assert!(refused(affine, [2, 0], &[]).contains("got 0"));
    for (wrong, says) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        for pair in [[wrong, 0.0], [1.0, wrong]] {
            let mut words = drawn(affine, [3, 64], 1);
            affine.write_scale(&mut words[2 * 12..], 64, 1, pair);
            let error = refused(affine, [3, 64], &words);
            assert!(error.contains("row 2 at column 32") && error.contains(says), "{error}");
        }
    }
}

/// Packed rows take no more than 1.05 times the blocks of a file, from a width of 768 columns on: rows are filled up to
/// whole vectors.
#[test]
fn no_type_takes_much_more_than_its_blocks() {
    let blocks = [
        ("Q4_0", 4.5),
        ("Q4_1", 5.0),
        ("Q5_0", 5.5),
        ("Q5_1", 6.0),
        ("Q8_0", 8.5),
        ("Q2_K", 2.625),
        ("Q3_K", 3.4375),
        ("Q4_K", 4.5),
        ("Q5_K", 5.5),
        ("Q6_K", 6.5625),
    ];
    for (name, packing) in packings() {
        let Some((_, bits)) = blocks.iter().find(|(of, _)| *of == name) else { continue };
        for columns in [768, 1536, 2048, 4096] {
            let share = packing.bits_a_weight(columns) / bits;
            assert!(share <= 1.05, "{name} at {columns} columns: {share:.3} of its blocks");
        }
        if packing.fits(name, 576).is_ok() {
            assert!(packing.bits_a_weight(576) <= 1.05 * bits, "{name} at the width of SmolLM2-135M");
        }
    }
}
