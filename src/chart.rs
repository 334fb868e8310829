//! Charts as SVG: lines over one axis, and pictures of your own. Needs the feature `plot`.

use crate::error::{Error, Result};
use crate::files;
use plotters::prelude::*;
use std::path::Path;

/// What drawing returns.
pub type Drawing = std::result::Result<(), Box<dyn std::error::Error>>;

/// Colours that are dark enough for text on white.
pub const COLOURS: [RGBColor; 5] = [
    RGBColor(31, 97, 168),
    RGBColor(190, 50, 50),
    RGBColor(40, 130, 70),
    RGBColor(180, 95, 10),
    RGBColor(110, 60, 160),
];

/// A line with its name in the legend.
pub struct Line {
    /// Its name.
    pub name: String,
    /// Points `(x, y)` from left to right.
    pub points: Vec<(f64, f64)>,
    /// Whether it is dashed.
    pub dashed: bool,
    /// Whether it is dots without a line.
    pub dots: bool,
}

impl Line {
    /// A line through these points.
    pub fn new(name: impl Into<String>, points: Vec<(f64, f64)>) -> Line {
        Line { name: name.into(), points, dashed: false, dots: false }
    }

    /// Dots at these points.
    pub fn dots(name: impl Into<String>, points: Vec<(f64, f64)>) -> Line {
        Line { dots: true, ..Line::new(name, points) }
    }

    /// A dashed horizontal line from one end of the chart to the other.
    pub fn level(name: impl Into<String>, y: f64, ends: [f64; 2]) -> Line {
        Line { dashed: true, ..Line::new(name, ends.map(|x| (x, y)).to_vec()) }
    }
}

/// Captions of a chart, and whether its vertical axis is logarithmic.
pub struct Frame<'a> {
    /// Above the chart.
    pub title: &'a str,
    /// Label of the horizontal axis.
    pub x: &'a str,
    /// Label of the vertical axis.
    pub y: &'a str,
    /// Whether the vertical axis is logarithmic.
    pub logarithmic: bool,
}

/// Draws a picture and writes it whole or not at all.
///
/// # Errors
/// When drawing fails, or the file cannot be written.
pub fn picture(path: &Path, size: (u32, u32), draw: impl FnOnce(&Area) -> Drawing) -> Result<()> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let drawn = root.fill(&WHITE).map_err(Into::into).and_then(|()| draw(&root));
        drawn
            .and_then(|()| root.present().map_err(Into::into))
            .map_err(|e| Error::io(path, std::io::Error::other(e.to_string())))?;
    }
    files::replace_with(path, svg)
}

/// What a picture is drawn on.
pub type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Draws lines over one horizontal axis.
///
/// # Errors
/// As [`picture`].
pub fn lines(path: &Path, frame: &Frame, all: &[Line]) -> Result<()> {
    picture(path, (820, 440), |root| draw(root, frame, all))
}

/// Formats a number with three significant digits.
fn significant(x: f64) -> String {
    // The rounding errors of repeated additions can leave up to this much instead of 0.
    if x.abs() < 1e-12 {
        return "0".into();
    }
    let digits = (2.0 - x.abs().log10().floor()).clamp(0.0, 6.0) as usize;
    let text = format!("{x:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').into(),
        false => text,
    }
}

fn draw(root: &Area, frame: &Frame, all: &[Line]) -> Drawing {
    let value = |y: f64| if frame.logarithmic { y.max(1e-300).log10() } else { y };
    let points = || all.iter().flat_map(|l| &l.points).filter(|p| p.0.is_finite() && value(p.1).is_finite());
    let range = |of: &dyn Fn(&(f64, f64)) -> f64| {
        let (low, high) =
            points().map(of).fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(x), high.max(x)));
        if low < high { (low, high) } else { (low.min(0.0) - 1.0, high.max(0.0) + 1.0) }
    };
    let (x, y) = (range(&|p| p.0), range(&|p| value(p.1)));
    // A margin leaves space for the names of lines that oscillate about a constant.
    let margin = 0.06 * (y.1 - y.0);
    let mut chart = ChartBuilder::on(root)
        .caption(frame.title, ("sans-serif", 17))
        .margin(12)
        .margin_right(28)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(
            x.0..x.1,
            y.0 - margin..y.1 + if frame.logarithmic { margin } else { 4.0 * margin },
        )?;
    let label = |y: &f64| match frame.logarithmic {
        true => significant(10f64.powf(*y)),
        false => significant(*y),
    };
    chart
        .configure_mesh()
        .x_desc(frame.x)
        .y_desc(frame.y)
        .x_label_formatter(&|x| significant(*x))
        .y_label_formatter(&label)
        .light_line_style(WHITE)
        .draw()?;
    for (i, line) in all.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let points: Vec<(f64, f64)> = line.points.iter().map(|p| (p.0, value(p.1))).collect();
        let style = colour.stroke_width(2);
        if line.dots {
            let dots = points.into_iter().map(|point| Circle::new(point, 3, colour.filled()));
            let drawn = chart.draw_series(dots)?;
            let legend = move |(x, y)| Circle::new((x + 9, y), 3, colour.filled());
            drawn.label(line.name.as_str()).legend(legend);
            continue;
        }
        let drawn = match line.dashed {
            true => chart.draw_series(DashedLineSeries::new(points, 6, 4, style))?,
            false => chart.draw_series(LineSeries::new(points, style))?,
        };
        drawn
            .label(line.name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    Ok(())
}
