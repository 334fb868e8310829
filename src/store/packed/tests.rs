use super::*;
use crate::files::scratch::{Folder, root};
use crate::store::{Entry, File, FileDType, save};
use serde_json::json;
use std::collections::BTreeMap;

fn vectors() -> Shards {
    Shards::open(root().join("tests/vectors/gguf/folders.safetensors")).unwrap()
}

fn compressed_json(bits: u32, strategy: &str, group: Option<u32>) -> Value {
    let weights = json!({"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group, "symmetric": true});
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"],
    })
}

fn gptq_json(bits: u32, group: i32, format: &str) -> Value {
    json!({"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": false, "checkpoint_format": format})
}

fn awq_json(group: i32) -> Value {
    json!({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": true, "version": "gemm"})
}

fn read(config: &Value, weights: &Shards, name: &str) -> Result<Option<PackedRows>> {
    QuantConfig::from_json(config).unwrap().packed(weights, name)
}

/// The vectors are by the package compressed-tensors, and by numpy after the published layouts of AutoGPTQ and AutoAWQ.
#[test]
fn levels_and_scales_are_those_of_the_reference() {
    let (weights, group, row) = (vectors(), "group", "channel");
    let cases = [
        (
            "ct4",
            compressed_json(4, group, Some(32)),
            "compressed-tensors pack-quantized, 4 bits in groups of 32",
        ),
        (
            "ct4_bf16",
            compressed_json(4, row, None),
            "compressed-tensors pack-quantized, 4 bits with a scale for each row",
        ),
        (
            "ct4_zero",
            compressed_json(4, group, Some(32)),
            "compressed-tensors pack-quantized, 4 bits in groups of 32",
        ),
        (
            "ct4_zero_bf16",
            compressed_json(4, group, Some(16)),
            "compressed-tensors pack-quantized, 4 bits in groups of 16",
        ),
        (
            "ct8",
            compressed_json(8, row, None),
            "compressed-tensors pack-quantized, 8 bits with a scale for each row",
        ),
        (
            "ct8_zero",
            compressed_json(8, group, Some(32)),
            "compressed-tensors pack-quantized, 8 bits in groups of 32",
        ),
        ("gptq4", gptq_json(4, 32, "gptq"), "GPTQ, 4 bits in groups of 32"),
        ("gptq4_v2", gptq_json(4, 16, "gptq_v2"), "GPTQ, 4 bits in groups of 16"),
        ("gptq8", gptq_json(8, -1, "gptq"), "GPTQ, 8 bits with a scale for each row"),
        ("awq", awq_json(32), "AWQ, 4 bits in groups of 32"),
        ("awq_short", awq_json(16), "AWQ, 4 bits in groups of 16"),
    ];
    for (case, config, text) in cases {
        assert_eq!(QuantConfig::from_json(&config).unwrap().bits_text(), text);
        let (packing, shape, words) = read(&config, &weights, &format!("{case}.weight")).unwrap().unwrap();
        let values = format!("{case}.values");
        weights.find(&values).unwrap().0.expect(&values, &shape).unwrap();
        let want = weights.find(&values).unwrap().0.tensor_f32(&values).unwrap();
        let got = packing.decode(&words, shape[1]);
        let bits = |all: &[f32]| all.iter().map(|x| (x + 0.0).to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&got), bits(&want), "{case}");
    }
}

#[test]
fn signed_bytes_are_read() {
    let folder = Folder::new("packed-bytes");
    let path = folder.join("m.safetensors");
    let levels: Vec<u8> = (0..2 * 40u8).map(|i| i.wrapping_mul(7)).collect();
    let scales = [0.5f32, -0.25];
    let zeros = vec![3u8, 0xfd];
    let entries = |zero: bool| {
        let mut all = vec![
            Entry::bytes("a.weight", FileDType::I8, &[2, 40], levels.clone()),
            Entry::f32("a.weight_scale", &[2, 1], &scales),
        ];
        if zero {
            all.push(Entry::bytes("a.weight_zero_point", FileDType::I8, &[2, 1], zeros.clone()));
        }
        all
    };
    let mut config = compressed_json(8, "channel", None);
    save(&path, entries(false), &BTreeMap::new()).unwrap();
    assert_eq!(read(&config, &Shards::open(&path).unwrap(), "a.weight").unwrap(), None);
    config["format"] = "int-quantized".into();
    for zero in [false, true] {
        save(&path, entries(zero), &BTreeMap::new()).unwrap();
        let (packing, shape, words) =
            read(&config, &Shards::open(&path).unwrap(), "a.weight").unwrap().unwrap();
        let zero = |r: usize| if zero { f32::from(zeros[r] as i8) } else { 0.0 };
        let want: Vec<f32> =
            (0..80).map(|i| scales[i / 40] * (f32::from(levels[i] as i8) - zero(i / 40))).collect();
        assert_eq!((shape, packing.decode(&words, 40)), ([2, 40], want));
    }
    assert_eq!(
        QuantConfig::from_json(&config).unwrap().bits_text(),
        "compressed-tensors int-quantized, 8 bits with a scale for each row"
    );
}

#[test]
fn what_is_not_packed_is_none() {
    let weights = vectors();
    let config = compressed_json(4, "group", Some(32));
    assert_eq!(read(&config, &weights, "ct4.values").unwrap(), None);
    let error = read(&config, &weights, "ct5.weight").unwrap_err().to_string();
    assert!(error.contains("no tensor `ct5.weight`; near: "), "{error}");
}

#[test]
fn other_methods_are_refused_by_name() {
    let says = |config: Value, what: &str| {
        let error = QuantConfig::from_json(&config).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    for method in
        ["bitsandbytes", "fp8", "fbgemm_fp8", "aqlm", "quip", "hqq", "eetq", "torchao", "exl2", "mxfp4"]
    {
        says(json!({"quant_method": method}), &format!("the method {method} is not read"));
    }
    says(json!({}), "no `quant_method`");
    let with = |mut config: Value, key: &str, value: Value| {
        config[key] = value;
        config
    };
    let compressed = || compressed_json(4, "group", Some(32));
    says(with(compressed(), "format", "float-quantized".into()), "the format float-quantized is not read");
    says(with(compressed(), "format", "marlin-24".into()), "the format marlin-24 is not read");
    says(
        with(compressed(), "sparsity_config", json!({"format": "sparse-24-bitmask"})),
        "sparsity sparse-24-bitmask",
    );
    says(with(compressed(), "config_groups", json!({})), "no `config_groups`");
    says(compressed_json(3, "group", Some(32)), "`group_0`: weights of 3 bits are not read");
    says(compressed_json(4, "tensor", None), "strategy tensor are not read");
    let float = json!({"group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}});
    says(with(compressed(), "config_groups", float), "type \"float\" are not read");
    says(gptq_json(4, 32, "marlin"), "`checkpoint_format` marlin is not read");
    says(gptq_json(3, 32, "gptq"), "gptq with 3 bits");
    says(gptq_json(4, 0, "gptq"), "a group has 0 columns");
    says(
        with(gptq_json(4, 32, "gptq"), "dynamic", json!({"-:lm_head": {}, "+:down": {"bits": 8}})),
        "gptq with `dynamic` is not read",
    );
    says(with(gptq_json(4, 32, "gptq"), "bits", "four".into()), "`bits` is \"four\", not a whole number");
    says(with(awq_json(32), "version", "gemv".into()), "`version` gemv is not read");
    says(with(awq_json(32), "bits", 8.into()), "awq with 8 bits");
}

/// Writes the vectors of one case with one tensor changed or left out, and reads them.
fn damaged(case: &str, config: &Value, what: &str, change: Option<(FileDType, &[usize], Vec<u8>)>) -> String {
    let file = File::open(root().join("tests/vectors/gguf/folders.safetensors")).unwrap();
    let (folder, changed) = (Folder::new("packed-damaged"), format!("{case}.{what}"));
    let own = file.names().filter(|name| name.starts_with(&format!("{case}.")) && **name != *changed);
    let own = own.map(|name| {
        let info = file.info(name).unwrap();
        Entry::bytes(name, info.dtype, &info.shape, file.bytes(name).unwrap().to_vec())
    });
    let new = change.map(|(dtype, shape, bytes)| Entry::bytes(changed.clone(), dtype, shape, bytes));
    let path = folder.join("m.safetensors");
    save(&path, own.chain(new), &BTreeMap::new()).unwrap();
    let error =
        read(config, &Shards::open(&path).unwrap(), &format!("{case}.weight")).unwrap_err().to_string();
    assert!(error.contains(&format!("`{changed}`")), "{error}");
    error
}

#[test]
fn damaged_tensors_are_named() {
    let (compressed, gptq, awq) =
        (compressed_json(4, "group", Some(32)), gptq_json(4, 32, "gptq"), awq_json(32));
    for (case, config, tensors) in [
        ("ct4_zero", &compressed, ["weight_scale", "weight_shape", "weight_zero_point"]),
        ("gptq4", &gptq, ["scales", "qzeros", "g_idx"]),
        ("awq", &awq, ["scales", "qzeros", "scales"]),
    ] {
        for what in tensors {
            // A tensor of another size, and one that is missing: without zeros and order the others can be read.
            damaged(case, config, what, Some((FileDType::I32, &[1, 1], vec![0; 4])));
            if !["weight_zero_point", "g_idx"].contains(&what) {
                assert!(damaged(case, config, what, None).contains("no tensor"));
            }
        }
    }
    damaged("ct4", &compressed, "weight_packed", Some((FileDType::I32, &[12, 11], vec![0; 528])));
    damaged("ct4", &compressed, "weight_packed", Some((FileDType::I64, &[12, 12], vec![0; 1152])));
    damaged("gptq4", &gptq, "qweight", Some((FileDType::I32, &[192], vec![0; 768])));
    let order: Vec<u8> = (0..96i32).flat_map(|c| ((c + 1) % 96 / 32).to_le_bytes()).collect();
    let error = damaged("gptq4", &gptq, "g_idx", Some((FileDType::I32, &[96], order)));
    assert!(
        error.contains("column 31 is in group 1: columns in the order of activations (act order"),
        "{error}"
    );
    // Without the groups of the columns, weights in act order cannot be read, and others can.
    let mut ordered = gptq.clone();
    ordered["desc_act"] = true.into();
    assert!(damaged("gptq4", &ordered, "g_idx", None).contains("no tensor"));
    assert!(read(&ordered, &vectors(), "gptq4.weight").unwrap().is_some());
    let mut scales = vec![0; 96];
    scales[2 * 17..2 * 18].copy_from_slice(&0x7e00u16.to_le_bytes());
    let error = damaged("gptq4", &gptq, "scales", Some((FileDType::F16, &[3, 16], scales)));
    assert!(error.contains("the scale at [1, 1] is NaN"), "{error}");
}
