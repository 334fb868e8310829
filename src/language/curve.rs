//! The numbers of a training run so far, in its checkpoint and as a picture.

use crate::error::{Error, Result};
use std::str::FromStr;

/// A point of the curve.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Point {
    /// Steps so far.
    pub step: u64,
    /// Mean loss of the steps since the last point, in nats per token.
    pub loss: f64,
    /// Loss on held-out tokens, in nats per token.
    pub validation: f64,
    /// Seconds of training so far, over all of a run's sessions.
    pub seconds: f64,
}

impl Point {
    /// The point in words. Rust writes as many digits as bring back the same bits.
    fn text(&self) -> String {
        format!("{} {:?} {:?} {:?}", self.step, self.loss, self.validation, self.seconds)
    }
}

impl FromStr for Point {
    type Err = ();
    fn from_str(line: &str) -> Result<Point, ()> {
        let mut words = line.split(' ');
        let step = words.next().and_then(|word| word.parse().ok()).ok_or(())?;
        let mut number = || words.next().and_then(|word| word.parse().ok()).ok_or(());
        Ok(Point { step, loss: number()?, validation: number()?, seconds: number()? })
    }
}

/// A curve as text for a checkpoint.
pub(super) fn text(curve: &[Point]) -> String {
    curve.iter().map(Point::text).collect::<Vec<_>>().join("\n")
}

/// Reads what [`text`] wrote.
pub(super) fn parse(text: &str) -> Result<Vec<Point>> {
    let points: Result<Vec<Point>, ()> = text.lines().map(str::parse).collect();
    points.map_err(|()| Error::config("the curve of the checkpoint cannot be read"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_read_back() {
        let point = |step| Point { step, loss: 1.0 / 3.0, validation: f64::NAN, seconds: 1e-7 };
        let all = parse(&text(&[point(1), point(2)])).unwrap();
        assert_eq!(all[1].loss, 1.0 / 3.0);
        assert!(all[1].validation.is_nan() && all.len() == 2 && parse("").unwrap().is_empty());
        assert!(parse("1 2").is_err());
    }
}
