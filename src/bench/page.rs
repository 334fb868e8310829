//! Shows runs side by side in one HTML file without scripts or external resources, so that it opens offline and prints.

use super::report::digits;
use super::{Record, Run};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::error::Error;
use std::fmt::Write;

/// Colours that most colour-blind readers can distinguish, also in print (Okabe & Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x55, 0x55, 0x55),
];

/// The size of a roofline in pixels. The page scales it to its own width.
const SIZE: (u32, u32) = (740, 350);

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:62em;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em}table{border-collapse:collapse;width:100%;font-size:.9em}
th,td{padding:.2em .6em;text-align:right;border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}
svg{width:100%;height:auto}.note{color:#555;font-size:.9em}.bars td{border:0;padding:.05em .6em}.bars .first td{padding-top:.5em}
.bars td:nth-child(2){width:40%;padding:0;border-right:1px solid #e5e5e5;background:linear-gradient(90deg,#e5e5e5 1px,#0000 1px) 0/25%}
.bars td:nth-child(n+3){white-space:nowrap}
.bars b{display:block;height:.8em;print-color-adjust:exact;-webkit-print-color-adjust:exact}
@media print{body{margin:0;max-width:none}h2{break-after:avoid}svg,tr{break-inside:avoid}}";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Returns a colour in HTML's notation.
fn hex(RGBColor(r, g, b): &RGBColor) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// Returns the page of these runs: adapters and their ceilings, a roofline per run, and a bar per kernel and run.
///
/// # Errors
/// Those of the drawing library.
pub fn page(runs: &[Run]) -> Result<String, String> {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>tiebeam bench</title>\n<style>{STYLE}</style>\n\
         <h1>Tiebeam: kernels on {} adapter{}</h1>\n",
        runs.len(),
        if runs.len() == 1 { "" } else { "s" }
    );
    adapters(runs, &mut out);
    for (run, colour) in runs.iter().zip(COLOURS.iter().cycle()) {
        let _ = writeln!(out, "<h2>Roofline: {}</h2>", escape(&run.host.adapter));
        out += &roofline(run, colour).map_err(|e| format!("the picture could not be drawn: {e}"))?;
        failed(run, &mut out);
    }
    out += "<h2>Kernels</h2>\n<p class=\"note\">Bars: share of the ceiling that bounds the kernel on its own adapter, \
            max(bytes / copy, operations / fma), lines at quarters of it.</p>\n";
    bars(runs, &mut out);
    if let Some(remark) = runs.iter().find_map(Run::remark) {
        let _ = writeln!(out, "<p class=\"note\">{}.</p>", escape(remark));
    }
    Ok(out + "</html>\n")
}

/// Formats a rate in units of 10^9, or a dash if there is none.
fn giga(rate: Option<f64>, digits: usize) -> String {
    rate.map_or("-".into(), |rate| format!("{:.digits$}", rate * 1e-9))
}

/// Returns the runs as Markdown, with one table per run.
pub fn markdown(runs: &[Run]) -> String {
    let mut out = String::new();
    for run in runs {
        let (h, c) = (&run.host, &run.ceilings);
        let kind = if h.kind == "software" { "a software driver on the CPU" } else { h.kind.as_str() };
        let coop =
            c.coop.map_or(String::new(), |f| format!(", cooperative matrices {:.0} GFLOP/s", f * 1e-9));
        let _ = write!(
            out,
            "{} ({kind}, {} cores), {}, {}{}. Measured ceilings: copy {} GB/s, fma f32 {} GFLOP/s{coop}.\n\n\
             | kernel | median ms | rate | of ceiling |\n|---|---|---|---|\n",
            h.adapter,
            h.cores,
            h.driver,
            h.date(),
            h.kernels(),
            giga(c.copy, 1),
            giga(c.fma32, 0)
        );
        for r in &run.records {
            let _ =
                writeln!(out, "| {} | {} | {} | {} |", r.name(), digits(r.median_ms), r.rate(), r.share());
        }
        for f in &run.failed {
            let _ = writeln!(
                out,
                "| {} | failed: {} | | |",
                f.name(),
                f.error.replace('|', "/").replace('\n', " ")
            );
        }
        if let Some(remark) = run.remark() {
            let _ = writeln!(out, "\n{remark}.");
        }
        out.push('\n');
    }
    out
}

fn failed(run: &Run, out: &mut String) {
    for f in &run.failed {
        let _ = writeln!(out, "<p>Failed: {}: {}</p>", escape(&f.name()), escape(&f.error));
    }
}

fn adapters(runs: &[Run], out: &mut String) {
    *out += "<h2>Adapters</h2>\n<table><tr><th>adapter</th><th>kind</th><th>backend, driver</th><th>date</th>\
             <th>copy GB/s</th><th>fma f32 GFLOP/s</th><th>f16</th><th>matrix f16</th><th>dispatch us</th><th>pass</th><th>submit</th>\
             <th>readback</th></tr>\n";
    for (run, colour) in runs.iter().zip(COLOURS.iter().cycle()) {
        let (h, c) = (&run.host, &run.ceilings);
        let us = |s: Option<f64>| s.map_or("-".into(), |s| format!("{:.1}", s * 1e6));
        let cells = [
            format!("<b style=\"color:{}\">&#9632;</b> {}", hex(colour), escape(&h.adapter)),
            if h.kind == "software" { "software (CPU)".into() } else { h.kind.clone() },
            escape(&format!("{}, {}; tiebeam {}{}", h.backend, h.driver, h.version, h.kernels())),
            h.date(),
            giga(c.copy, 1),
            giga(c.fma32, 0),
            giga(c.fma16, 0),
            giga(c.coop, 0),
            us(c.dispatch),
            us(c.pass),
            us(c.submit),
            us(c.readback),
        ];
        *out += "<tr>";
        for cell in cells {
            let _ = write!(out, "<td>{cell}</td>");
        }
        *out += "</tr>\n";
    }
    *out += "</table>\n";
}

/// Returns an axis from the power of ten below the least value to the one above the greatest.
fn decades(values: impl Iterator<Item = f64>) -> [f64; 2] {
    let (least, most) = values.fold((f64::MAX, f64::MIN), |(a, b), v| (a.min(v), b.max(v)));
    // The axis extends slightly beyond both, so that rounding does not drop the labels at its ends.
    [
        10f64.powf(least.log10().floor()) * (1.0 - 1e-9),
        10f64.powf((most.log10() + 0.02).ceil()) * (1.0 + 1e-9),
    ]
}

/// Formats a power of ten in few characters, for the label of an axis.
fn plain(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.0}M", v * 1e-6),
        v if v >= 1e4 => format!("{:.0}k", v * 1e-3),
        v if v >= 1.0 => format!("{v:.0}"),
        v => format!("{v}"),
    }
}

/// Draws GFLOP/s over operations per byte, on logarithmic axes, under the two ceilings.
fn roofline(run: &Run, colour: &RGBColor) -> Result<String, Box<dyn Error>> {
    let points: Vec<&Record> = run.records.iter().filter(|r| r.flops > 0.0 && r.bytes > 0.0).collect();
    if points.is_empty() {
        return Ok("<p class=\"note\">No row of this run counts operations.</p>\n".into());
    }
    let (Some(copy), Some(fma)) = (run.ceilings.copy, run.ceilings.fma32) else {
        return Ok("<p class=\"note\">Its ceilings could not be measured.</p>\n".into());
    };
    let (copy, fma, coop) = (copy * 1e-9, fma * 1e-9, run.ceilings.coop.map(|f| f * 1e-9));
    let place = |r: &Record| (r.flops / r.bytes, r.flops / r.median_ms * 1e-6);
    let ridge = fma / copy;
    let [left, right] = decades(points.iter().map(|r| place(r).0).chain([ridge]));
    let [low, high] = decades(points.iter().map(|r| place(r).1).chain([fma]).chain(coop));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .margin_right(24)
            .x_label_area_size(38)
            .y_label_area_size(54)
            .build_cartesian_2d((left..right).log_scale(), (low..high).log_scale())?;
        chart
            .configure_mesh()
            .x_desc("operations a byte")
            .y_desc("GFLOP/s")
            .x_label_formatter(&|x| plain(*x))
            .y_label_formatter(&|y| plain(*y))
            .label_style(("sans-serif", 15))
            .bold_line_style(RGBColor(0xe5, 0xe5, 0xe5))
            .max_light_lines(0)
            .draw()?;
        // The slanted part begins where it crosses the picture's left or lower edge.
        let first = left.max(low / copy).min(ridge);
        let roof = [(first, first * copy), (ridge, fma), (right, fma)];
        chart.draw_series(LineSeries::new(roof, BLACK.stroke_width(2)))?;
        let above = Pos::new(HPos::Right, VPos::Bottom);
        let style = ("sans-serif", 15).into_font().into_text_style(&root).pos(above);
        let named =
            |text: String, y: f64| EmptyElement::at((right, y)) + Text::new(text, (-6, -3), style.clone());
        chart.draw_series([named(format!("fma {fma:.0} GFLOP/s, copy {copy:.1} GB/s"), fma)])?;
        if let Some(coop) = coop {
            let level = [(left, coop), (right, coop)];
            chart.draw_series(DashedLineSeries::new(level, 4, 4, BLACK.stroke_width(1)))?;
            chart.draw_series([named(format!("matrices f16 {coop:.0} GFLOP/s"), coop)])?;
        }
        chart.draw_series(points.iter().map(|r| Circle::new(place(r), 4, colour.mix(0.75).filled())))?;
        root.present()?;
    }
    Ok(titled(&svg, points.iter().map(|r| format!("{}: {}", r.name(), r.rate()))))
}

/// Adds these titles to the circles of a picture. Browsers show them under the pointer. The drawing library cannot write them.
fn titled(svg: &str, titles: impl Iterator<Item = String>) -> String {
    let mut parts = svg.split("<circle ");
    let mut out = parts.next().unwrap_or_default().to_string();
    for (part, title) in parts.zip(titles) {
        let title = format!("><title>{}</title></circle>", escape(&title));
        let _ = write!(out, "<circle {}", part.replacen("/>", &title, 1));
    }
    out
}

fn bars(runs: &[Run], out: &mut String) {
    let mut names: Vec<String> = Vec::new();
    for name in runs.iter().flat_map(|run| run.records.iter().map(Record::name)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    *out += "<table class=\"bars\"><tr><th>kernel</th><th></th><th>median ms</th><th>rate</th><th>of ceiling</th></tr>\n";
    for name in &names {
        let mut head = (" class=\"first\"", name.as_str());
        for (run, colour) in runs.iter().zip(COLOURS.iter().cycle()) {
            let Some(r) = run.records.iter().find(|r| r.name() == *name) else { continue };
            let (class, name) = std::mem::take(&mut head);
            let width = 100.0 * r.fraction.unwrap_or(0.0).min(1.0);
            let _ = writeln!(
                out,
                "<tr{class}><td>{}</td><td><b style=\"width:{width:.1}%;background:{}\"></b></td><td>{}</td><td>{}</td><td>{}</td></tr>",
                escape(name),
                hex(colour),
                digits(r.median_ms),
                escape(&r.rate()),
                escape(&r.share())
            );
        }
    }
    *out += "</table>\n";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_circle_has_its_title() {
        let svg = "<svg>\n<circle cx=\"1\"/>\n<circle cx=\"2\"/>\n<text>a</text></svg>";
        let want = "<svg>\n<circle cx=\"1\"><title>a &lt; b</title></circle>\n\
            <circle cx=\"2\"><title>c</title></circle>\n<text>a</text></svg>";
        assert_eq!(titled(svg, ["a < b", "c"].into_iter().map(str::to_string)), want);
    }
}
