//! A learning rate that falls when the loss stops to improve.

use super::StateTensor;
use super::rule::at_least_zero;
use crate::error::{Error, Result};
use crate::setters::setters;
use crate::shape::Shape;

const OP: &str = "plateau";
/// Names of the state in files. An optimizer's state has no such names.
const STATE: [&str; 4] = ["plateau/lr", "plateau/best", "plateau/bad", "plateau/wait"];

/// Settings of a [`ReduceOnPlateau`]. The defaults are PyTorch's.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct PlateauConfig {
    /// Multiplies the rate when there is no progress. Between 0 and 1.
    pub factor: f32,
    /// Number of values in a row without progress that change nothing.
    pub patience: u32,
    /// The least progress that counts, as a fraction of the best value.
    pub threshold: f32,
    /// Number of values after a reduction that do not count as without progress.
    pub cooldown: u32,
    /// The lowest rate.
    pub min_lr: f32,
    /// Whether larger values are better, as of an accuracy. Otherwise smaller ones are, as of a loss.
    pub maximize: bool,
}

setters!(PlateauConfig {
    factor: f32,
    patience: u32,
    threshold: f32,
    cooldown: u32,
    min_lr: f32,
    maximize: bool,
});

impl Default for PlateauConfig {
    fn default() -> Self {
        PlateauConfig {
            factor: 0.1,
            patience: 10,
            threshold: 1e-4,
            cooldown: 0,
            min_lr: 0.0,
            maximize: false,
        }
    }
}

/// A learning rate that is reduced when a value, such as the validation loss, has not improved for a while.
///
/// A value `x` is progress if `x < best (1 - threshold)`, or with `maximize` if `x > best (1 + threshold)`; it then becomes the
/// best one. More than `patience` values in a row without progress multiply the rate by `factor`, down to `min_lr`, and the next
/// `cooldown` values do not count as without progress. A NaN is never progress. Reductions below 1e-8 are not made.
///
/// ```
/// # use tiebeam::optim::{PlateauConfig, ReduceOnPlateau};
/// let config = PlateauConfig::default().factor(0.5).patience(1);
/// let mut plateau = ReduceOnPlateau::new(0.8, config)?;
/// let rates: Vec<f32> = [3.0, 2.0, 2.0, 2.0, 1.0].into_iter().map(|loss| plateau.step(loss)).collect();
/// assert_eq!(rates, [0.8, 0.8, 0.8, 0.4, 0.4]);
/// assert_eq!(plateau.lr(), 0.4); // the rate of the next steps
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// Source: PyTorch's `ReduceLROnPlateau` with relative thresholds.
#[derive(Clone, Debug, PartialEq)]
pub struct ReduceOnPlateau {
    config: PlateauConfig,
    lr: f32,
    best: f32,
    /// Values in a row without progress.
    bad: u32,
    /// Values for which the cooldown still lasts.
    wait: u32,
}

impl ReduceOnPlateau {
    /// Starts at this learning rate.
    ///
    /// # Errors
    /// When a setting is out of range, which the message names.
    pub fn new(lr: f32, config: PlateauConfig) -> Result<ReduceOnPlateau> {
        at_least_zero(OP, "lr", lr.into())?;
        at_least_zero(OP, "threshold", config.threshold.into())?;
        at_least_zero(OP, "min_lr", config.min_lr.into())?;
        if !(config.factor > 0.0 && config.factor < 1.0) {
            let factor = config.factor;
            return Err(Error::config(format!(
                "{OP}: factor is {factor}; use a number between 0 and 1, such as 0.1"
            )));
        }
        let best = if config.maximize { f32::NEG_INFINITY } else { f32::INFINITY };
        Ok(ReduceOnPlateau { config, lr, best, bad: 0, wait: 0 })
    }

    /// Takes the next value and returns the learning rate from then on.
    pub fn step(&mut self, value: f32) -> f32 {
        let PlateauConfig { factor, patience, threshold, cooldown, min_lr, maximize } = self.config;
        let (x, best, threshold) = (f64::from(value), f64::from(self.best), f64::from(threshold));
        let progress = if maximize { x > best * (1.0 + threshold) } else { x < best * (1.0 - threshold) };
        if progress {
            (self.best, self.bad) = (value, 0);
        } else {
            self.bad += 1;
        }
        if self.wait > 0 {
            (self.wait, self.bad) = (self.wait - 1, 0);
        }
        if self.bad > patience {
            (self.wait, self.bad) = (cooldown, 0);
            let lower = ((f64::from(self.lr) * f64::from(factor)) as f32).max(min_lr);
            if f64::from(self.lr) - f64::from(lower) > 1e-8 {
                self.lr = lower;
            }
        }
        self.lr
    }

    /// The present learning rate.
    pub fn lr(&self) -> f32 {
        self.lr
    }

    /// The best value so far; an infinity before the first.
    pub fn best(&self) -> f32 {
        self.best
    }

    /// Returns rate, best value and counts, to be saved beside an optimizer's state.
    pub fn state_dict(&self) -> Vec<StateTensor> {
        let state = [self.lr, self.best, self.bad as f32, self.wait as f32];
        let scalar = |(name, value): (&str, f32)| (name.to_string(), Shape::new(&[]), vec![value]);
        STATE.into_iter().zip(state).map(scalar).collect()
    }

    /// Restores what [`ReduceOnPlateau::state_dict`] returned, and takes it out of `state`, so that the rest is the optimizer's.
    ///
    /// # Errors
    /// When a part is missing or not possible. The message names it, and nothing changes.
    pub fn load_state(&mut self, state: &mut Vec<StateTensor>) -> Result<()> {
        let mut found = [0.0; 4];
        for (name, to) in STATE.into_iter().zip(&mut found) {
            let of = state.iter().find(|(own, _, data)| own == name && data.len() == 1);
            // Only the best value may be infinite or below 0.
            let of = of.map(|(_, _, data)| data[0]);
            *to = of.filter(|x| name == STATE[1] && !x.is_nan() || x.is_finite() && *x >= 0.0).ok_or_else(
                || {
                    Error::config(format!(
                        "{OP}: there is no state `{name}`; it is another run's, or of a run without a plateau"
                    ))
                },
            )?;
        }
        let [lr, best, bad, wait] = found;
        *self = ReduceOnPlateau { config: self.config.clone(), lr, best, bad: bad as u32, wait: wait as u32 };
        state.retain(|(name, ..)| !STATE.contains(&name.as_str()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows PyTorch 2.15 value by value, through a saved state in the middle.
    fn check(config: PlateauConfig, values: &[f32], want: &[f32]) {
        for middle in 0..values.len() {
            let mut plateau = ReduceOnPlateau::new(0.8, config.clone()).unwrap();
            for (i, (value, want)) in values.iter().zip(want).enumerate() {
                if i == middle {
                    let mut state = plateau.state_dict();
                    state.push(("m/w".into(), Shape::new(&[1]), vec![1.0]));
                    plateau = ReduceOnPlateau::new(0.1, config.clone()).unwrap();
                    plateau.load_state(&mut state).unwrap();
                    assert_eq!(state.len(), 1, "the rest is the optimizer's");
                }
                assert_eq!(plateau.step(*value), *want, "{config:?}: value {i}, saved before {middle}");
            }
        }
    }

    #[test]
    fn rates_are_those_of_pytorch() {
        let config =
            PlateauConfig::default().factor(0.5).patience(2).threshold(1e-2).cooldown(2).min_lr(0.15);
        let nan = f32::NAN;
        let values = [
            5.0, 4.0, 4.0, 4.0, 4.0, 3.9999, 3.9, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0, nan,
            3.0,
        ];
        let want = [
            0.8, 0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2, 0.15, 0.15, 0.15, 0.15,
            0.15, 0.15,
        ];
        check(config, &values, &want);
        let config = PlateauConfig::default().factor(0.5).patience(1).threshold(0.1).maximize(true);
        let values = [1.0, 1.05, 1.09, 1.2, 1.3, 1.31, 1.32, 1.33, 1.34, 1.35];
        check(config, &values, &[0.8, 0.8, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2, 0.1]);
    }

    #[test]
    fn what_is_not_possible_is_refused() {
        for config in [PlateauConfig::default().factor(1.0), PlateauConfig::default().threshold(f32::NAN)] {
            assert!(ReduceOnPlateau::new(0.1, config).is_err());
        }
        let mut plateau = ReduceOnPlateau::new(0.1, PlateauConfig::default()).unwrap();
        let mut state = plateau.state_dict();
        state[2].2 = vec![-1.0];
        let before = plateau.clone();
        assert!(plateau.load_state(&mut state).unwrap_err().to_string().contains("`plateau/bad`"));
        assert_eq!((plateau, state.len()), (before, 4));
    }
}
