//! Parameters of a merge as configured. Their values may differ by depth and by tensor.

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
