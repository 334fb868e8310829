//! Conversions of a trained model to shared weights, by the words that name them.

use super::convert::{RecursivePlan, Selection};
use super::lm::{Lm, LmConfig};
use super::masa::MasaPlan;
use crate::error::{Error, Result};
use crate::setters::setters;
use crate::tensor::Tensor;
use std::fmt;
use std::str::FromStr;

/// How the weights of a trained model are to be shared.
///
/// ```
/// use tiebeam::models::conversion::Conversion;
/// assert_eq!("recursive:15".parse(), Ok(Conversion::Recursive(15)));
/// assert_eq!("hashed:4".parse(), Ok(Conversion::Hashed(4.0)));
/// assert!("recursive:0".parse::<Conversion>().is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Conversion {
    /// The depths use this many blocks in turn. `recursive:B`
    Recursive(usize),
    /// The matrices of q, k, v and o are combined from this many atoms each. `masa:S`
    Masa(usize),
    /// Groups of this many neighbouring depths use the matrices of the first. `fold:G`
    Fold(usize),
    /// All matrices are read from one store, which is this many times smaller. `hashed:F`
    Hashed(f64),
}

impl FromStr for Conversion {
    type Err = String;

    fn from_str(text: &str) -> Result<Conversion, String> {
        let wrong =
            || format!("'{text}' is none of recursive:B, masa:S, fold:G and hashed:F, with a number above 0");
        let (kind, number) = text.split_once(':').ok_or_else(wrong)?;
        let count = || number.parse().ok().filter(|&n| n > 0).ok_or_else(wrong);
        match kind {
            "recursive" => Ok(Conversion::Recursive(count()?)),
            "masa" => Ok(Conversion::Masa(count()?)),
            "fold" => Ok(Conversion::Fold(count()?)),
            "hashed" => {
                let factor = number.parse().ok().filter(|f: &f64| f.is_finite() && *f >= 1.0);
                factor.map(Conversion::Hashed).ok_or_else(wrong)
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Conversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Conversion::Recursive(blocks) => write!(f, "recursive:{blocks}"),
            Conversion::Masa(atoms) => write!(f, "masa:{atoms}"),
            Conversion::Fold(group) => write!(f, "fold:{group}"),
            Conversion::Hashed(factor) => write!(f, "hashed:{factor}"),
        }
    }
}

/// What a conversion needs besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConversionOptions {
    /// Rank of each depth's own low-rank part in recursive and masa conversions (in masa, half of it for k and v). 0 for none.
    pub rank: usize,
    /// Groups of neighbouring blocks of a masa conversion, each with dictionaries of its own. 0 stands for 1.
    pub groups: usize,
    /// Blocks at the start and the end that a recursive conversion keeps.
    pub ends: [usize; 2],
    /// Blocks that a fold conversion leaves out.
    pub removed: Vec<usize>,
}

setters!(ConversionOptions { rank: usize, groups: usize, ends: [usize; 2], removed: Vec<usize> });

impl Conversion {
    /// Refuses what [`Conversion::apply`] would, as far as the settings tell.
    ///
    /// # Errors
    /// [`Error::Config`] for an option that this conversion does not have, and for models of experts.
    pub fn check(&self, config: &LmConfig, options: &ConversionOptions) -> Result<()> {
        let ConversionOptions { rank, groups, ends, removed } = options;
        let (hashed, fold) = (matches!(self, Conversion::Hashed(_)), matches!(self, Conversion::Fold(_)));
        let recursive = matches!(self, Conversion::Recursive(_));
        let wrong = [
            ((fold || hashed) && *rank > 0, "it has no low-rank parts"),
            (!recursive && *ends != [0, 0], "only a recursive conversion keeps blocks at the ends"),
            (
                !matches!(self, Conversion::Masa(_)) && *groups > 1,
                "only a masa conversion has groups of dictionaries",
            ),
            (!fold && !removed.is_empty(), "only a fold conversion removes blocks"),
            (!hashed && config.experts.is_some(), "models of experts are not converted"),
        ];
        match wrong.iter().find(|(is, _)| *is) {
            Some((_, what)) => Err(Error::config(format!("{self}: {what}"))),
            None => Ok(()),
        }
    }

    /// Returns the model with shared weights, and leaves of its own where the conversion made them. A dictionary's groups and low-rank
    /// parts are fitted to `sample`, tokens `[batch, tokens]` of what the model reads. `step` is told what is being done.
    ///
    /// # Errors
    /// As [`Conversion::check`], and as [`Lm::recursive`], [`Lm::masa`], [`Lm::folded`] and
    /// [`Lm::hashed`].
    pub fn apply(
        &self,
        model: &Lm,
        options: &ConversionOptions,
        sample: &Tensor,
        step: impl FnMut(&str),
    ) -> Result<Lm> {
        let ConversionOptions { rank, groups, ends, removed } = options;
        self.check(&model.config, options)?;
        match self {
            Conversion::Recursive(blocks) => {
                let selection = if *rank > 0 { Selection::Average } else { Selection::Stepwise };
                let plan = RecursivePlan::default().blocks(*blocks).rank(*rank).selection(selection);
                model.recursive(plan.ends(*ends))
            }
            Conversion::Masa(atoms) => {
                let plan = MasaPlan { atoms: *atoms, groups: (*groups).max(1), rank: *rank };
                model.masa(plan, sample, step)
            }
            Conversion::Fold(group) => model.folded(removed, *group),
            Conversion::Hashed(factor) => model.hashed(*factor),
        }
    }
}
