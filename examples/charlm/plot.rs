//! The loss curve as SVG.

use std::path::Path;
use tiebeam::Result;
use tiebeam::chart::{self, Frame, Line};

/// Losses that are drawn as lines for comparison.
pub struct Lines {
    pub unigram: f64,
    pub bigram: f64,
    pub validation: f64,
}

/// Draws the training loss by step (smoothed over 2% of the run), the baselines and the final validation loss.
pub fn loss_curve(path: &Path, losses: &[(usize, f32)], lines: &Lines, title: &str) -> Result<()> {
    let window = (losses.len() / 50).max(1);
    let mean = |w: &[(usize, f32)]| w.iter().map(|(_, loss)| f64::from(*loss)).sum::<f64>() / w.len() as f64;
    let smooth: Vec<(f64, f64)> =
        losses.windows(window).map(|w| (w[w.len() - 1].0 as f64, mean(w))).collect();
    let ends = [smooth.first(), smooth.last()].map(|point| point.map_or(0.0, |(step, _)| *step));
    let level = |name: &str, y: f64| Line::level(format!("{name} {y:.3}"), y, ends);
    let all = [
        Line::new("training", smooth),
        level("validation", lines.validation),
        level("unigram", lines.unigram),
        level("bigram", lines.bigram),
    ];
    chart::lines(path, &Frame { title, x: "step", y: "loss, nats per byte", logarithmic: false }, &all)
}
