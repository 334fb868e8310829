//! Parameters of a merge as configured. Their values may differ by depth and by tensor.

use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// A value of a parameter for one tensor.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Scalar {
    /// A number.
    Number(f64),
    /// `true` or `false`.
    Flag(bool),
    /// A word or path.
    Text(String),
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Scalar::Number(x) => write!(f, "{x}"),
            Scalar::Flag(flag) => write!(f, "{flag}"),
            Scalar::Text(text) => write!(f, "`{text}`"),
        }
    }
}

/// A parameter as configured.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Setting {
    /// The same for all tensors.
    Same(Scalar),
    /// Numbers at evenly spaced depths of the model, interpolated linearly.
    Gradient(Vec<f64>),
    /// The first setting whose filter is part of the tensor's name. `None` and `*` fit every name.
    Filters(Vec<(Option<String>, Setting)>),
}

impl Setting {
    /// Returns the value for a tensor at a depth in `[0, 1]`, or `None` if no filter fits.
    pub fn at(&self, name: &str, depth: f64) -> Option<Scalar> {
        match self {
            Setting::Same(value) => Some(value.clone()),
            Setting::Gradient(values) => {
                let place = depth * (values.len() - 1) as f64;
                let low = (place as usize).min(values.len() - 1);
                let high = (low + 1).min(values.len() - 1);
                let part = place - low as f64;
                Some(Scalar::Number((1.0 - part) * values[low] + part * values[high]))
            }
            Setting::Filters(all) => {
                let fits =
                    |filter: &Option<String>| filter.as_ref().is_none_or(|f| f == "*" || name.contains(f));
                all.iter().find(|(filter, _)| fits(filter)).and_then(|(_, setting)| setting.at(name, depth))
            }
        }
    }
}

/// Parameters by name.
pub type Parameters = BTreeMap<String, Setting>;

/// The values that a number may have.
#[derive(Clone, Copy)]
pub(super) enum Limits {
    Any,
    Share,
    Positive,
    Whole,
}

/// Reads a number that may be written as text.
pub(super) fn number(key: &str, value: Option<Scalar>, default: Option<f64>, limits: Limits) -> Result<f64> {
    let wrong = |what: &str| Error::config(format!("parameter `{key}` {what}"));
    let x = match (value, default) {
        (Some(Scalar::Number(x)), _) => x,
        // Some programs write numbers as text.
        (Some(Scalar::Text(text)), _) => match text.trim().parse::<f64>() {
            Ok(x) if x.is_finite() => x,
            _ => return Err(wrong(&format!("must be a number, not `{text}`"))),
        },
        (Some(other), _) => return Err(wrong(&format!("must be a number, not {other}"))),
        (None, Some(default)) => default,
        (None, None) => return Err(wrong("is missing")),
    };
    let (fits, want) = match limits {
        // Merges are computed in f32, in which a number must not be infinite, nor a divisor 0.
        Limits::Any => ((x as f32).is_finite(), "a number of f32, at most 3.4e38"),
        Limits::Share => ((0.0..=1.0).contains(&x), "in [0, 1]"),
        Limits::Positive => (x as f32 >= f32::MIN_POSITIVE && x.is_finite(), "above 0"),
        Limits::Whole => (x >= 0.0 && x.fract() == 0.0 && x < 2f64.powi(53), "a whole number below 2^53"),
    };
    if fits { Ok(x) } else { Err(wrong(&format!("is {x}; it must be {want}"))) }
}

/// Reads a flag that may be written as a number or as text.
pub(super) fn flag(key: &str, value: Option<Scalar>, default: bool) -> Result<bool> {
    match value {
        None => Ok(default),
        Some(Scalar::Flag(flag)) => Ok(flag),
        // Words that older YAML, which mergekit reads, takes for the same, and the 0 and 1 of mergekit's examples.
        Some(other) => match other.to_string().trim_matches('`').to_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => Ok(true),
            "false" | "no" | "off" | "0" => Ok(false),
            _ => Err(Error::config(format!("parameter `{key}` must be true or false, not {other}"))),
        },
    }
}
