//! Draws curves of losses between models as SVG. Needs the feature `plot`.

use plotters::coord::Shift;
use plotters::prelude::*;
use std::error::Error;

/// A named line.
pub struct Curve {
    /// Its name in the legend.
    pub label: String,
    /// Points `(x, y)` from left to right.
    pub points: Vec<(f64, f64)>,
}

/// Curves over one pair of axes.
pub struct Panel {
    /// The title above it.
    pub title: String,
    /// Label of the vertical axis.
    pub y: String,
    /// The curves. Their order gives their colours, and every other one is dashed, so that two that coincide are both seen.
    pub curves: Vec<Curve>,
}

/// Colours that are dark enough on white and that people with red-green colour blindness can distinguish.
const COLOURS: [RGBColor; 5] = [
    RGBColor(190, 50, 50),
    RGBColor(180, 120, 10),
    RGBColor(31, 97, 168),
    RGBColor(90, 90, 90),
    RGBColor(20, 20, 20),
];

/// Height of the legend above the panels.
const LEGEND: u32 = 28;

/// Draws panels side by side under one legend, which lists the first panel's curves. `x` labels the horizontal axes.
///
/// # Errors
/// When a panel has no points or a number that is not finite, and the errors of the drawing library.
pub fn svg(panels: &[Panel], x: &str) -> Result<String, String> {
    for panel in panels {
        let mut points = panel.curves.iter().flat_map(|curve| &curve.points).peekable();
        if points.peek().is_none() || points.any(|(x, y)| !x.is_finite() || !y.is_finite()) {
            return Err(format!(
                "nothing can be drawn for `{}`: no points, or losses that are not finite",
                panel.title
            ));
        }
    }
    let mut text = String::new();
    draw(&mut text, panels, x).map_err(|e| format!("the picture could not be drawn: {e}"))?;
    Ok(text)
}

fn draw(text: &mut String, panels: &[Panel], x: &str) -> Result<(), Box<dyn Error>> {
    let count = panels.len().max(1);
    let root = SVGBackend::with_string(text, (340 * count as u32 + 40, 340 + LEGEND)).into_drawing_area();
    root.fill(&WHITE)?;
    let (top, below) = root.split_vertically(LEGEND);
    let mut x0 = 20;
    let first = panels.iter().take(1).flat_map(|panel| &panel.curves);
    for (i, (curve, colour)) in first.zip(COLOURS.iter().cycle()).enumerate() {
        let parts: &[(i32, i32)] = if is_dashed(i) { &[(0, 6), (11, 17)] } else { &[(0, 18)] };
        for (from, to) in parts {
            top.draw(&PathElement::new([(x0 + from, 16), (x0 + to, 16)], colour.stroke_width(2)))?;
        }
        top.draw(&Text::new(curve.label.clone(), (x0 + 24, 10), ("sans-serif", 13)))?;
        x0 += 44 + 7 * curve.label.chars().count() as i32;
    }
    for (area, panel) in below.split_evenly((1, count)).iter().zip(panels) {
        one(area, panel, x)?;
    }
    root.present()?;
    Ok(())
}

fn one(area: &DrawingArea<SVGBackend, Shift>, panel: &Panel, x: &str) -> Result<(), Box<dyn Error>> {
    let all = || panel.curves.iter().flat_map(|curve| curve.points.iter().copied());
    let high = all().map(|p| p.1).fold(1e-6, f64::max) * 1.05;
    let low = all().map(|p| p.1).fold(0.0, f64::min) * 1.05;
    let (left, right) =
        all().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), p| (low.min(p.0), high.max(p.0)));
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 15))
        .margin(10)
        .x_label_area_size(34)
        .y_label_area_size(46)
        .build_cartesian_2d(left..right, low..high)?;
    let digits = if high < 0.2 { 3 } else { 2 };
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(&panel.y)
        .x_labels(5)
        .x_label_formatter(&|x| format!("{x:.2}"))
        .y_label_formatter(&|y| format!("{y:.digits$}"))
        .light_line_style(WHITE)
        .draw()?;
    for (i, (curve, colour)) in panel.curves.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let (points, style) = (curve.points.iter().copied(), colour.stroke_width(2));
        match is_dashed(i) {
            true => chart.draw_series(DashedLineSeries::new(points, 6, 5, style))?,
            false => chart.draw_series(LineSeries::new(points, style))?,
        };
    }
    Ok(())
}

fn is_dashed(curve: usize) -> bool {
    curve % 2 == 1
}
