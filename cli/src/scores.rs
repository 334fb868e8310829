//! Tables of what models reach at tasks.

use crate::context::Context;
use serde_json::{Value, json};
use std::path::Path;
use tiebeam::Result;
use tiebeam::merge::evaluate::{Score, Task};

/// A table with a row for each model, printed row by row.
pub struct Table<'a> {
    context: &'a Context,
    names: Vec<String>,
    begun: bool,
}

/// The least width of a column.
const WIDTH: usize = 9;

impl<'a> Table<'a> {
    pub fn new(context: &'a Context, tasks: &[Task]) -> Table<'a> {
        Table { context, names: tasks.iter().map(|task| task.name.clone()).collect(), begun: false }
    }

    /// The columns: of one task its loss and what is shown beside it, of several that of each, and their mean.
    fn columns(&self, scores: &[Score]) -> Vec<(String, f64)> {
        match scores {
            [one] => vec![("loss".into(), one.loss), (one.main_name().into(), one.main())],
            _ => {
                let mut all: Vec<(String, f64)> =
                    self.names.iter().cloned().zip(scores.iter().map(Score::main)).collect();
                if scores.windows(2).all(|pair| pair[0].main_name() == pair[1].main_name()) {
                    let mean = scores.iter().map(Score::main).sum::<f64>() / scores.len() as f64;
                    all.push(("mean".into(), mean));
                }
                all
            }
        }
    }

    /// Prints a model's row, and before the first one the heads of the columns.
    pub fn row(&mut self, model: &str, path: &Path, scores: &[Score]) -> Result<()> {
        let columns = self.columns(scores);
        let width = |name: &str| name.chars().count().max(WIDTH);
        if !self.begun {
            let heads: String = columns.iter().map(|(name, _)| format!("{name:<0$} ", width(name))).collect();
            self.context.result(format_args!("{heads}model"));
            self.begun = true;
        }
        let numbers: String =
            columns.iter().map(|(name, value)| format!("{value:<0$.4} ", width(name))).collect();
        self.context.result(format_args!("{numbers}{model}"));
        for (name, score) in self.names.iter().zip(scores) {
            self.context.record(&line(name, path, score))?;
        }
        Ok(())
    }
}

/// A score as a JSON line.
fn line(task: &str, model: &Path, score: &Score) -> Value {
    let mut line = json!({"line": "evaluated", "model": model, "task": task, "loss": score.loss});
    line[score.main_name()] = json!(score.main());
    line
}
