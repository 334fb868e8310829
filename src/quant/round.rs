//! Rounds a matrix, group by group.

use super::search::{Form, Grid, Rounding, best};
use crate::error::{Error, Result};

/// A matrix of levels with their scales.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Rounded {
    /// How it was rounded.
    pub rounding: Rounding,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// The level of each weight, row by row.
    pub levels: Vec<u8>,
    /// The scale of each group, row by row, as stored. The last group of a row may be shorter.
    pub scales: Vec<f32>,
    /// The offset of each group: `w = scale q + offset`.
    pub offsets: Vec<f32>,
    /// The level that stands for 0 in each group. Empty in other forms than [`Form::Zero`].
    pub zeros: Vec<u8>,
    /// The sum of squared errors.
    pub error: f64,
}

impl Rounded {
    /// Columns of a group.
    pub fn group(&self) -> usize {
        self.rounding.group.unwrap_or(self.shape[1]).max(1)
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.shape[1].div_ceil(self.group())
    }

    /// The weights that the levels stand for.
    pub fn values(&self) -> Vec<f32> {
        let (columns, group, groups) = (self.shape[1], self.group(), self.groups());
        let value = |(i, &level): (usize, &u8)| {
            let g = i / columns * groups + i % columns / group;
            self.scales[g].mul_add(f32::from(level), self.offsets[g])
        };
        self.levels.iter().enumerate().map(value).collect()
    }
}

/// The rounded rows that one thread makes.
#[derive(Default)]
struct Part {
    levels: Vec<u8>,
    grids: Vec<Grid>,
    /// Squared errors of each row.
    errors: Vec<f64>,
}

/// Rounds a matrix of so many rows and columns. `name` is that of the tensor. The result does not depend on the number of
/// threads.
///
/// # Errors
/// [`Error::Config`] for bits, group or power that are not possible, for another number of weights, for a weight that is NaN or
/// infinite, and for weights that are too large for scales of the type in which they are stored.
pub fn round(name: &str, w: &[f32], shape: [usize; 2], rounding: &Rounding) -> Result<Rounded> {
    round_from(0, name, w, shape, rounding)
}

/// [`round`] of some rows of a matrix, the first of which is row `first`, so that errors name rows as the matrix has them.
pub(super) fn round_from(
    first: usize,
    name: &str,
    w: &[f32],
    shape: [usize; 2],
    rounding: &Rounding,
) -> Result<Rounded> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    round_on([threads, first], name, w, shape, rounding)
}

/// [`round_from`] with so many threads.
fn round_on(
    [threads, first_row]: [usize; 2],
    name: &str,
    w: &[f32],
    shape: [usize; 2],
    rounding: &Rounding,
) -> Result<Rounded> {
    rounding.check()?;
    let [rows, columns] = shape;
    let wrong = |message: String| Error::config(format!("quant: tensor `{name}`: {message}"));
    if rows.checked_mul(columns) != Some(w.len()) {
        return Err(wrong(format!("{} weights for {rows} rows of {columns}", w.len())));
    }
    if let Some(i) = w.iter().position(|x| !x.is_finite()) {
        return Err(wrong(format!(
            "the weight in row {} at column {} is {}; only numbers can be rounded",
            first_row + i / columns,
            i % columns,
            w[i]
        )));
    }
    let group = rounding.group.unwrap_or(columns).max(1);
    let per_thread = rows.div_ceil(threads.max(1)).max(1) * columns.max(1);
    let parts: Vec<Result<Part, [usize; 2]>> = std::thread::scope(|scope| {
        let start = |(i, w)| {
            let first = first_row + i * per_thread / columns.max(1);
            scope.spawn(move || round_rows(w, first, columns, group, rounding))
        };
        let started: Vec<_> = w.chunks(per_thread).enumerate().map(start).collect();
        // A panic of a thread is one of this function.
        started.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
    });
    let mut all = Part::default();
    for part in parts {
        let part = part.map_err(|[r, c]| {
            let stored = rounding.stored;
            wrong(format!(
                "the weights in row {r} from column {c} are too large for scales in {stored:?}; store BF16 or F32"
            ))
        })?;
        all.levels.extend(part.levels);
        all.grids.extend(part.grids);
        all.errors.extend(part.errors);
    }
    let zeros =
        if rounding.form == Form::Zero { all.grids.iter().map(|g| g.zero).collect() } else { Vec::new() };
    Ok(Rounded {
        rounding: *rounding,
        shape,
        levels: all.levels,
        scales: all.grids.iter().map(|g| g.scale).collect(),
        offsets: all.grids.iter().map(|g| g.offset).collect(),
        zeros,
        error: all.errors.iter().sum(),
    })
}

/// Rounds whole rows, the first of which is row `first`. An error is the row and column of a group without a scale.
fn round_rows(
    w: &[f32],
    first: usize,
    columns: usize,
    group: usize,
    rounding: &Rounding,
) -> Result<Part, [usize; 2]> {
    let mut part = Part { levels: Vec::with_capacity(w.len()), ..Part::default() };
    for (r, row) in w.chunks(columns.max(1)).enumerate() {
        let mut error = 0.0;
        for (g, w) in row.chunks(group).enumerate() {
            let grid = best(w, rounding).ok_or([first + r, g * group])?;
            for &x in w {
                let level = grid.level(x);
                error += f64::from(x - grid.value(level)).powi(2);
                part.levels.push(level);
            }
            part.grids.push(grid);
        }
        part.errors.push(error);
    }
    Ok(part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::scratch::root;
    use crate::quant::Stored;
    use crate::store::File;

    fn source() -> Vec<f32> {
        let file = File::open(root().join("tests/vectors/gguf/blocks.safetensors")).unwrap();
        file.tensor_f32("source").unwrap()
    }

    fn error(w: &[f32], other: &[f32]) -> f64 {
        w.iter().zip(other).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    const FORMS: [Form; 3] = [Form::Symmetric, Form::Affine, Form::Zero];

    #[test]
    fn errors_are_those_of_the_values_and_fall_with_bits() {
        let w = source();
        for form in FORMS {
            for group in [Some(32), Some(80), None] {
                let mut last = f64::INFINITY;
                for bits in 2..=8 {
                    let rounding = Rounding { group, ..Rounding::new(bits, form) };
                    let got = round("w", &w, [3, 512], &rounding).unwrap();
                    assert!(got.levels.iter().all(|&q| u32::from(q) < 1 << bits));
                    let sum = error(&w, &got.values());
                    assert!((got.error / sum - 1.0).abs() < 1e-9, "{rounding:?}: {} {sum}", got.error);
                    assert!(got.error < 0.5 * last, "{rounding:?}: {} after {last}", got.error);
                    last = got.error;
                }
            }
        }
    }

    /// ggml's own rounding of the same weights to the same formats has at least this much more error.
    #[test]
    fn the_best_clip_is_better_than_none() {
        let w = source();
        let file = File::open(root().join("tests/vectors/gguf/blocks.safetensors")).unwrap();
        let cases = [
            ("Q4_0", 4, Form::Symmetric, 0.9),
            ("Q4_1", 4, Form::Affine, 0.9),
            ("Q5_0", 5, Form::Symmetric, 0.95),
            ("Q5_1", 5, Form::Affine, 0.97),
            ("Q8_0", 8, Form::Symmetric, 1.0),
        ];
        for (name, bits, form, part) in cases {
            let theirs = error(&w, &file.tensor_f32(&format!("{name}.quantized.values")).unwrap());
            let ours = round("w", &w, [3, 512], &Rounding::new(bits, form)).unwrap().error;
            assert!(ours <= part * theirs, "{name}: {ours} of {theirs}");
        }
    }

    #[test]
    fn levels_are_the_nearest_ones() {
        let w = source();
        for form in FORMS {
            let got = round("w", &w, [3, 512], &Rounding::new(3, form)).unwrap();
            for (i, (&x, &level)) in w.iter().zip(&got.levels).enumerate() {
                let distance = |q: u8| (x - (got.scales[i / 32] * f32::from(q) + got.offsets[i / 32])).abs();
                let least = (0..8).map(distance).fold(f32::INFINITY, f32::min);
                assert!(distance(level) <= least * 1.000_01, "{form:?} {i}");
            }
        }
    }

    #[test]
    fn equal_weights_are_exact() {
        let rounded = |w: f32, rounding: &Rounding| {
            let got = round("w", &[w; 40], [2, 20], rounding).unwrap();
            assert!(got.values().iter().all(|&x| x == w), "{w}: {rounding:?} {:?}", got.values());
            assert_eq!(got.error, 0.0);
        };
        for form in FORMS {
            for bits in [2, 3, 4, 8] {
                let rounding = Rounding::new(bits, form);
                for w in [0.0, 1.5, -0.375, 60000.0, -6e-8] {
                    rounded(f32::from(half::f16::from_f32(w)), &rounding);
                }
                for w in [0.0, -0.1, 1e30, 1e-30] {
                    rounded(w, &rounding.stored(Stored::F32).rows());
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_the_result() {
        let w = source();
        let rounding = Rounding::new(4, Form::Affine).power(2.4);
        let one = round_on([1, 0], "w", &w, [12, 128], &rounding).unwrap();
        for threads in [2, 5, 40] {
            assert_eq!(round_on([threads, 0], "w", &w, [12, 128], &rounding).unwrap(), one);
        }
        for shape in [[0, 7], [7, 0]] {
            let none = round("none", &[], shape, &rounding).unwrap();
            assert!(none.levels.is_empty() && none.scales.is_empty() && none.values().is_empty());
        }
    }

    #[test]
    fn what_cannot_be_rounded_is_named() {
        let says = |w: &[f32], rounding: Rounding, what: &str| {
            let error = round("w", w, [2, 3], &rounding).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        let four = Rounding::new(4, Form::Symmetric);
        says(
            &[0.0, 1.0, 2.0, 3.0, f32::NAN, 5.0],
            four,
            "tensor `w`: the weight in row 1 at column 1 is NaN",
        );
        says(&[0.0; 5], four, "tensor `w`: 5 weights for 2 rows of 3");
        says(&[0.0; 6], Rounding::new(9, Form::Zero), "levels of 9 bits");
        says(&[0.0; 6], four.group(0), "groups of 0");
        says(&[0.0; 6], four.power(f32::NAN), "power of NaN");
        let large = [0.0, 1.0, 2.0, 3.0, 4.0, 3e38];
        for form in FORMS {
            let rounding = Rounding::new(4, form).group(2);
            says(
                &large,
                rounding,
                "tensor `w`: the weights in row 1 from column 2 are too large for scales in F16",
            );
        }
        // Large and tiny numbers fit scales of f32.
        let both = [1e38, -1e38, 0.0, 1.0, -1.0, 1e-40];
        for form in FORMS {
            let got = round("w", &both, [2, 3], &Rounding::new(4, form).stored(Stored::F32)).unwrap();
            assert!(got.values().iter().all(|x| x.is_finite()), "{form:?}: {got:?}");
        }
    }
}
