//! Training by seeds and scalars: ranks tell each other one number each step, and make everything else from seeds.

use super::StateTensor;
use super::events::{Log, Watch};
use super::perturb::{Directions, Move};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::setters::setters;
use crate::shape::Shape;
use std::fmt;
use std::str::FromStr;

const OP: &str = "scalars";
const EXPONENT: &str = "scalars/exponent";
const SMALL: &str = "scalars/small";
const DRAWN: &str = "scalars/drawn";
/// The exponent of bytes stays within these: less than 2^-64 moves nothing, and sums of more are no numbers soon.
const EXPONENTS: std::ops::RangeInclusive<i32> = -64..=64;

/// Settings of [`Scalars`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ScalarsConfig {
    /// The rate by which scalars are multiplied.
    pub lr: f32,
    /// How far from the parameters losses are evaluated. A power of two is taken as it is, others with 16 significant bits.
    pub eps: f32,
    /// Directions that each rank tries in a step.
    pub samples: u32,
    /// Whether a scalar travels as one byte, times a power of two that all ranks keep in the same way. Else as four.
    pub byte: bool,
    /// Start of the directions.
    pub seed: u64,
}

setters!(ScalarsConfig { lr: f32, eps: f32, samples: u32, byte: bool, seed: u64 });

impl Default for ScalarsConfig {
    /// A rate of 0.01, losses at a distance of 2^-10, one direction for each rank, four bytes.
    fn default() -> ScalarsConfig {
        ScalarsConfig { lr: 0.01, eps: 1.0 / 1024.0, samples: 1, byte: false, seed: 0 }
    }
}

/// What ranks tell each other in a step of a training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Exchange {
    /// Gradients, which are summed.
    #[default]
    Gradients,
    /// The scalars of random directions: [`Scalars`].
    Scalars {
        /// Whether a scalar is one byte, else four.
        byte: bool,
    },
}

impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Exchange::Gradients => "gradients",
            Exchange::Scalars { byte: false } => "scalars",
            Exchange::Scalars { byte: true } => "scalars:8",
        })
    }
}

impl FromStr for Exchange {
    type Err = Error;

    fn from_str(text: &str) -> Result<Exchange> {
        match text {
            "gradients" => Ok(Exchange::Gradients),
            "scalars" => Ok(Exchange::Scalars { byte: false }),
            "scalars:8" => Ok(Exchange::Scalars { byte: true }),
            _ => Err(Error::config(format!("'{text}' is none of gradients, scalars, scalars:8"))),
        }
    }
}

/// An optimizer that needs no gradients: of each direction `z` it knows the slope of the loss, and goes down along it.
///
/// ```text
/// c = (L(w + eps z) - L(w - eps z)) / (2 eps)          two evaluations, no backward pass
/// w = w - lr mean_(ranks, samples) c z                 every rank makes all z from their numbers
/// ```
///
/// Ranks tell each other only the scalars `c`: four bytes, or one with [`ScalarsConfig::byte`]. The byte is `lr c / count` in units of
/// `2^k`, rounded and clipped to 127. The exponent `k` follows what was told, in the same way on every rank: up by one when a byte was
/// clipped, down by one after 16 steps in which none was above 47, and within -64 and 64. The losses are told and never recomputed, and the
/// products of scalars and directions are exact ([`Directions`]), so parameters stay the same bits on all ranks, also on those with other
/// drivers. There is no weight decay and no momentum.
///
/// A [`Trainer`](crate::train::Trainer) takes the steps. Source: Zelikman, Huang, Liang, Haber, Goodman 2023, "Just One Byte (per
/// gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness"; the exponent that follows is ours.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::optim::{Scalars, ScalarsConfig};
/// use tiebeam::train::Trainer;
/// let w = Tensor::from_slice(&gpu, &[1f32, -2.0], [2]);
/// let scalars = Scalars::new([("w", &w)], ScalarsConfig::default().lr(0.1).byte(true))?;
/// let mut trainer = Trainer::new(scalars);
/// trainer.train(300, |_, _| Ok(w.square().sum_all()), |_| Ok(()))?;
/// assert!(w.square().sum_all().item()? < 1e-3);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct Scalars {
    directions: Directions,
    config: ScalarsConfig,
    steps: u64,
    /// Directions that all ranks have drawn so far, by which the next ones are numbered.
    drawn: u64,
    /// The exponent of the unit of bytes. `None` before the first step.
    exponent: Option<i32>,
    /// Steps in a row with small bytes.
    small: u32,
    log: Log,
    gpu: Gpu,
}

/// A message that says that something is to be told before the step: a byte that no scalar is.
const MARK: i8 = i8::MIN;

impl Scalars {
    /// Makes the optimizer of named parameters. They must be f32 tensors with elements of their own, and need not be leaves.
    ///
    /// # Errors
    /// When a setting is out of range, which the message names, and as [`Directions::new`].
    ///
    /// # Panics
    /// As [`Directions::new`].
    #[track_caller]
    pub fn new<N: Into<String>, T: std::borrow::Borrow<crate::Tensor>>(
        params: impl IntoIterator<Item = (N, T)>,
        config: ScalarsConfig,
    ) -> Result<Scalars> {
        let ScalarsConfig { lr, eps, samples, seed, .. } = config;
        let wrong = |name: &str, value: f32, rule: &str| {
            Err(Error::config(format!("{OP}: `{name}` is {value}; use a number {rule}")))
        };
        if !(lr.is_finite() && lr >= 0.0) {
            return wrong("lr", lr, "of 0 or more");
        }
        if !(eps.is_finite() && eps >= 2f32.powi(-40)) {
            return wrong("eps", eps, "above 2^-40, such as 0.001");
        }
        if !(1..=1 << 20).contains(&samples) {
            return wrong("samples", samples as f32, "from 1 to 2^20");
        }
        let params: Vec<(String, crate::Tensor)> =
            params.into_iter().map(|(name, x)| (name.into(), x.borrow().clone())).collect();
        let directions = Directions::new(params.iter().map(|(name, x)| (name.clone(), x)), seed)?;
        let gpu = params[0].1.gpu().clone();
        let log = Log::new(super::arena::zeros(OP, &gpu, Log::bytes(0)), Vec::new());
        Ok(Scalars { directions, config, steps: 0, drawn: 0, exponent: None, small: 0, log, gpu })
    }

    /// The settings.
    pub fn config(&self) -> &ScalarsConfig {
        &self.config
    }

    /// The number of a direction of the next step.
    fn id(&self, rank: usize, sample: u32) -> u64 {
        let of_step = rank as u64 * u64::from(self.config.samples) + u64::from(sample);
        self.drawn.wrapping_add(of_step)
    }

    /// Moves the parameters to `w + sign eps z`, of this rank's direction of this number. `None` moves them back.
    pub(crate) fn go(&mut self, rank: usize, sample: Option<(u32, f32)>) -> Result<()> {
        match sample {
            Some((sample, sign)) => {
                let step = Move { id: self.id(rank, sample), by: sign * self.config.eps };
                self.directions.probe(&[step])
            }
            None => self.directions.probe(&[]),
        }
    }

    /// The slope along a direction, of the losses at both ends.
    pub(crate) fn slope(&self, [up, down]: [f32; 2]) -> f64 {
        let eps = f64::from(Move { id: 0, by: self.config.eps }.rounded());
        (f64::from(up) - f64::from(down)) / (2.0 * eps)
    }

    /// Before the slopes of a step, on every rank: the unit of bytes, if this is the first one.
    pub(crate) fn begin(&mut self, lr: f32, ranks: usize) -> Result<()> {
        if !(lr.is_finite() && lr >= 0.0) {
            return Err(Error::config(format!(
                "{OP}: a step with the rate {lr}; it must be a number of 0 or more"
            )));
        }
        // Slopes of losses are of the order of 1, for which the first unit is made.
        let first = || (self.factor(lr, ranks).max(1e-30) * 4.0 / 127.0).log2().ceil() as i32;
        let exponent = self.exponent.unwrap_or_else(first);
        self.exponent = Some(exponent.clamp(*EXPONENTS.start(), *EXPONENTS.end()));
        Ok(())
    }

    /// The rate over the number of all directions.
    fn factor(&self, lr: f32, ranks: usize) -> f64 {
        f64::from(lr) / (ranks as f64 * f64::from(self.config.samples))
    }

    /// The unit of bytes.
    fn unit(&self) -> f32 {
        2f32.powi(self.exponent.unwrap_or(0))
    }

    /// What this rank tells: its slopes times the rate over the number of all directions, as bytes or as f32.
    ///
    /// # Errors
    /// When one is too large for f32.
    pub(crate) fn message(&self, slopes: &[f64], lr: f32, ranks: usize) -> Result<Vec<u8>> {
        let (factor, unit) = (self.factor(lr, ranks), f64::from(self.unit()));
        if self.config.byte {
            let byte = |slope: &f64| (slope * factor / unit).round().clamp(-127.0, 127.0) as i8;
            return Ok(slopes.iter().map(|slope| byte(slope).cast_unsigned()).collect());
        }
        let scalars: Vec<f32> = slopes.iter().map(|slope| (slope * factor) as f32).collect();
        match scalars.iter().find(|by| !Move { id: 0, by: **by }.rounded().is_finite()) {
            Some(by) => Err(Error::config(format!(
                "{OP}: a step of {by} along a direction; take a smaller learning rate"
            ))),
            None => Ok(scalars.iter().flat_map(|by| by.to_le_bytes()).collect()),
        }
    }

    /// A message of the same length that no slopes make, by which a rank says that there is more to be told.
    pub(crate) fn mark(&self) -> Vec<u8> {
        let samples = self.config.samples as usize;
        match self.config.byte {
            true => vec![MARK.cast_unsigned(); samples],
            false => f32::NAN.to_le_bytes().repeat(samples),
        }
    }

    /// Takes the step that all ranks have told each other, in the order of ranks and samples. Returns the root mean square of the
    /// scalars.
    pub(crate) fn advance(&mut self, told: &[u8], ranks: usize) -> Result<f32> {
        let samples = self.config.samples as usize;
        let unit = self.unit();
        let scalars: Vec<f32> = match self.config.byte {
            true => told.iter().map(|&byte| f32::from(byte.cast_signed()) * unit).collect(),
            false => told.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect(),
        };
        let places = (0..ranks).flat_map(|rank| (0..samples as u32).map(move |sample| (rank, sample)));
        let moves: Vec<Move> = places
            .zip(&scalars)
            .map(|((rank, sample), by)| Move { id: self.id(rank, sample), by: -by })
            .collect();
        self.directions.advance(&moves)?;
        if self.config.byte {
            self.follow(told);
        }
        self.steps += 1;
        self.drawn = self.drawn.wrapping_add((ranks * samples) as u64);
        let squares: f64 = scalars.iter().map(|c| f64::from(*c).powi(2)).sum();
        Ok((squares / scalars.len().max(1) as f64).sqrt() as f32)
    }

    /// Makes the unit larger where bytes are clipped, and smaller where they are small for long.
    fn follow(&mut self, told: &[u8]) {
        let most = told.iter().map(|byte| byte.cast_signed().unsigned_abs()).max().unwrap_or(0);
        let Some(exponent) = &mut self.exponent else { return };
        self.small = if most < 48 { self.small + 1 } else { 0 };
        let next = match most {
            127.. => *exponent + 1,
            _ if self.small >= 16 => *exponent - 1,
            _ => return,
        };
        self.small = 0;
        *exponent = next.clamp(*EXPONENTS.start(), *EXPONENTS.end());
    }

    /// The name in messages.
    pub fn name(&self) -> &'static str {
        OP
    }

    /// The rate by which scalars are multiplied.
    pub fn lr(&self) -> f32 {
        self.config.lr
    }

    /// Number of steps.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Nothing happens in these steps that is to be told.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn watch(&self) -> Result<Watch> {
        self.log.watch(&self.gpu)
    }

    /// The state to save: the exponent of bytes, for how many steps they have been small, and the directions drawn so far, in numbers of
    /// 22 bits.
    pub fn state_dict(&self) -> Vec<StateTensor> {
        let scalar = |name: &str, value: f32| (name.to_string(), Shape::new(&[]), vec![value]);
        let exponent = self.exponent.map(|k| scalar(EXPONENT, k as f32));
        let words = [0, 22, 44].map(|bits| (self.drawn >> bits & 0x3f_ffff) as f32);
        let drawn = (DRAWN.to_string(), Shape::new(&[3]), words.to_vec());
        exponent.into_iter().chain([scalar(SMALL, self.small as f32), drawn]).collect()
    }

    /// Restores what [`Scalars::state_dict`] and [`Scalars::steps`] returned.
    ///
    /// # Errors
    /// When a tensor is missing or another optimizer's. The message names it, and nothing changes.
    pub fn load_state(&mut self, steps: u64, state: &[StateTensor]) -> Result<()> {
        let whole = |value: f32, most: f32| value.fract() == 0.0 && (0.0..=most).contains(&value);
        let (mut exponent, mut small, mut drawn) = (None, None, None);
        for (name, _, data) in state {
            match (name.as_str(), &data[..]) {
                (EXPONENT, &[value]) if EXPONENTS.contains(&(value as i32)) && value.fract() == 0.0 => {
                    exponent = Some(value as i32);
                }
                (SMALL, &[value]) if whole(value, 99.0) => small = Some(value as u32),
                (DRAWN, words @ [_, _, high])
                    if words.iter().all(|w| whole(*w, 4_194_303.0)) && *high < 1_048_576.0 =>
                {
                    drawn = Some(words.iter().rev().fold(0u64, |sum, word| sum << 22 | *word as u64));
                }
                _ => return Err(Error::config(format!("{OP}: state `{name}` is another optimizer's"))),
            }
        }
        let missing = |name: &str| Error::config(format!("{OP}: there is no state `{name}`"));
        let (small, drawn) = (small.ok_or_else(|| missing(SMALL))?, drawn.ok_or_else(|| missing(DRAWN))?);
        (self.steps, self.exponent, self.small, self.drawn) = (steps, exponent, small, drawn);
        Ok(())
    }

    /// Takes parameters as they are now, after they were set from outside, as by a checkpoint.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn loaded(&mut self) -> Result<()> {
        self.directions.restart()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loss that does not change makes the unit smaller and smaller, and one that runs away larger: to the ends of what adds up.
    #[test]
    fn the_exponent_ends_and_is_read_back() {
        let gpu = Gpu::open().unwrap();
        let w = crate::Tensor::ones(&gpu, [2]);
        let new = || Scalars::new([("w", &w)], ScalarsConfig::default().byte(true)).unwrap();
        let mut scalars = new();
        for (byte, end) in [(0, -64), (127, 64)] {
            scalars.begin(0.01, 1).unwrap();
            (0..3000).for_each(|_| scalars.follow(&[byte]));
            assert_eq!(scalars.exponent, Some(end));
            scalars.drawn = u64::MAX - 5;
            let mut again = new();
            again.load_state(7, &scalars.state_dict()).unwrap();
            assert_eq!((again.exponent, again.small, again.drawn), (Some(end), scalars.small, u64::MAX - 5));
        }
        assert_eq!(scalars.unit() * 127.0, 127.0 * 2f32.powi(64));
        let state = |name: &str, value: f32| (name.to_string(), Shape::new(&[]), vec![value]);
        for wrong in [state(EXPONENT, -65.0), state(EXPONENT, f32::NAN), state(SMALL, 0.5), state(DRAWN, 1.0)]
        {
            let error = scalars.load_state(1, &[wrong]).unwrap_err().to_string();
            assert!(error.contains("is another optimizer's"), "{error}");
        }
        assert!(scalars.load_state(1, &[state(SMALL, 0.0)]).unwrap_err().to_string().contains(DRAWN));
        assert_eq!((scalars.steps, scalars.exponent), (0, Some(64)), "nothing has changed");
    }
}
