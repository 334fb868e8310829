//! Tables of token vectors that are read by token: row `t` of what is read is the model's row for token `t` of the output.

use crate::error::{Error, Result};
use crate::store::Shards;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// For rows of the output, the rows of models that stand in where a model lacks the token, by the model's number: their mean. None is 0.
pub(super) type Fills = HashMap<usize, Vec<(usize, u32)>>;

/// A tensor of a model with the rows of the output.
#[derive(Clone, Debug)]
pub(super) struct ByToken {
    /// Its name in the model's file.
    pub name: String,
    /// Its shape with the rows of the output, of which no axis is 0.
    pub shape: Vec<usize>,
    /// For each row of the output the model's row, if it has one.
    pub rows: Arc<Vec<Option<u32>>>,
    /// What stands for the other rows.
    pub fills: Arc<Fills>,
    /// The tensors of all models that have the same place, with their names, by the model's number.
    pub donors: Vec<Option<(Arc<Shards>, String)>>,
}

impl ByToken {
    /// Reads a range of elements to the host. Only the rows that it touches are read.
    pub fn values(&self, own: &Shards, range: Range<usize>) -> Result<Vec<f32>> {
        let columns: usize = self.shape[1..].iter().product();
        if range.end > self.rows.len() * columns {
            let (name, shape) = (&self.name, &self.shape);
            return Err(Error::config(format!("tensor `{name}` {shape:?} has no elements {range:?}")));
        }
        let (file, name) = own.find(&self.name)?;
        let mut all = Vec::with_capacity(range.len());
        let mut at = range.start;
        while at < range.end {
            let (row, first) = (at / columns, at % columns);
            let mut end = (row + 1) * columns;
            if let Some(source) = self.rows[row] {
                // Rows that follow each other in the file too are read at once.
                let mut next = source as usize + 1;
                while end < range.end && self.rows[end / columns] == Some(next as u32) {
                    (next, end) = (next + 1, end + columns);
                }
                end = end.min(range.end);
                let start = source as usize * columns + first;
                all.extend(file.range_f32(name, start..start + end - at)?);
            } else {
                end = end.min(range.end);
                all.extend(self.filled(row, columns, first..first + end - at)?);
            }
            at = end;
        }
        Ok(all)
    }

    /// Elements of a row that the model does not have.
    fn filled(&self, row: usize, columns: usize, range: Range<usize>) -> Result<Vec<f32>> {
        let sources = self.fills.get(&row).map_or(&[][..], |all| all);
        let mut sum = vec![0.0f32; range.len()];
        for &(model, row) in sources {
            // That every model in the list has the tensor was checked when the list was made.
            let Some((donor, name)) = &self.donors[model] else { continue };
            let (file, name) = donor.find(name)?;
            let start = row as usize * columns;
            let values = file.range_f32(name, start + range.start..start + range.end)?;
            if sources.len() == 1 {
                return Ok(values);
            }
            sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
        }
        let count = sources.len().max(1) as f32;
        Ok(sum.into_iter().map(|sum| sum / count).collect())
    }
}
