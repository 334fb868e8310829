//! The pictures: true and predicted paths, and the learning curves.

use crate::data::{PARTICLES, Split};
use crate::train::Epoch;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use std::path::Path;
use tiebeam::Result;
use tiebeam::chart::{self, COLOURS, Drawing, Frame, Line};
use tiebeam::gpu::AdapterSummary;

/// Number of systems in the picture, the first ones of the test set.
const SHOWN: usize = 6;

/// Draws true paths in the plane of the first two axes, and the predicted end of each.
pub fn trajectories(path: &Path, split: &Split, predicted: &[f32]) -> Result<()> {
    chart::picture(path, (930, 660), |root| {
        let (head, rest) = root.split_vertically(34);
        let title = "Paths over 1000 steps (line), true end (dot), predicted end (cross); + red, - blue; x and y of 3-D";
        head.draw_text(title, &("sans-serif", 17).into_text_style(&head), (14, 10))?;
        for (i, area) in rest.split_evenly((2, 3)).iter().enumerate().take(SHOWN.min(split.len())) {
            let error = split.rows(&[i]).error(&predicted[i * 3 * PARTICLES..][..3 * PARTICLES]);
            let frames = split.path(i, 20);
            let ends: Vec<(f64, f64)> = predicted[i * 3 * PARTICLES..][..3 * PARTICLES]
                .chunks_exact(3)
                .map(|x| (x[0] as f64, x[1] as f64))
                .collect();
            let all = frames.iter().flatten().map(|x| (x[0], x[1])).chain(ends.iter().copied());
            let reach = all.fold(0.5f64, |most, (x, y)| most.max(x.abs()).max(y.abs())) * 1.08;
            let mut panel = ChartBuilder::on(area)
                .caption(format!("system {i}: squared error {error:.1e}"), ("sans-serif", 14))
                .margin(8)
                .x_label_area_size(18)
                .y_label_area_size(28)
                .build_cartesian_2d(-reach..reach, -reach..reach)?;
            panel.configure_mesh().disable_mesh().x_labels(5).y_labels(5).draw()?;
            let charge = &split.charge[i * PARTICLES..][..PARTICLES];
            particles(&mut panel, &frames, &ends, charge)?;
        }
        Ok(())
    })
}

type Panel<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn particles(panel: &mut Panel, frames: &[Vec<[f64; 3]>], ends: &[(f64, f64)], charge: &[f32]) -> Drawing {
    for (n, &end) in ends.iter().enumerate() {
        let colour = if charge[n] > 0.0 { COLOURS[1] } else { COLOURS[0] };
        let path: Vec<(f64, f64)> = frames.iter().map(|x| (x[n][0], x[n][1])).collect();
        let last = path[path.len() - 1];
        panel.draw_series(LineSeries::new(path, colour.stroke_width(1)))?;
        panel.draw_series([Circle::new(last, 3, colour.filled())])?;
        panel.draw_series([Cross::new(end, 4, BLACK.stroke_width(1))])?;
    }
    Ok(())
}

/// Draws the validation error by epoch, the final test errors and the error of the best straight line.
pub fn curves(
    path: &Path,
    runs: &[(&str, Vec<Epoch>, f64)],
    linear: f64,
    adapter: &AdapterSummary,
) -> Result<()> {
    let last = runs.iter().map(|r| r.1.len()).max().unwrap_or(1).max(2) as f64;
    let mut all = Vec::new();
    for (name, curve, test) in runs {
        let points = curve.iter().enumerate().map(|(i, e)| (i as f64 + 1.0, e[1])).collect();
        all.push(Line::new(format!("{name}, validation (test {test:.4})"), points));
    }
    all.push(Line::level(format!("x + a v: {linear:.4}"), linear, [1.0, last]));
    all.push(Line::level("EGNN, published: 0.0070", 0.0070, [1.0, last]));
    all.push(Line::level("PONITA, published: 0.0043", 0.0043, [1.0, last]));
    let title = format!("Charged particles, 1000 steps ahead ({})", adapter.name);
    let frame = Frame { title: &title, x: "epoch", y: "mean squared error of positions", logarithmic: true };
    chart::lines(path, &frame, &all)
}
