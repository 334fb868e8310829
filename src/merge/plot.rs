//! Curves of losses between models, as SVG. Needs the feature `cli`.

use plotters::coord::Shift;
use plotters::prelude::*;
use std::error::Error;

/// A named line.
pub struct Curve {
    /// What it shows.
    pub label: String,
    /// `(x, y)` from left to right.
    pub points: Vec<(f64, f64)>,
}

/// Lines over one pair of axes.
pub struct Panel {
    /// Above it.
    pub title: String,
    /// Beside the vertical axis.
    pub y: String,
    /// Drawn in the order given, which also fixes colours.
    pub curves: Vec<Curve>,
}

/// Dark enough for text on white, told apart by those who do not see red from green.
const COLOURS: [RGBColor; 5] = [
    RGBColor(190, 50, 50),
    RGBColor(180, 120, 10),
    RGBColor(90, 90, 90),
    RGBColor(31, 97, 168),
    RGBColor(20, 20, 20),
];

/// Panels side by side, the legend in the first.
///
/// # Errors
/// What the drawing library says, as a sentence.
pub fn svg(panels: &[Panel], x: &str) -> Result<String, String> {
    let mut text = String::new();
    draw(&mut text, panels, x).map_err(|e| format!("the picture could not be drawn: {e}"))?;
    Ok(text)
}

fn draw(text: &mut String, panels: &[Panel], x: &str) -> Result<(), Box<dyn Error>> {
    let count = panels.len().max(1);
    let root = SVGBackend::with_string(text, (340 * count as u32 + 40, 340)).into_drawing_area();
    root.fill(&WHITE)?;
    for (i, (area, panel)) in root.split_evenly((1, count)).iter().zip(panels).enumerate() {
        one(area, panel, x, i == 0)?;
    }
    root.present()?;
    Ok(())
}

fn one(
    area: &DrawingArea<SVGBackend, Shift>,
    panel: &Panel,
    x: &str,
    legend: bool,
) -> Result<(), Box<dyn Error>> {
    let all = || panel.curves.iter().flat_map(|curve| curve.points.iter().copied());
    let high = all().map(|p| p.1).fold(f64::MIN_POSITIVE, f64::max) * 1.05;
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
    for (curve, colour) in panel.curves.iter().zip(COLOURS.iter().cycle().copied()) {
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), colour.stroke_width(2)))?
            .label(&curve.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    if legend {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .draw()?;
    }
    Ok(())
}
