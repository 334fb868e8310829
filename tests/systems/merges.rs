//! Shared by the tests of `tiebeam merge`: folders, small models, runs in this process.
#![allow(dead_code)]

use crate::support::{folder, gpu, within};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tiebeam::merge::job::PART;
use tiebeam::merge::{Job, MergeConfig, Shards};
use tiebeam::store::{Entry, FileDType, save};
use tiebeam::{Result, Rng};

/// A temporary folder of one test.
pub struct Folder(pub PathBuf, folder::Folder);

impl Folder {
    pub fn new(test: &str) -> Folder {
        let folder = folder::Folder::new(test);
        Folder(folder.to_path_buf(), folder)
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Runs a configuration in this process, into `out`.
    pub fn merge(&self, config: &str) -> Result<Shards> {
        self.merge_into("out", config, 5 << 30)
    }

    pub fn merge_into(&self, out: &str, config: &str, shard_bytes: u64) -> Result<Shards> {
        self.merge_in_parts(out, config, shard_bytes, PART)
    }

    pub fn merge_in_parts(&self, out: &str, config: &str, shard_bytes: u64, part: usize) -> Result<Shards> {
        let mut job = Job::open(MergeConfig::from_yaml(config, &self.0)?)?;
        job.part = part;
        let mut done = 0;
        job.run(gpu(), &job.sources(), &self.0.join(out), shard_bytes, config, &mut |bytes| {
            done += bytes;
            Ok(())
        })?;
        assert_eq!(done, job.bytes() * job.passes(), "progress ends at the end");
        Shards::open(self.0.join(out))
    }

    /// The error message of a configuration that cannot be merged.
    pub fn refusal(&self, config: &str) -> String {
        self.merge(config).expect_err(config).to_string()
    }

    /// Every file in a subfolder, with its bytes.
    pub fn contents(&self, folder: &str) -> BTreeMap<String, Vec<u8>> {
        let entries = std::fs::read_dir(self.0.join(folder)).unwrap().map(|e| e.unwrap().path());
        entries
            .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&p).unwrap()))
            .collect()
    }

    pub fn names(&self) -> Vec<String> {
        self.1.names()
    }
}

pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Creates a small model with the usual names of language models.
pub fn model(layers: usize, seed: u64) -> Tensors {
    let mut rng = Rng::new(seed);
    let mut tensors = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let mut values = vec![0.0; shape.iter().product()];
        rng.fill_normal(&mut values);
        tensors.insert(name, (shape.to_vec(), values));
    };
    add("model.embed_tokens.weight".into(), &[12, 6]);
    for layer in 0..layers {
        add(format!("model.layers.{layer}.self_attn.q_proj.weight"), &[6, 6]);
        add(format!("model.layers.{layer}.mlp.up.weight"), &[7, 6]);
        add(format!("model.layers.{layer}.norm.weight"), &[6]);
    }
    add("lm_head.weight".into(), &[12, 6]);
    tensors
}

pub fn save_model(path: &Path, tensors: &Tensors, dtype: FileDType) {
    let positions: Vec<u8> = (0..4i64).flat_map(i64::to_le_bytes).collect();
    let positions = Entry::bytes("model.position_ids", FileDType::I64, &[4], positions);
    let entry = |(name, (shape, values)): (&String, &'_ (Vec<usize>, Vec<f32>))| match dtype {
        FileDType::BF16 => Entry::bf16(name, shape, values),
        _ => Entry::bytes(name, FileDType::F32, shape, bytemuck::cast_slice(values).to_vec()),
    };
    std::fs::create_dir_all(path).unwrap();
    let file = path.join("model.safetensors");
    save(file, tensors.iter().map(entry).chain([positions]), &BTreeMap::new()).unwrap();
    std::fs::write(
        path.join("config.json"),
        r#"{"num_hidden_layers": 4, "torch_dtype": "float32", "x": [1]}"#,
    )
    .unwrap();
    std::fs::write(path.join("tokenizer.json"), "{}").unwrap();
    std::fs::write(path.join("notes.txt"), "not copied").unwrap();
}

/// Writes models `a`, `b` and `c` of four layers.
pub fn three(folder: &Folder) -> [Tensors; 3] {
    let all = [1, 2, 3].map(|seed| model(4, seed));
    for (name, tensors) in ["a", "b", "c"].iter().zip(&all) {
        save_model(&folder.0.join(name), tensors, FileDType::F32);
    }
    all
}

pub fn values(checkpoint: &Shards, name: &str) -> Vec<f32> {
    checkpoint.find(name).and_then(|(file, name)| file.tensor_f32(name)).unwrap_or_else(|e| panic!("{e}"))
}

/// Checks that every float tensor of a merge is `f` of the inputs' elements.
pub fn expect(merged: &Shards, inputs: &[&Tensors], f: impl Fn(&str, &[f64]) -> f64) {
    for name in inputs[0].keys() {
        let wide = |v: Vec<f32>| v.into_iter().map(f64::from).collect::<Vec<f64>>();
        let got = wide(values(merged, name));
        let at = |i: usize| inputs.iter().map(|t| f64::from(t[name].1[i])).collect::<Vec<f64>>();
        let want: Vec<f64> = (0..got.len()).map(|i| f(name, &at(i))).collect();
        within(name, &got, &want, |_| 2e-6);
    }
}
