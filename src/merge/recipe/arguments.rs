//! The parameters of a method, looked up for one tensor.

use super::methods::{self, Rescale};
use super::setting::{Limits, Scalar, flag, number};
use super::table::Method;
use crate::error::{Error, Result};

/// The parameters of a method for one tensor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Arguments {
    pub(super) weights: Vec<f32>,
    pub(super) densities: Vec<f64>,
    pub(super) gammas: Vec<f64>,
    pub(super) t: f32,
    pub(super) lambda: f32,
    pub(super) normalize: bool,
    pub(super) rescale: Option<Rescale>,
    pub(super) seed: u64,
    pub(super) ratio: f64,
    pub(super) floor: f32,
    pub(super) scale: f32,
    /// Whether masks are made row by row, along the last axis.
    pub(super) by_rows: bool,
    /// The length of these rows, or 0.
    pub(super) row: usize,
    /// Whether the tensor belongs to a norm with running statistics.
    pub(super) is_norm: bool,
    /// Whether a signature has a clean model other than the base, and a pretrained one.
    pub(super) signature: [bool; 2],
}

/// Looks up a parameter, either of one model or of all (`None`).
pub type Lookup<'a> = dyn Fn(&str, Option<usize>) -> Option<Scalar> + 'a;

impl Method {
    /// Looks up the parameters of one tensor.
    ///
    /// # Errors
    /// When a parameter is missing, of another type or out of range.
    pub fn arguments(self, models: usize, get: &Lookup) -> Result<Arguments> {
        let takes = |key: &str| self.parameters().contains(&key);
        let all = |key: &'static str, default: Option<f64>, range: Limits| {
            if !takes(key) {
                return Ok(Vec::new());
            }
            (0..models).map(|i| number(key, get(key, Some(i)), default, range)).collect::<Result<Vec<f64>>>()
        };
        let one = |key: &'static str, default: f64, range: Limits| {
            number(key, get(key, None), Some(default), range)
        };
        let normalize = matches!(self, Method::Linear | Method::Ties);
        let weights = match self {
            Method::MetricsWeighted => self.metric_weights(models, get)?.into_iter().map(f64::from).collect(),
            Method::Pcb | Method::Signature => all("weight", Some(1.0), Limits::Any)?,
            _ => all("weight", None, Limits::Any)?,
        };
        let weights: Vec<f32> = weights.into_iter().map(|w| w as f32).collect();
        let density = |key| all(key, Some(1.0), Limits::Share);
        let normalize = flag("normalize", get("normalize", None), normalize)?;
        self.check_weights(&weights, normalize)?;
        Ok(Arguments {
            weights,
            densities: match self {
                Method::TiesGlobal => vec![one("density", 1.0, Limits::Share)?],
                _ => density("density")?,
            },
            gammas: all("gamma", Some(0.01), Limits::Share)?,
            t: if takes("t") { number("t", get("t", None), None, Limits::Any)? as f32 } else { 0.0 },
            lambda: one("lambda", 1.0, Limits::Any)? as f32,
            normalize,
            rescale: rescale(get("rescale", None))?,
            seed: one("seed", 0.0, Limits::Whole)? as u64,
            ratio: one("ratio", 0.1, Limits::Share)?,
            floor: one("floor", 1e-6, Limits::Positive)? as f32,
            scale: all("scale", Some(1.0), Limits::Any)?.first().map_or(1.0, |&x| x as f32),
            by_rows: by_rows(get("mask", None))?,
            row: 0,
            is_norm: false,
            signature: ["clean", "pre"].map(|key| takes(key) && get(key, None).is_some()),
        })
    }

    /// Refuses weights with which nothing can be computed.
    fn check_weights(self, weights: &[f32], normalize: bool) -> Result<()> {
        let wrong = |what: &str| Err(Error::config(format!("`{}`: {what}", self.name())));
        match self {
            Method::Linear if normalize && methods::cancels(weights) => wrong(&format!(
                "the weights {weights:?} sum to 0, by which nothing can be divided; set `normalize: false` for the plain sum"
            )),
            Method::Fisher if weights.iter().all(|&w| w == 0.0) => {
                wrong("every weight is 0; give one model another")
            }
            _ => Ok(()),
        }
    }

    fn metric_weights(self, models: usize, get: &Lookup) -> Result<Vec<f32>> {
        let power = number("power", get("power", None), Some(1.0), Limits::Any)?;
        let of = |key: &'static str| {
            let one = |i| number(key, get(key, Some(i)), None, Limits::Positive);
            (0..models).map(one).collect::<Result<Vec<f64>>>()
        };
        match (get("loss", Some(0)), get("step", Some(0))) {
            (Some(_), None) => Ok(methods::loss_weights(&of("loss")?, power)),
            (None, Some(_)) => Ok(methods::step_weights(&of("step")?, power)),
            _ => Err(Error::config("metrics_weighted: each model needs `loss`, or each `step`")),
        }
    }
}

fn rescale(value: Option<Scalar>) -> Result<Option<Rescale>> {
    match value {
        None => Ok(None),
        Some(_) if flag("rescale", value.clone(), false).is_ok() => {
            Ok(Some(if flag("rescale", value, false)? { Rescale::L1 } else { Rescale::None }))
        }
        Some(Scalar::Text(word)) if word == "density" => Ok(Some(Rescale::Density)),
        Some(Scalar::Text(word)) if word == "l1" => Ok(Some(Rescale::L1)),
        Some(other) => {
            Err(Error::config(format!("parameter `rescale` must be true, false, l1 or density, not {other}")))
        }
    }
}

/// Whether masks are made row by row.
fn by_rows(value: Option<Scalar>) -> Result<bool> {
    match value {
        None => Ok(false),
        Some(Scalar::Text(word)) if word == "tensor" => Ok(false),
        Some(Scalar::Text(word)) if word == "last_axis" => Ok(true),
        Some(other) => {
            Err(Error::config(format!("parameter `mask` must be tensor or last_axis, not {other}")))
        }
    }
}
