//! The loss curve as SVG.

use plotters::prelude::*;
use std::path::Path;

/// Losses that are drawn as lines for comparison.
pub struct Lines {
    pub unigram: f64,
    pub bigram: f64,
    pub validation: f64,
}

/// Draws the training loss by step (raw, and smoothed over 2% of the run), the baselines and the final validation loss.
pub fn loss_curve(path: &Path, losses: &[(usize, f32)], lines: &Lines, title: &str) -> Result<(), String> {
    draw(path, losses, lines, title).map_err(|e| format!("{}: {e}", path.display()))
}

fn draw(
    path: &Path,
    losses: &[(usize, f32)],
    lines: &Lines,
    title: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (820, 460)).into_drawing_area();
        root.fill(&WHITE)?;
        let first = losses.first().map_or(0, |l| l.0) as f64;
        let last = losses.last().map_or(1, |l| l.0).max(1) as f64;
        let highest = losses.iter().map(|l| l.1 as f64).fold(lines.unigram, f64::max) * 1.03;
        let lowest =
            losses.iter().map(|l| l.1 as f64).fold(lines.validation.min(lines.bigram), f64::min) * 0.95;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 17))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(52)
            .build_cartesian_2d(first..last, lowest..highest)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("loss, nats per byte")
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.1}"))
            .light_line_style(WHITE)
            .draw()?;
        let points = || losses.iter().map(|&(step, loss)| (step as f64, loss as f64));
        let blue = RGBColor(31, 97, 168);
        chart.draw_series(LineSeries::new(points(), blue.mix(0.25)))?;
        let window = (losses.len() / 50).max(1);
        let smooth: Vec<(f64, f64)> = losses
            .windows(window)
            .map(|w| (w[w.len() - 1].0 as f64, w.iter().map(|l| l.1 as f64).sum::<f64>() / w.len() as f64))
            .collect();
        chart
            .draw_series(LineSeries::new(smooth, blue.stroke_width(2)))?
            .label("training")
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], blue.stroke_width(2)));
        let level = |y: f64| [(first, y), (last, y)];
        let named = [
            ("unigram", lines.unigram, RGBColor(150, 150, 150)),
            ("bigram", lines.bigram, RGBColor(200, 110, 20)),
            ("validation, all held-out bytes", lines.validation, RGBColor(40, 140, 70)),
        ];
        for (name, y, color) in named {
            chart
                .draw_series(DashedLineSeries::new(level(y), 6, 4, color.stroke_width(2)))?
                .label(format!("{name}: {y:.3}"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .draw()?;
        root.present()?;
    }
    Ok(tiebeam::files::replace_with(path, svg)?)
}
