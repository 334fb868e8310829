//! Handwritten digits: those that ship with the repository, or MNIST's files.
#![allow(dead_code, reason = "each example uses what it needs")]

use std::path::{Path, PathBuf};
use tiebeam::store::File;
use tiebeam::{Error, Gpu, Result, Tensor};

/// The digits of the repository. Their source is in `examples/data/README.md`.
const DIGITS: &[u8] = include_bytes!("../data/digits_8x8.safetensors");
const TRAIN: usize = 1400;

/// Images as rows of numbers from 0 to 1, with their labels.
#[derive(Clone)]
pub struct Set {
    pub x: Tensor,
    pub labels: Vec<u32>,
}

pub struct Data {
    pub train: Set,
    pub test: Set,
}

impl Data {
    /// Returns the 8x8 digits of the repository.
    pub fn digits(gpu: &Gpu) -> Result<Data> {
        let file = File::from_bytes("digits_8x8.safetensors", DIGITS.to_vec())?;
        let pixels = file.tensor_u32("images")?;
        let labels = file.tensor_u32("labels")?;
        let size = pixels.len() / labels.len();
        let set = |range: std::ops::Range<usize>| {
            let x: Vec<f32> =
                pixels[range.start * size..range.end * size].iter().map(|&p| p as f32 / 16.0).collect();
            Set { x: Tensor::from_slice(gpu, &x, [range.len(), size]), labels: labels[range].to_vec() }
        };
        Ok(Data { train: set(0..TRAIN), test: set(TRAIN..labels.len()) })
    }

    /// Reads the four unpacked files of MNIST in a folder, with at most `limit` training images.
    pub fn mnist(gpu: &Gpu, folder: &Path, limit: usize) -> Result<Data> {
        let set = |name: &str, limit: usize| {
            let (images, pixels) = idx(folder, &format!("{name}-images"), 3)?;
            let (labels, values) = idx(folder, &format!("{name}-labels"), 1)?;
            if images[0] != labels[0] || images[0] == 0 {
                let message = format!("{name}: {} images and {} labels", images[0], labels[0]);
                return Err(Error::format(folder, message));
            }
            let (n, size) = (images[0].min(limit), images[1] * images[2]);
            let x: Vec<f32> = pixels[..n * size].iter().map(|&p| f32::from(p) / 255.0).collect();
            let labels = values[..n].iter().map(|&label| u32::from(label)).collect();
            Ok(Set { x: Tensor::from_slice(gpu, &x, [n, size]), labels })
        };
        Ok(Data { train: set("train", limit)?, test: set("t10k", usize::MAX)? })
    }

    /// Number of classes: one more than the largest label.
    pub fn classes(&self) -> usize {
        self.train.labels.iter().chain(&self.test.labels).max().map_or(0, |&most| most as usize + 1)
    }
}

/// Reads an IDX file of bytes with this many axes, under either of its usual names. Returns its sizes and its data.
fn idx(folder: &Path, name: &str, axes: usize) -> Result<(Vec<usize>, Vec<u8>)> {
    let names = ["-", "."].map(|dot| format!("{name}{dot}idx{axes}-ubyte"));
    let paths: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
    let path = paths.iter().find(|path| path.is_file()).unwrap_or(&paths[0]);
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let wrong = |message: String| Error::format(path, message);
    let header = 4 + 4 * axes;
    if bytes.len() < header || bytes[..4] != [0, 0, 8, axes as u8] {
        return Err(wrong(format!("no IDX file of bytes with {axes} axes; is it still packed (gunzip)?")));
    }
    let sizes: Vec<usize> = bytes[4..header]
        .chunks(4)
        .map(|four| u32::from_be_bytes([four[0], four[1], four[2], four[3]]) as usize)
        .collect();
    let count = sizes.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    if count != Some(bytes.len() - header) {
        return Err(wrong(format!("its header says {sizes:?}, it holds {} bytes", bytes.len() - header)));
    }
    Ok((sizes, bytes[header..].to_vec()))
}
