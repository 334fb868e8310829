//! The results of a zoo: lines of JSON, a table, a picture.

use super::variants::Variant;
use crate::context::Context;
use plotters::prelude::*;
use serde_json::Value;
use std::path::Path;
use tiebeam::chart::{self, Area, COLOURS, Drawing};
use tiebeam::{Error, Result, files};

/// The runs of one variant.
struct Summary<'a> {
    variant: &'a Variant,
    stored: u64,
    losses: Vec<f64>,
    seconds: f64,
    adapted: bool,
}

impl Summary<'_> {
    fn mean(&self) -> f64 {
        self.losses.iter().sum::<f64>() / self.losses.len() as f64
    }

    fn range(&self) -> [f64; 2] {
        let low = self.losses.iter().copied().fold(f64::INFINITY, f64::min);
        [low, self.losses.iter().copied().fold(f64::NEG_INFINITY, f64::max)]
    }

    /// How it stands to another: apart only if their ranges are, with two runs of each at least.
    fn beside(&self, other: &Summary) -> String {
        let ([a, b], [c, d]) = (self.range(), other.range());
        let apart = self.losses.len() > 1 && other.losses.len() > 1;
        let by = self.mean() - other.mean();
        match () {
            () if self.variant.name == other.variant.name => String::new(),
            () if apart && b < c => format!("{:.3} better than {}", -by, other.variant.name),
            () if apart && a > d => format!("{by:.3} worse than {}", other.variant.name),
            () => format!("not apart from {} ({by:+.3})", other.variant.name),
        }
    }
}

/// Reads earlier results. A line that cannot be read is an error, since the file is written anew.
pub fn read(path: &Path) -> Result<Vec<Value>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(path, error)),
    };
    parse(path, &text)
}

/// Reads the lines of a file.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Value>> {
    let line = |(i, line): (usize, &str)| {
        let wrong = |error: serde_json::Error| {
            Error::format(path, format!("line {}: {error}; name another --out", i + 1))
        };
        serde_json::from_str(line).map_err(wrong)
    };
    text.lines().enumerate().map(line).collect()
}

/// Prints the table, and writes it and the picture.
pub fn show(context: &Context, out: &Path, variants: &[Variant], records: &[Value]) -> Result<()> {
    let all: Vec<Summary> = variants.iter().filter_map(|variant| summary(variant, records)).collect();
    let mut text = String::from(
        "| model | stored | held out, mean (least to most) | runs | seconds | beside its baseline | |\n|---|---|---|---|---|---|---|\n",
    );
    for s in &all {
        let other = all.iter().find(|other| other.variant.name == s.variant.beside);
        let (beside, [low, high]) = (other.map_or_else(String::new, |other| s.beside(other)), s.range());
        text += &format!(
            "| {} | {} | {:.4} ({low:.4} to {high:.4}) | {} | {:.0} | {beside} | {} |\n",
            s.variant.name,
            s.stored,
            s.mean(),
            s.losses.len(),
            s.seconds,
            s.variant.what
        );
    }
    context.result(&text);
    let path = out.join("table.md");
    files::replace_with(&path, &text)?;
    context.note(format_args!("wrote {}", path.display()));
    let parts =
        [(false, "zoo.svg", "trained from scratch"), (true, "adapters.svg", "adapted to another text")];
    for (adapted, name, title) in parts {
        // What was trained for fewer steps has another budget.
        let same = |s: &&Summary| s.adapted == adapted && !s.variant.is_short();
        let shown: Vec<&Summary> = all.iter().filter(same).collect();
        if shown.len() > 1 {
            let picture = out.join(name);
            let title = format!("{title}: loss and stored numbers, one budget");
            chart::picture(&picture, (980, 620), |area| draw(area, &shown, &title))?;
            context.note(format_args!("wrote {}", picture.display()));
        }
    }
    Ok(())
}

fn summary<'a>(variant: &'a Variant, records: &[Value]) -> Option<Summary<'a>> {
    let own: Vec<&Value> = records.iter().filter(|record| record["variant"] == variant.name[..]).collect();
    let last = own.last()?;
    let number = |record: &&Value, key: &str| record[key].as_f64().unwrap_or(f64::NAN);
    Some(Summary {
        variant,
        stored: last["stored"].as_u64()?,
        losses: own.iter().map(|record| number(record, "validation")).collect(),
        seconds: own.iter().map(|record| number(record, "seconds")).sum::<f64>() / own.len() as f64,
        adapted: last["adapted"] == true,
    })
}

/// Draws each variant's runs over the logarithm of what it stores.
fn draw(area: &Area, all: &[&Summary], title: &str) -> Drawing {
    let finite = |s: &&&Summary| s.losses.iter().all(|loss| loss.is_finite());
    let shown: Vec<&&Summary> = all.iter().filter(finite).collect();
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for [least, most] in shown.iter().map(|s| s.range()) {
        (low, high) = (low.min(least), high.max(most));
    }
    let places: Vec<f64> = shown.iter().map(|s| (s.stored.max(1) as f64).log10()).collect();
    let left = places.iter().copied().fold(f64::INFINITY, f64::min) - 0.08;
    let right = places.iter().copied().fold(f64::NEG_INFINITY, f64::max) + 0.25;
    let room = (high - low).max(0.01) * 0.08;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(58)
        .build_cartesian_2d(left..right, low - room..high + room)?;
    chart
        .configure_mesh()
        .x_desc("stored numbers (logarithmic)")
        .y_desc("held-out loss, nats a byte")
        .x_label_formatter(&|x| readable(10f64.powf(*x)))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .light_line_style(WHITE)
        .draw()?;
    let labels = apart(&shown, &places, (high - low + 2.0 * room) / 34.0);
    for (i, ((s, &x), y)) in shown.iter().zip(&places).zip(labels).enumerate() {
        let (colour, [least, most]) = (COLOURS[i % COLOURS.len()], s.range());
        chart.draw_series([PathElement::new([(x, least), (x, most)], colour.stroke_width(2))])?;
        chart.draw_series(s.losses.iter().map(|&loss| Circle::new((x, loss), 3, colour.filled())))?;
        if y != s.mean() {
            let line = [(x, s.mean()), (x + 0.012, y)];
            chart.draw_series([PathElement::new(line, colour.mix(0.3))])?;
        }
        let label = Text::new(s.variant.name.clone(), (8, -6), ("sans-serif", 13).into_font().color(&colour));
        chart.draw_series([EmptyElement::at((x, y)) + label])?;
    }
    Ok(())
}

/// Heights of labels near their means, moved so that those of near places do not cover each other.
fn apart(all: &[&&Summary], places: &[f64], least: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by(|&a, &b| all[a].mean().total_cmp(&all[b].mean()));
    let mut heights = vec![0.0; all.len()];
    let mut set: Vec<usize> = Vec::new();
    for i in order {
        let mut y = all[i].mean();
        // The lowest free height above its own.
        while let Some(&other) = set
            .iter()
            .find(|&&j| (places[j] - places[i]).abs() < 0.17 && (heights[j] - y).abs() < least * 0.999)
        {
            y = heights[other] + least;
        }
        heights[i] = y;
        set.push(i);
    }
    heights
}

/// 1.2 M, 430 k.
fn readable(n: f64) -> String {
    match n {
        n if n >= 1e6 => format!("{:.1} M", n / 1e6),
        n if n >= 1e3 => format!("{:.0} k", n / 1e3),
        n => format!("{n:.0}"),
    }
}
