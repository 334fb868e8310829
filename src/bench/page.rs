//! Runs side by side as one HTML file without scripts or outside resources: it opens offline and prints.

use super::report::digits;
use super::{Record, Run};
use std::fmt::Write;

/// Colours that stay apart in print and for most colour-blind readers (Okabe & Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"];

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:62em;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em}table{border-collapse:collapse;width:100%;font-size:.9em}
th,td{padding:.2em .6em;text-align:right;border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}
svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:#333}.note{color:#555;font-size:.9em}
@media print{body{margin:0;max-width:none}h2{break-after:avoid}svg,tr{break-inside:avoid}}";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The page for these runs: adapters and their ceilings, a roofline each, a bar for each kernel and run.
pub fn page(runs: &[Run]) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>tiebeam bench</title>\n<style>{STYLE}</style>\n\
         <h1>Tiebeam: kernels on {} adapter{}</h1>\n",
        runs.len(),
        if runs.len() == 1 { "" } else { "s" }
    );
    adapters(runs, &mut out);
    for (run, colour) in runs.iter().zip(COLOURS.iter().cycle()) {
        let _ = writeln!(out, "<h2>Roofline: {}</h2>", escape(&run.host.adapter));
        roofline(run, colour, &mut out);
        failed(run, &mut out);
    }
    out += "<h2>Kernels</h2>\n<p class=\"note\">Bars: share of the ceiling that bounds the kernel on its own adapter, \
            max(bytes / copy, operations / fma). Numbers: median time and rate.</p>\n";
    bars(runs, &mut out);
    if let Some(remark) = runs.iter().find_map(Run::remark) {
        let _ = writeln!(out, "<p class=\"note\">{}.</p>", escape(remark));
    }
    out + "</html>\n"
}

/// A rate in units of 10^9, or a dash.
fn giga(rate: Option<f64>, digits: usize) -> String {
    rate.map_or("-".into(), |rate| format!("{:.digits$}", rate * 1e-9))
}

/// The runs as Markdown, a table for each.
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
            format!("<b style=\"color:{colour}\">&#9632;</b> {}", escape(&h.adapter)),
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

/// Decades from the one below the least to the one above the most.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Axis {
        let (least, most) = values.fold((f64::MAX, f64::MIN), |(a, b), v| (a.min(v), b.max(v)));
        Axis { low: least.log10().floor(), high: (most.log10() + 0.02).ceil(), from, to }
    }

    fn at(&self, value: f64) -> f64 {
        self.from + (value.log10() - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    fn decades(&self) -> impl Iterator<Item = f64> {
        (self.low as i32..=self.high as i32).map(|d| 10f64.powi(d))
    }
}

/// A power of ten in the room that there is beside an axis.
fn plain(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.0}M", v * 1e-6),
        v if v >= 1e4 => format!("{:.0}k", v * 1e-3),
        v if v >= 1.0 => format!("{v:.0}"),
        v => format!("{v}"),
    }
}

/// GFLOP/s over operations a byte, both by powers of ten, under the two ceilings.
fn roofline(run: &Run, colour: &str, out: &mut String) {
    let points: Vec<&Record> = run.records.iter().filter(|r| r.flops > 0.0 && r.bytes > 0.0).collect();
    if points.is_empty() {
        *out += "<p class=\"note\">No row of this run counts operations.</p>\n";
        return;
    }
    let (Some(copy), Some(fma)) = (run.ceilings.copy, run.ceilings.fma32) else {
        *out += "<p class=\"note\">Its ceilings could not be measured.</p>\n";
        return;
    };
    let intensity = |r: &Record| r.flops / r.bytes;
    let rate = |r: &Record| r.flops / r.median_ms * 1e-6;
    let ridge = fma / copy;
    let x = Axis::new(points.iter().map(|r| intensity(r)).chain([ridge]), 60.0, 700.0);
    let y = Axis::new(
        points.iter().map(|r| rate(r)).chain([fma, run.ceilings.coop.unwrap_or(fma)].map(|f| f * 1e-9)),
        300.0,
        20.0,
    );
    *out += "<svg viewBox=\"0 0 740 350\" role=\"img\">\n";
    for v in x.decades() {
        let at = x.at(v);
        let _ = write!(
            out,
            "<path d=\"M{at:.1} 20V300\" stroke=\"#e5e5e5\"/><text x=\"{at:.1}\" y=\"316\" text-anchor=\"middle\">{}</text>",
            plain(v)
        );
    }
    for v in y.decades() {
        let at = y.at(v);
        let _ = write!(
            out,
            "<path d=\"M60 {at:.1}H700\" stroke=\"#e5e5e5\"/><text x=\"54\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            at + 4.0,
            plain(v)
        );
    }
    // The slanted part enters where it crosses the picture's left or lower edge.
    let left = 10f64.powf(x.low).max(10f64.powf(y.low) * 1e9 / copy).min(ridge);
    let start = (x.at(left), y.at(left * copy * 1e-9));
    let (top, corner) = (y.at(fma * 1e-9), x.at(ridge));
    let _ = writeln!(
        out,
        "<path d=\"M{:.1} {:.1}L{corner:.1} {top:.1}H700\" fill=\"none\" stroke=\"#222\" stroke-width=\"1.5\"/>\
         <text x=\"694\" y=\"{:.1}\" text-anchor=\"end\">fma {:.0} GFLOP/s, copy {:.1} GB/s</text>",
        start.0,
        start.1,
        top - 5.0,
        fma * 1e-9,
        copy * 1e-9
    );
    if let Some(coop) = run.ceilings.coop {
        let at = y.at(coop * 1e-9);
        let _ = writeln!(
            out,
            "<path d=\"M60 {at:.1}H700\" stroke=\"#222\" stroke-dasharray=\"4 4\"/>\
             <text x=\"694\" y=\"{:.1}\" text-anchor=\"end\">matrices f16 {:.0} GFLOP/s</text>",
            at - 5.0,
            coop * 1e-9
        );
    }
    for r in &points {
        let (px, py) = (x.at(intensity(r)), y.at(rate(r)));
        let title = escape(&format!("{}: {}", r.name(), r.rate()));
        let _ = writeln!(
            out,
            "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"4\" fill=\"{colour}\" fill-opacity=\".75\"><title>{title}</title></circle>"
        );
    }
    *out += "<text x=\"380\" y=\"340\" text-anchor=\"middle\">operations a byte</text>\
             <text transform=\"translate(14 160)rotate(-90)\" text-anchor=\"middle\">GFLOP/s</text></svg>\n";
}

fn bars(runs: &[Run], out: &mut String) {
    let mut names: Vec<String> = Vec::new();
    for name in runs.iter().flat_map(|run| run.records.iter().map(Record::name)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let step = 15 * runs.len() + 9;
    // Bars begin behind the longest name, seven units a letter.
    let left = 24 + 7 * names.iter().map(String::len).max().unwrap_or(0);
    let _ = writeln!(out, "<svg viewBox=\"0 0 {} {}\" role=\"img\">", left + 640, names.len() * step + 24);
    for percent in [0, 25, 50, 75, 100] {
        let at = left + percent * 3;
        let bottom = names.len() * step + 8;
        let _ = write!(
            out,
            "<path d=\"M{at} 4V{bottom}\" stroke=\"#e5e5e5\"/><text x=\"{at}\" y=\"{}\" text-anchor=\"middle\">{percent}%</text>",
            bottom + 14
        );
    }
    for (i, name) in names.iter().enumerate() {
        let top = 8 + i * step;
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            left - 8,
            top + 11,
            escape(name)
        );
        for (j, (run, colour)) in runs.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let Some(r) = run.records.iter().find(|r| r.name() == *name) else { continue };
            let y = top + 15 * j;
            let width = 300.0 * r.fraction.unwrap_or(0.0).min(1.0);
            let label = match r.fraction {
                Some(_) => format!("{} ms, {}, {}", digits(r.median_ms), r.rate(), r.share()),
                None => format!("{} ms, {}", digits(r.median_ms), r.rate()),
            };
            let text = left as f64 + 6.0 + width;
            let _ = writeln!(
                out,
                "<rect x=\"{left}\" y=\"{y}\" width=\"{width:.1}\" height=\"12\" fill=\"{colour}\"/><text x=\"{text:.1}\" y=\"{}\">{}</text>",
                y + 10,
                escape(&label)
            );
        }
    }
    *out += "</svg>\n";
}
