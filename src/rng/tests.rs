//! Tests of the draws against distributions and published vectors.

use super::*;

/// `P(N(0,1) > z)` for `z >= 0`: series below 3, Laplace's continued fraction above.
fn upper_tail(z: f64) -> f64 {
    let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if z < 3.0 {
        let (mut term, mut sum, mut k) = (z, z, 1.0);
        while term > 1e-18 * sum {
            k += 2.0;
            term *= z * z / k;
            sum += term;
        }
        0.5 - density * sum
    } else {
        let fraction = (1..200).rev().fold(z, |below, k| z + f64::from(k) / below);
        density / fraction
    }
}

#[test]
fn philox_gives_the_published_answers() {
    let known = [
        ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
        (
            [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
            [0xa4093822, 0x299f31d0],
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
        ),
    ];
    for (counter, key, words) in known {
        assert_eq!(philox(counter, key), words, "counter {counter:x?} key {key:x?}");
    }
}

/// The table is pinned by its FNV-1a hash, because a platform that computed another table would draw other tensors.
#[test]
fn normal_table_is_the_same_everywhere() {
    let hash = normal_table()
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    assert_eq!(normal_table().len(), 3 * OCTAVES * CELLS);
    assert_eq!(hash, TABLE_HASH, "{hash:#x}");
    let bits = |x| normal_from_bits(x).to_bits();
    assert_eq!([0, 1, 0x1234_5678, 0x7fff_ffff, 0x9abc_def0, u32::MAX].map(bits), GOLDEN);
}

const TABLE_HASH: u64 = 0x72c7_34f0_992e_3cce;
const GOLDEN: [u32; 6] = [0x40ca_d08d, 0x40c5_5364, 0x3fbb_d932, 0x3180_0000, 0xbfa0_d924, 0xb180_0000];

#[test]
fn logarithm_matches_libm() {
    for i in 1..4000 {
        let x = f64::from(i) * 3.7e-4;
        assert!((ln(x) - x.ln()).abs() <= 4e-16 * (1.0 + x.ln().abs()), "{x}");
    }
}

/// For words at every octave and cell edge and between, the draw is the quantile within the documented bound and
/// monotone within that bound, and the top bit is the sign.
#[test]
fn normal_inverts_the_distribution() {
    let edges = (0..31).flat_map(|o| (0..64).map(move |c| ((64u64 + c) << o >> 6) as u32));
    let around = edges.flat_map(|x| [x.wrapping_sub(1), x, x + 1]).map(|x| x & 0x7fff_ffff);
    let mut words: Vec<u32> = around.chain((0..200_000).map(|i| i * 10_737 + 5)).collect();
    words.sort_unstable();
    let mut previous = f32::INFINITY;
    for x in words {
        let z = normal_from_bits(x);
        assert!(z > 0.0 && normal_from_bits(x | 0x8000_0000) == -z);
        assert!(z <= previous + 2f32.powi(-26) + previous.min(7.0) * 2f32.powi(-24), "{x:#x}");
        previous = z;
        let p = (f64::from(x) + 0.5) / f64::from(1u32 << 31) / 2.0;
        let density = (-0.5 * f64::from(z).powi(2)).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let error = (upper_tail(f64::from(z)) - p) / density;
        let bound = 2f64.powi(-25) + f64::from(z) * 2f64.powi(-24);
        assert!(error.abs() <= bound, "word {x:#x}: z {z}, error {error:e}, bound {bound:e}");
    }
    assert!(normal_from_bits(0) > 6.3 && normal_from_bits(0x7fff_ffff) < 1e-8);
}

/// Moments over an evenly spaced subset of all words have no sampling noise, so any error of the table would show.
#[test]
fn normal_moments_are_exact_over_all_words() {
    let (mut second, mut fourth, n) = (0.0, 0.0, 1 << 21);
    for i in 0..n {
        let z = f64::from(normal_from_bits(i * 1024 + 512));
        second += z * z;
        fourth += z * z * z * z;
    }
    // Midpoint sums miss a little of the tail: 2e-6 and 1e-4 at this spacing.
    assert!((second / f64::from(n) - 1.0).abs() < 1e-5, "{}", second / f64::from(n));
    assert!((fourth / f64::from(n) - 3.0).abs() < 3e-4, "{}", fourth / f64::from(n));
}

/// The sampled distribution: moments within five standard errors, Kolmogorov-Smirnov at the 1e-6 level.
#[test]
fn normal_samples_pass() {
    let mut sample = vec![0.0; 1_000_000];
    Rng::new(20).fill_normal(&mut sample);
    let n = sample.len() as f64;
    let moment = |k| sample.iter().map(|&z| f64::from(z).powi(k)).sum::<f64>() / n;
    for (k, want, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
        let error: f64 = moment(k) - want;
        assert!(error.abs() < 5.0 * (variance / n as f64).sqrt(), "moment {k}: {}", moment(k));
    }
    sample.sort_unstable_by(f32::total_cmp);
    let cdf = |z: f64| if z < 0.0 { upper_tail(-z) } else { 1.0 - upper_tail(z) };
    let distance = sample.iter().enumerate().fold(0.0f64, |d, (i, &z)| {
        let (c, i) = (cdf(f64::from(z)), i as f64);
        d.max(c - i / n).max((i + 1.0) / n - c)
    });
    assert!(distance < 2.69 / n.sqrt(), "distance {distance}");
}

#[test]
fn uniform_samples_pass() {
    assert_eq!((uniform_from_bits(0), uniform_from_bits(255)), (0.0, 0.0));
    assert_eq!(uniform_from_bits(u32::MAX), 1.0 - f32::EPSILON / 2.0);
    let mut sample = vec![0.0; 1_000_003];
    Rng::new(3).fill_uniform(&mut sample);
    let n = sample.len() as f64;
    sample.sort_unstable_by(f32::total_cmp);
    let distance =
        sample.iter().enumerate().fold(0.0f64, |d, (i, &u)| d.max((f64::from(u) - i as f64 / n).abs()));
    assert!(distance < 2.69 / n.sqrt(), "distance {distance}");
}

#[test]
fn streams_are_counted_and_resumed() {
    let mut rng = Rng::new(0x0123_4567_89ab_cdef);
    let first = rng.next_stream();
    assert_eq!(first, Stream { key: [0x89ab_cdef, 0x0123_4567], id: [0, 0] });
    assert_ne!(first.block(0), rng.next_stream().block(0));
    // A prefix of a longer fill is the shorter fill, and element i is word i % 4 of block i / 4.
    let (mut long, mut short) = ([0.0; 11], [0.0; 6]);
    first.fill_uniform(&mut long);
    first.fill_uniform(&mut short);
    assert_eq!(long[..6], short);
    assert_eq!(long[9], uniform_from_bits(philox([2, 0, 0, 0], first.key)[1]));
    let mut resumed = Rng::from_state(rng.state());
    assert_eq!(resumed.below(1 << 40), rng.below(1 << 40));
    assert_eq!(resumed, rng);
    assert_eq!(Rng::from_state([1, u64::from(u32::MAX) + 1]).next_stream().id, [0, 1]);
}

#[test]
fn below_and_shuffle_are_even() {
    let mut rng = Rng::new(11);
    let mut counts = [0; 7];
    for _ in 0..70_000 {
        counts[rng.below(7)] += 1;
    }
    assert!(counts.iter().all(|&c: &i32| (c - 10_000).abs() < 500), "{counts:?}");
    let mut orders = std::collections::BTreeMap::new();
    for _ in 0..24_000 {
        let mut items = [0, 1, 2, 3];
        rng.shuffle(&mut items);
        *orders.entry(items).or_insert(0) += 1;
    }
    assert_eq!(orders.len(), 24);
    assert!(orders.values().all(|&c: &i32| (c - 1000).abs() < 160), "{orders:?}");
    rng.shuffle::<u8>(&mut []);
    // Half of all words are rejected at this size, and the result must still be in range.
    assert!((0..100).all(|_| rng.below((1 << 63) + 1) <= 1 << 63));
}

#[test]
#[should_panic(expected = "below(0)")]
fn below_nothing_panics() {
    Rng::new(0).below(0);
}

#[test]
fn kernel_validates() {
    let kernel = include_str!("../../shaders/elementwise/random.wgsl");
    let library = include_str!("../../shaders/lib/rng.wgsl");
    let body: String = kernel.lines().filter(|l| !l.starts_with("#import")).flat_map(|l| [l, "\n"]).collect();
    let source = body + library;
    let module =
        naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
    let flags = naga::valid::ValidationFlags::all();
    let mut validator = naga::valid::Validator::new(flags, naga::valid::Capabilities::IMMEDIATES);
    validator.validate(&module).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
    let entries: Vec<_> = module.entry_points.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(entries, ["uniform", "normal"]);
    // The library alone is a module too. It declares no binding, so kernels can import it without the table.
    naga::front::wgsl::parse_str(library).expect("rng.wgsl stands alone");
}
