//! The `lap` file of the `matching` family, which has assignment problems with known best values. Format:
//! `tests/vectors/matching/README.md`.

use crate::support::gpu;
use std::collections::BTreeSet;
use std::path::Path;
use tiebeam::linalg::assignment::{Assignment, Cost, Goal, assign};
use tiebeam::store::File;
use tiebeam::{Element, Tensor};

pub const FILES: &[(&str, super::Check)] = &[("lap", lap)];

/// One matrix of the file, with its known properties.
struct Problem<'a> {
    file: &'a File,
    name: &'a str,
    /// Whether the best assignment is unique, by `info.json`.
    unique: bool,
}

impl Problem<'_> {
    fn part(&self, part: &str) -> String {
        format!("{}.{part}", self.name)
    }

    fn whole(&self, part: &str) -> Vec<i32> {
        self.file.tensor_i32(&self.part(part)).unwrap_or_else(|e| panic!("{e}"))
    }

    fn value(&self, part: &str) -> f64 {
        let bytes = self.file.bytes(&self.part(part)).unwrap_or_else(|e| panic!("{e}"));
        f64::from_le_bytes(bytes.try_into().unwrap_or_else(|_| panic!("{}.{part} is no f64", self.name)))
    }

    fn check(&self) {
        let goal = if self.name.contains("_max") { Goal::Maximize } else { Goal::Minimize };
        let cost = self.part("cost");
        if !self.file.contains(&cost) {
            let (size, cost) = self.product();
            self.hold(&cost, size, Goal::Minimize, "value");
            return self.hold(&cost, size, Goal::Maximize, "value_max");
        }
        let shape = &self.file.info(&cost).expect("it is there").shape;
        let size = [shape[0], shape[1]];
        match self.file.tensor_f32(&cost) {
            Ok(cost) => self.hold(&cost, size, goal, "value"),
            Err(_) => self.hold(&self.whole("cost"), size, goal, "value"),
        }
    }

    /// Computes `u v^T` of whole numbers.
    fn product(&self) -> ([usize; 2], Vec<i32>) {
        let shape = |part| self.file.info(&self.part(part)).unwrap_or_else(|e| panic!("{e}")).shape[0];
        let (size, u, v) = ([shape("u"), shape("v")], self.whole("u"), self.whole("v"));
        let rank = u.len() / size[0];
        let dot = |i: usize, j: usize| (0..rank).map(|k| u[i * rank + k] * v[j * rank + k]).sum();
        (size, (0..size[0] * size[1]).map(|e| dot(e / size[1], e % size[1])).collect())
    }

    /// Solves on the host, and again with prices from the device, and checks both.
    fn hold<E: Cost + Element>(&self, cost: &[E], size: [usize; 2], goal: Goal, value: &str) {
        let found = assign(cost, size, goal).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        self.compare(&found, cost, value);
        let device = Tensor::from_slice(gpu(), cost, size).assignments_by(goal, true);
        self.compare(&device.unwrap_or_else(|e| panic!("{}: {e}", self.name))[0], cost, value);
    }

    fn compare<E: Cost>(&self, found: &Assignment, cost: &[E], value: &str) {
        let (name, want) = (self.name, self.value(value));
        // A few roundoffs of f64 on the scale of the entries.
        let finite = cost.iter().map(|c| c.to_f64().abs()).filter(|c| c.is_finite());
        let bound = 1e-13 * found.columns.len() as f64 * finite.fold(0.0, f64::max);
        assert!((found.value - want).abs() <= bound, "{name}.{value}: {} of {want}", found.value);
        assert!(found.exact, "{name}.{value}: gap {}", found.gap);
        if self.unique {
            let want: BTreeSet<_> = self.whole("rows").into_iter().zip(self.whole("cols")).collect();
            let pairs = found.columns.iter().enumerate();
            let got: BTreeSet<_> = pairs.filter_map(|(i, j)| Some((i as i32, (*j)? as i32))).collect();
            assert_eq!(got, want, "{name}: the only best assignment");
        }
    }
}

fn lap(path: &Path) {
    let file = File::open(path).unwrap_or_else(|e| panic!("{e}"));
    let text = std::fs::read_to_string(path.with_file_name("info.json")).unwrap_or("null".into());
    let info: serde_json::Value = serde_json::from_str(&text).expect("info.json is JSON");
    let names: BTreeSet<&str> = file.names().filter_map(|name| name.strip_suffix(".value")).collect();
    assert!(!names.is_empty(), "no NAME.value in {}", path.display());
    for name in names {
        let unique = info["lap"][name]["margin"].as_f64().is_some_and(|margin| margin > 0.0);
        Problem { file: &file, name, unique }.check();
    }
}
