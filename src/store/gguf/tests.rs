use super::*;
use crate::files::scratch::Folder;
use half::f16;

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

/// Builds a file with three metadata pairs and these tensors: name, sizes innermost first, type, data.
fn sample(tensors: &[(&str, &[u64], u32, Vec<u8>)]) -> Vec<u8> {
    let mut all = b"GGUF".to_vec();
    all.extend(3u32.to_le_bytes());
    all.extend((tensors.len() as u64).to_le_bytes());
    all.extend(3u64.to_le_bytes());
    all.extend([text("width"), 4u32.to_le_bytes().to_vec(), 576u32.to_le_bytes().to_vec()].concat());
    all.extend([text("eps"), 6u32.to_le_bytes().to_vec(), 0.5f32.to_le_bytes().to_vec()].concat());
    all.extend([text("tokens"), 9u32.to_le_bytes().to_vec(), 8u32.to_le_bytes().to_vec()].concat());
    all.extend([2u64.to_le_bytes().to_vec(), text("a"), text("\u{120}b")].concat());
    let mut offset = 0u64;
    for (name, sizes, kind, data) in tensors {
        all.extend(text(name));
        all.extend((sizes.len() as u32).to_le_bytes());
        sizes.iter().for_each(|size| all.extend(size.to_le_bytes()));
        all.extend(kind.to_le_bytes());
        all.extend(offset.to_le_bytes());
        offset += (data.len() as u64).next_multiple_of(32);
    }
    for (_, _, _, data) in tensors {
        all.resize(all.len().next_multiple_of(32), 0);
        all.extend(data);
    }
    all
}

fn tensors() -> Vec<(&'static str, &'static [u64], u32, Vec<u8>)> {
    let half = |x: f32| f16::from_f32(x).to_le_bytes().to_vec();
    // Both the low and the high nibbles run from 0 to 15.
    let nibbles: Vec<u8> = (0..16).map(|i| i | i << 4).collect();
    let bytes: Vec<u8> = (0..32).map(|i| (i as i8 - 16) as u8).collect();
    vec![
        ("f", &[2, 1], 0, [1.5f32, -2.0].iter().flat_map(|x| x.to_le_bytes()).collect()),
        ("q40", &[32], 2, [half(0.5), nibbles.clone()].concat()),
        ("q41", &[32], 3, [half(0.5), half(3.0), nibbles].concat()),
        ("q80", &[32], 8, [half(0.25), bytes].concat()),
    ]
}

fn open(bytes: &[u8]) -> Result<Gguf> {
    let folder = Folder::new("gguf");
    let path = folder.join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Gguf::open(&path)
}

#[test]
fn what_is_written_is_read() {
    let file = open(&sample(&tensors())).unwrap();
    assert_eq!((file.number("width").unwrap(), file.float("eps").unwrap()), (576, 0.5));
    assert_eq!(file.texts("tokens").unwrap(), ["a", "\u{120}b"]);
    assert_eq!((file.shape("f").unwrap(), file.tensor_f32("f").unwrap()), (&[1, 2][..], vec![1.5, -2.0]));
    let ramp = |from: f32, step: f32| (0..16).map(|i| from + step * i as f32).collect::<Vec<_>>().repeat(2);
    assert_eq!(file.tensor_f32("q40").unwrap(), ramp(-4.0, 0.5));
    assert_eq!(file.tensor_f32("q41").unwrap(), ramp(3.0, 0.5));
    let all: Vec<f32> = (0..32).map(|i| 0.25 * (i as f32 - 16.0)).collect();
    assert_eq!((file.tensor_f32("q80").unwrap(), file.bytes("q80").unwrap()), (all, 34));
    assert!(file.number("eps").is_err() && file.text("tokens").is_err() && file.tensor_f32("g").is_err());
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let whole = sample(&tensors());
    for end in 0..whole.len() {
        assert!(open(&whole[..end]).is_err(), "{end} of {} bytes", whole.len());
    }
}

#[test]
fn what_is_wrong_is_named() {
    let says = |bytes: &[u8], what: &str| {
        let error = open(bytes).err().expect("refused").to_string();
        assert!(error.contains(what), "{error}");
    };
    let whole = sample(&tensors());
    let with = |at: usize, bytes: &[u8]| {
        let mut all = whole.clone();
        all[at..at + bytes.len()].copy_from_slice(bytes);
        all
    };
    says(b"no such thing", "does not begin with GGUF");
    says(&with(4, &[1]), "version 1");
    says(&with(8, &u64::MAX.to_le_bytes()), "number of tensors announces");
    says(&with(16, &u64::MAX.to_le_bytes()), "metadata pairs announces");
    says(&with(24, &u64::MAX.to_le_bytes()), "metadata key announces");
    says(&with(4, &3u32.to_be_bytes()), "big-endian");
    // A list of bytes, each of which would take 32 in memory.
    let many =
        [&9u32.to_le_bytes()[..], &0u32.to_le_bytes(), &(1u64 << 25).to_le_bytes(), &[0; 1 << 25]].concat();
    let pair = [text("list"), many].concat();
    says(
        &[&whole[..16], &1u64.to_le_bytes(), &pair].concat(),
        "list: lists of metadata have more than 16777216 values",
    );
    says(&sample(&[("odd", &[33], 2, vec![0; 36])]), "`odd`: [33] is no size for Q4_0");
    says(&sample(&[("huge", &[u64::MAX, 8], 0, vec![])]), "tensor `huge`");
    says(&sample(&[("a", &[1], 0, vec![0; 4]), ("a", &[1], 0, vec![0; 4])]), "two tensors are named `a`");
}

#[test]
fn types_that_are_not_supported_are_listed() {
    let rows =
        |kind, data| sample(&[("k", &[256, 2], kind, data), ("f", &[1], 0, 1.5f32.to_le_bytes().to_vec())]);
    let file = open(&rows(16, vec![0; 132])).unwrap();
    assert_eq!((file.shape("k").unwrap(), file.bytes("k").unwrap()), (&[2, 256][..], 132));
    assert_eq!((file.kind_name("k").unwrap(), file.bytes_of("k").unwrap().len()), ("IQ2_XXS", 132));
    let says = |error: Error, what: &str| assert!(error.to_string().contains(what), "{error}");
    says(file.kind("k").unwrap_err(), "tensor `k`: type IQ2_XXS (number 16) is not supported; Q8_0");
    says(file.tensor_f32("k").unwrap_err(), "IQ2_XXS (number 16)");
    says(file.packed("k").unwrap_err(), "IQ2_XXS (number 16)");
    says(file.packed("f").unwrap_err(), "tensor `f`: F32 is not quantised");
    says(file.kind("none").unwrap_err(), "no tensor `none`");
    assert_eq!(file.tensor_f32("f").unwrap(), [1.5]);
    // Nothing is known of a number that is not in the table.
    let file = open(&rows(77, vec![0; 100])).unwrap();
    assert_eq!((file.kind_name("k").unwrap(), file.kind("f").unwrap()), ("unknown", GgufType::F32));
    says(file.bytes("k").unwrap_err(), "unknown (number 77)");
    says(file.bytes_of("k").unwrap_err(), "unknown (number 77)");
}

#[test]
fn one_of_several_files_is_refused() {
    let mut all = b"GGUF".to_vec();
    all.extend(
        [3u32.to_le_bytes().to_vec(), 0u64.to_le_bytes().to_vec(), 2u64.to_le_bytes().to_vec()].concat(),
    );
    for (key, value) in [("split.no", 1u16), ("split.count", 3)] {
        all.extend([text(key), 2u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat());
    }
    let error = open(&all).err().expect("refused").to_string();
    assert!(error.contains("part 2 of a model in 3 files (split.count); merge them by"), "{error}");
    let at = all.len() - 2;
    all[at] = 1;
    open(&all).unwrap();
}

const PACKED: [GgufType; 10] = [
    GgufType::Q4_0,
    GgufType::Q4_1,
    GgufType::Q5_0,
    GgufType::Q5_1,
    GgufType::Q8_0,
    GgufType::Q2K,
    GgufType::Q3K,
    GgufType::Q4K,
    GgufType::Q5K,
    GgufType::Q6K,
];

fn decoded(kind: GgufType, bytes: &[u8]) -> Vec<f32> {
    let mut all = Vec::new();
    blocks::decode(kind, bytes, &mut all);
    all
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The vectors are by the Python package gguf.
#[test]
fn blocks_have_the_values_of_the_reference() {
    let path = crate::files::scratch::root().join("tests/vectors/gguf/blocks.safetensors");
    let file = crate::store::File::open(path).unwrap();
    let check = |kind: GgufType, name: &str| {
        let bytes = file.bytes(&format!("{name}.bytes")).unwrap();
        let want = file.tensor_f32(&format!("{name}.values")).unwrap();
        assert_eq!(bits(&decoded(kind, bytes)), bits(&want), "{name}");
        if kind.packing().is_some() {
            law(kind, bytes, 512);
        }
    };
    for kind in PACKED.into_iter().chain([GgufType::F32, GgufType::F16, GgufType::BF16]) {
        check(kind, &kind.to_string());
    }
    for kind in &PACKED[..5] {
        check(*kind, &format!("{kind}.quantized"));
    }
}

/// Rearranged rows have the values of the blocks. The sign of zero is left out: `0 - 0` of a fused multiply-add is 0 where a
/// negative scale times 0 is -0.
fn law(kind: GgufType, bytes: &[u8], columns: usize) {
    let unsigned = |values: Vec<f32>| bits(&values.into_iter().map(|x| x + 0.0).collect::<Vec<_>>());
    let got = kind.packing().unwrap().decode(&repack(kind, bytes, columns), columns);
    assert_eq!(unsigned(got), unsigned(decoded(kind, bytes)), "{kind} {columns}");
}

/// Blocks of random bytes, with scales at the ends of what f16 has.
fn random_blocks(kind: GgufType, blocks: usize) -> Vec<u8> {
    let mut state = 7u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u16
    };
    let extremes = [0u16, 0x8000, 1, 0x8001, 0x03ff, 0x0400, 0x7bff, 0xfbff, 0x3c00];
    let mut all = Vec::new();
    for _ in 0..blocks {
        let mut block: Vec<u8> = (0..kind.block()[1]).map(|_| next() as u8).collect();
        for &at in kind.halves() {
            let pick = usize::from(next()) % (extremes.len() + 4);
            let scale = extremes.get(pick).copied().unwrap_or_else(|| next() & 0xbfff);
            let scale = if scale & 0x7c00 == 0x7c00 { 0x3555 } else { scale };
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        all.extend(block);
    }
    all
}

#[test]
fn packed_rows_have_the_values_of_the_blocks() {
    for kind in PACKED {
        let [elements, _] = kind.block();
        // An odd number of groups leaves half a word of scales.
        for blocks in [1, 2, 3, 5] {
            law(kind, &random_blocks(kind, 7 * blocks), blocks * elements);
        }
        assert!(repack(kind, &[], elements).is_empty() && repack(kind, &[], 0).is_empty());
    }
}

#[test]
fn packed_tensors_are_read_in_pieces() {
    for kind in PACKED {
        let [elements, size] = kind.block();
        let mut data = random_blocks(kind, 12);
        let sizes = [2 * elements as u64, 3, 2];
        let file = open(&sample(&[("w", &sizes, kind.number(), data.clone())])).unwrap();
        let (packing, shape, words) = file.packed("w").unwrap();
        assert_eq!((packing, shape), (kind.packing().unwrap(), [6, 2 * elements]));
        packing.check("w", &words, shape[1]).unwrap();
        let pieces = [file.packed_rows("w", 0..1), file.packed_rows("w", 1..5), file.packed_rows("w", 5..6)];
        assert_eq!(pieces.map(Result::unwrap).concat(), words);
        assert!(
            file.packed_rows("w", 5..7)
                .unwrap_err()
                .to_string()
                .contains("rows 5..7 were asked for, it has 6")
        );
        // Block 7 is the second one of row 3.
        let at = 7 * size + kind.halves()[0];
        data[at..at + 2].copy_from_slice(&0xfc00u16.to_le_bytes());
        let file = open(&sample(&[("w", &sizes, kind.number(), data)])).unwrap();
        let place = format!("tensor `w`: the scale in row 3 at column {elements} is NaN or infinite");
        for wrong in [file.packed("w").err(), file.packed_rows("w", 2..4).err()] {
            assert!(wrong.unwrap().to_string().contains(&place));
        }
        file.packed_rows("w", 0..3).unwrap();
    }
}

#[test]
#[should_panic(expected = "repack: 48 columns in blocks of 32 of Q8_0")]
fn rows_of_no_whole_blocks_panic() {
    repack(GgufType::Q8_0, &[0; 51], 48);
}

#[test]
fn a_changed_byte_is_an_error_or_another_file() {
    let whole = sample(&tensors());
    let read = |bytes: &[u8]| {
        let Ok(file) = open(bytes) else { return };
        for name in file.names() {
            let _ = (file.tensor_f32(name), file.packed(name), file.bytes_of(name));
        }
    };
    for at in 0..whole.len() {
        for byte in [1, 0xff] {
            let mut changed = whole.clone();
            changed[at] = byte;
            read(&changed);
        }
    }
}
