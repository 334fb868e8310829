//! The tasks of the zoo: halves of the classes, and images with noise, blurred and turned.

use crate::digits::{Data, Set};
use tiebeam::store::{Entry, save};
use tiebeam::{Gpu, Result, Rng, Tensor};

/// Side of an image.
const SIDE: usize = 8;

/// The deviation of the noise. Pixels are from 0 to 1.
const NOISE: f32 = 0.4;

/// Training images that the base sees. The rest is for the tasks.
pub const BASE: usize = 300;

/// Images of a task that are held out of its training, to choose what a merge leaves open.
pub const VALIDATION: usize = 200;

/// What is done to the images of a task.
#[derive(Clone, Copy, PartialEq)]
pub enum Change {
    /// Only digits in this range.
    Classes(u32, u32),
    Noise,
    Blur,
    Turn,
    Nothing,
}

/// A task with its three parts.
pub struct Task {
    pub name: &'static str,
    pub change: Change,
    pub train: Set,
    pub validation: Set,
    pub test: Set,
}

pub const NAMES: [(&str, Change); 5] = [
    ("digits 0-4", Change::Classes(0, 5)),
    ("digits 5-9", Change::Classes(5, 10)),
    ("noise", Change::Noise),
    ("blur", Change::Blur),
    ("turned", Change::Turn),
];

impl Task {
    /// Makes a task of the digits. Its noise is drawn by `rng`.
    pub fn new(
        gpu: &Gpu,
        data: &Data,
        (name, change): (&'static str, Change),
        rng: &mut Rng,
    ) -> Result<Task> {
        let count = data.train.labels.len();
        let mut part = |set: &Set, range: std::ops::Range<usize>| changed(gpu, set, range, change, rng);
        Ok(Task {
            name,
            change,
            train: part(&data.train, BASE..count - VALIDATION)?,
            validation: part(&data.train, count - VALIDATION..count)?,
            test: part(&data.test, 0..data.test.labels.len())?,
        })
    }
}

/// The images of a range of a set, changed.
fn changed(
    gpu: &Gpu,
    set: &Set,
    range: std::ops::Range<usize>,
    change: Change,
    rng: &mut Rng,
) -> Result<Set> {
    let size = SIDE * SIDE;
    let all = set.x.to_vec::<f32>()?;
    let (mut x, mut labels) = (Vec::new(), Vec::new());
    for row in range {
        let (image, label) = (&all[row * size..][..size], set.labels[row]);
        match change {
            Change::Classes(first, end) if !(first..end).contains(&label) => continue,
            Change::Noise => x.extend(image.iter().map(|pixel| pixel + NOISE * rng.normal())),
            Change::Blur => x.extend(blurred(&blurred(image))),
            Change::Turn => x.extend((0..size).map(|at| image[(SIDE - 1 - at % SIDE) * SIDE + at / SIDE])),
            Change::Classes(..) | Change::Nothing => x.extend(image),
        }
        labels.push(label);
    }
    Ok(Set { x: Tensor::from_slice(gpu, &x, [labels.len(), size]), labels })
}

/// The mean over windows of 3 x 3, with zeros outside.
fn blurred(image: &[f32]) -> Vec<f32> {
    let near = |i: usize| i.saturating_sub(1)..(i + 2).min(SIDE);
    let one = |at: usize| {
        let (row, column) = (at / SIDE, at % SIDE);
        let sum: f32 = near(row).flat_map(|r| near(column).map(move |c| image[r * SIDE + c])).sum();
        sum / 9.0
    };
    (0..image.len()).map(one).collect()
}

/// The first images of the training set, on which the base is trained.
pub fn of_base(gpu: &Gpu, data: &Data) -> Result<Set> {
    changed(gpu, &data.train, 0..BASE, Change::Nothing, &mut Rng::new(0))
}

/// Writes a set as `x` and `y`, which `tiebeam evaluate --data` reads.
pub fn save_set(path: &std::path::Path, set: &Set) -> Result<()> {
    let x = set.x.to_vec::<f32>()?;
    let entries = [Entry::f32("x", set.x.shape(), &x), Entry::u32("y", &[set.labels.len()], &set.labels)];
    save(path, entries, &std::collections::BTreeMap::new())
}
