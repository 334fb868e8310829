//! How a model of another format becomes a GGUF file.

use super::header::Value;
use std::collections::BTreeMap;

/// Where a tensor goes in a GGUF file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// Its name there.
    pub name: String,
    /// Heads whose rows change their order: of each head, the first half and the second half alternate, as llama.cpp has the rows
    /// of `q` and `k` in the architecture `llama`.
    pub heads: Option<usize>,
}

impl Place {
    /// A place under this name, with rows in their order.
    pub fn new(name: impl Into<String>) -> Place {
        Place { name: name.into(), heads: None }
    }

    /// Changes the order of the rows of so many heads.
    #[must_use]
    pub fn heads(self, heads: usize) -> Place {
        Place { heads: Some(heads), ..self }
    }

    /// The row of the source that becomes row `row` of `rows`.
    pub fn source_row(&self, row: usize, rows: usize) -> usize {
        match self.heads {
            Some(heads) if heads > 0 && rows.is_multiple_of(2 * heads) => {
                let head = rows / heads;
                let (start, within) = (row / head * head, row % head);
                start + within % 2 * (head / 2) + within / 2
            }
            _ => row,
        }
    }
}

/// The metadata and the names of a GGUF file that is made of a model in another format.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Conversion {
    /// Metadata by their keys.
    pub metadata: Vec<(String, Value)>,
    /// Where each tensor of the model goes, by its name there. Tensors that are not in this list are left out.
    pub places: BTreeMap<String, Place>,
    /// Vectors that the model does not have.
    pub more: Vec<(String, Vec<f32>)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_heads_alternate() {
        let place = Place::new("q").heads(2);
        let rows: Vec<usize> = (0..8).map(|row| place.source_row(row, 8)).collect();
        assert_eq!(rows, [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(Place::new("v").source_row(5, 8), 5);
    }
}
