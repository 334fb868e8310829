//! The accuracies as tables and as a picture.

use plotters::prelude::*;
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;
use tiebeam::chart::{self, Area, COLOURS, Drawing};
use tiebeam::{Result, files};

/// The parts of the table, with their titles, and whether the mean over the columns says something.
const PARTS: [(&str, &str, bool); 8] = [
    ("ends", "before merging", true),
    ("merge", "all five networks", true),
    ("signature", "a signature added to a network of clean images", false),
    ("pair", "two networks of different seeds, each of one half of the classes", true),
    ("negation", "one half of the classes is to be forgotten", false),
    ("reversible", "each task's network, rebuilt from a common basis", true),
    ("trend", "more and more networks, the mean over those that are merged", false),
    ("three", "three networks from three seeds, matched to the first", false),
];

/// A method's accuracies over the seeds.
struct Row {
    method: String,
    /// Per column, one number for each seed.
    columns: Vec<(String, Vec<f64>)>,
}

impl Row {
    /// The mean over columns for each seed.
    fn means(&self) -> Vec<f64> {
        let seeds = self.columns.first().map_or(0, |(_, all)| all.len());
        let mean =
            |s: usize| self.columns.iter().map(|(_, all)| all[s]).sum::<f64>() / self.columns.len() as f64;
        (0..seeds).map(mean).collect()
    }
}

fn mean(all: &[f64]) -> f64 {
    all.iter().sum::<f64>() / all.len().max(1) as f64
}

fn ends(all: &[f64]) -> [f64; 2] {
    [all.iter().copied().fold(f64::INFINITY, f64::min), all.iter().copied().fold(f64::NEG_INFINITY, f64::max)]
}

fn rows(lines: &[Value], part: &str) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for line in lines.iter().filter(|line| line["part"] == part) {
        // The cost of a partly merged network differs a little between seeds.
        let method = line["method"].as_str().unwrap_or("").split(", cost").next().unwrap_or("").to_string();
        let Some(accuracy) = line["accuracy"].as_object() else { continue };
        let at = rows.iter().position(|row| row.method == method).unwrap_or_else(|| {
            rows.push(Row { method, columns: Vec::new() });
            rows.len() - 1
        });
        for (name, value) in accuracy {
            let value = value.as_f64().unwrap_or(f64::NAN);
            let columns = &mut rows[at].columns;
            match columns.iter_mut().find(|(own, _)| own == name) {
                Some((_, all)) => all.push(value),
                None => columns.push((name.clone(), vec![value])),
            }
        }
    }
    rows
}

/// Prints the tables, and writes them and the picture beside the lines.
pub fn show(lines: &[Value], out: &Path) -> Result<()> {
    let mut text = String::new();
    for (part, title, has_mean) in PARTS {
        let rows = rows(lines, part);
        let Some(first) = rows.first() else { continue };
        let heads: String = first.columns.iter().map(|(name, _)| format!(" {name} |")).collect();
        let (end, rule) = if has_mean { (" mean | least to most |", "---|---|") } else { ("", "") };
        let _ = write!(text, "| {title} |{heads}{end}\n|---|{}{rule}\n", "---|".repeat(first.columns.len()));
        for row in &rows {
            let range = |all: &[f64]| {
                let [least, most] = ends(all);
                format!("{least:.3} to {most:.3}")
            };
            let cell = |(_, all): &(String, Vec<f64>)| match has_mean {
                true => format!(" {:.3} |", mean(all)),
                false => format!(" {:.3} ({}) |", mean(all), range(all)),
            };
            let cells: String = row.columns.iter().map(cell).collect();
            let means = row.means();
            let last =
                if has_mean { format!(" {:.3} | {} |", mean(&means), range(&means)) } else { String::new() };
            let _ = writeln!(text, "| {} |{cells}{last}", row.method);
        }
        text.push('\n');
    }
    println!("{text}");
    files::replace_with(&out.join("table.md"), text)?;
    let picture = out.join("merge-zoo.svg");
    let merges: Vec<Row> = [rows(lines, "ends"), rows(lines, "merge")].into_iter().flatten().collect();
    chart::picture(&picture, (900, 60 + 30 * merges.len() as u32), |area| draw(area, &merges))?;
    println!("wrote {}", picture.display());
    Ok(())
}

/// Draws the mean over tasks of each method: a dot for each seed, and a line over all.
fn draw(area: &Area, rows: &[Row]) -> Drawing {
    let all: Vec<Vec<f64>> = rows.iter().map(Row::means).collect();
    let [low, _] = ends(&all.concat());
    let left = (10.0 * low).floor() / 10.0;
    let mut chart = ChartBuilder::on(area)
        .caption("Mean accuracy over five tasks, each dot a seed", ("sans-serif", 17))
        .margin(12)
        .margin_right(24)
        .x_label_area_size(40)
        .y_label_area_size(190)
        .build_cartesian_2d(left..1.0, (rows.len() as f64 - 0.5)..-0.5)?;
    chart
        .configure_mesh()
        .x_desc("accuracy on the test images")
        .disable_y_mesh()
        .y_labels(0)
        .x_label_formatter(&|x| format!("{x:.2}"))
        .light_line_style(WHITE)
        .draw()?;
    for (i, (row, means)) in rows.iter().zip(&all).enumerate() {
        let (colour, y, [least, most]) = (COLOURS[i % COLOURS.len()], i as f64, ends(means));
        chart.draw_series([PathElement::new([(least, y), (most, y)], colour.stroke_width(2))])?;
        chart.draw_series(means.iter().map(|&x| Circle::new((x, y), 4, colour.filled())))?;
        let style = ("sans-serif", 14).into_font().color(&colour);
        let label = Text::new(row.method.clone(), (-186, -7), style);
        chart.draw_series([EmptyElement::at((left, y)) + label])?;
    }
    Ok(())
}
