//! Training by seeds and scalars: ranks tell each other one number each step, and make everything else from seeds.

use super::events::{Log, Watch};
use super::perturb::{Directions, Move};
use super::{Group, StateTensor};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::setters::setters;
use crate::shape::Shape;
use std::fmt;
use std::str::FromStr;

const OP: &str = "scalars";
const EXPONENT: &str = "scalars/exponent";
const SMALL: &str = "scalars/small";

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
/// clipped, down by one after 16 steps in which none was above 47. The losses are told and never recomputed, and the products of scalars
/// and directions are exact ([`Directions`]), so parameters stay the same bits on all ranks, also on those with other drivers.
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
        Ok(Scalars { directions, config, steps: 0, exponent: None, small: 0, log, gpu })
    }

    /// [`Scalars::new`] of all parameters of groups, whose rates and decays must be the ordinary ones.
    ///
    /// # Errors
    /// As [`Scalars::new`].
    #[track_caller]
    pub fn of(group: Group, config: ScalarsConfig) -> Result<Scalars> {
        Scalars::new(group.params, config)
    }

    /// The settings.
    pub fn config(&self) -> &ScalarsConfig {
        &self.config
    }

    /// The number of a direction.
    fn id(&self, (rank, ranks): (usize, usize), sample: u32) -> u64 {
        (self.steps * ranks as u64 + rank as u64) * u64::from(self.config.samples) + u64::from(sample)
    }

    /// Moves the parameters to `w + sign eps z`, of this rank's direction of this number. `None` moves them back.
    pub(crate) fn go(&mut self, place: (usize, usize), sample: Option<(u32, f32)>) -> Result<()> {
        match sample {
            Some((sample, sign)) => {
                let step = Move { id: self.id(place, sample), by: sign * self.config.eps };
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

    /// What this rank tells: its slopes times the rate over the number of all directions, as bytes or as f32.
    pub(crate) fn message(&mut self, slopes: &[f64], lr: f32, ranks: usize) -> Vec<u8> {
        let factor = f64::from(lr) / (ranks * slopes.len()) as f64;
        // Slopes of losses are of the order of 1, for which the first unit is made.
        let first = || (factor.max(1e-30) * 4.0 / 127.0).log2().ceil() as i32;
        let unit = f64::from(*self.exponent.get_or_insert_with(first)).exp2();
        let one = |slope: &f64| match self.config.byte {
            true => vec![((slope * factor / unit).round().clamp(-127.0, 127.0) as i8).cast_unsigned()],
            false => ((slope * factor) as f32).to_le_bytes().to_vec(),
        };
        slopes.iter().flat_map(one).collect()
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
        let unit = self.exponent.map_or(1.0, |k| f64::from(k).exp2()) as f32;
        let scalars: Vec<f32> = match self.config.byte {
            true => told.iter().map(|&byte| f32::from(byte.cast_signed()) * unit).collect(),
            false => told.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect(),
        };
        let places = (0..ranks).flat_map(|rank| (0..samples as u32).map(move |sample| (rank, sample)));
        let moves: Vec<Move> = places
            .zip(&scalars)
            .map(|((rank, sample), by)| Move { id: self.id((rank, ranks), sample), by: -by })
            .collect();
        self.directions.advance(&moves)?;
        if self.config.byte {
            self.follow(told);
        }
        self.steps += 1;
        let squares: f64 = scalars.iter().map(|c| f64::from(*c).powi(2)).sum();
        Ok((squares / scalars.len().max(1) as f64).sqrt() as f32)
    }

    /// Makes the unit larger where bytes are clipped, and smaller where they are small for long.
    fn follow(&mut self, told: &[u8]) {
        let most = told.iter().map(|byte| byte.cast_signed().unsigned_abs()).max().unwrap_or(0);
        let Some(exponent) = &mut self.exponent else { return };
        self.small = if most < 48 { self.small + 1 } else { 0 };
        if most >= 127 {
            *exponent += 1;
        } else if self.small >= 16 {
            (*exponent, self.small) = (*exponent - 1, 0);
        }
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

    /// The state to save: the exponent of bytes, and for how many steps they have been small.
    pub fn state_dict(&self) -> Vec<StateTensor> {
        let scalar = |name: &str, value: f32| (name.to_string(), Shape::new(&[]), vec![value]);
        let exponent = self.exponent.map(|k| scalar(EXPONENT, k as f32));
        exponent.into_iter().chain([scalar(SMALL, self.small as f32)]).collect()
    }

    /// Restores what [`Scalars::state_dict`] and [`Scalars::steps`] returned.
    ///
    /// # Errors
    /// When a tensor is missing or another optimizer's. The message names it, and nothing changes.
    pub fn load_state(&mut self, steps: u64, state: &[StateTensor]) -> Result<()> {
        let mut found = [None, None];
        for (name, _, data) in state {
            match (name.as_str(), &data[..]) {
                (EXPONENT, &[value]) if value.abs() < 200.0 => found[0] = Some(value as i32),
                (SMALL, &[value]) if (0.0..100.0).contains(&value) => found[1] = Some(value as i32),
                _ => return Err(Error::config(format!("{OP}: state `{name}` is another optimizer's"))),
            }
        }
        let small = found[1].ok_or_else(|| Error::config(format!("{OP}: there is no state `{SMALL}`")))?;
        (self.steps, self.exponent, self.small) = (steps, found[0], small as u32);
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
