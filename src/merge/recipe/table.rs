//! The methods by name, with what each takes.

use crate::store::nearest;

/// A method of merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Method {
    /// [`average`](super::methods::average)
    Average,
    /// [`linear`](super::methods::linear)
    Linear,
    /// [`slerp`](super::methods::slerp) from the base to the other model
    Slerp,
    /// [`slerp`](super::methods::slerp) of two models by their weights, or of their task vectors if there is a base
    NuSlerp,
    /// [`task_arithmetic`](super::methods::task_arithmetic)
    TaskArithmetic,
    /// [`trim`](super::methods::trim), then [`sign_consensus`](super::methods::sign_consensus)
    Ties,
    /// [`TiesGlobal`](super::global::TiesGlobal)
    TiesGlobal,
    /// [`dare`](super::methods::dare), then the sum
    DareLinear,
    /// [`dare`](super::methods::dare), then [`sign_consensus`](super::methods::sign_consensus)
    DareTies,
    /// [`breadcrumbs`](super::methods::breadcrumbs), then the sum
    Breadcrumbs,
    /// [`breadcrumbs`](super::methods::breadcrumbs), then [`sign_consensus`](super::methods::sign_consensus)
    BreadcrumbsTies,
    /// [`Pcb`](super::global::Pcb)
    Pcb,
    /// [`signature`](super::methods::signature)
    Signature,
    /// Coefficients of task vectors that are learned on data: [`Atlas`](crate::merge::learned::Atlas)
    Atlas,
    /// Coefficients of task vectors on a front of trade-offs: [`pareto`](crate::merge::pareto)
    Map,
    /// A basis from which every model is rebuilt: [`ReversibleModels`](crate::merge::ReversibleModels)
    Rmm,
    /// Partly merged layers, fitted on data: [`pleas`](crate::merge::pleas)
    Pleas,
    /// [`model_stock`](super::methods::model_stock)
    ModelStock,
    /// [`fisher`](super::methods::fisher)
    Fisher,
    /// [`linear`](super::methods::linear) by [`loss_weights`](super::methods::loss_weights) or [`step_weights`](super::methods::step_weights)
    MetricsWeighted,
    /// The one model's tensor, scaled
    Passthrough,
}

/// Method, name, whether it needs a base, least and most models besides the base, parameters.
type Row = (Method, &'static str, bool, (usize, usize), &'static [&'static str]);

const MANY: usize = usize::MAX;

const TABLE: [Row; 21] = [
    (Method::Average, "average", false, (1, MANY), &[]),
    (Method::Linear, "linear", false, (1, MANY), &["weight", "normalize"]),
    (Method::Slerp, "slerp", true, (1, 1), &["t"]),
    (Method::NuSlerp, "nuslerp", false, (2, 2), &["weight"]),
    (
        Method::TaskArithmetic,
        "task_arithmetic",
        true,
        (1, MANY),
        &["weight", "normalize", "lambda", "int8_mask"],
    ),
    (Method::Ties, "ties", true, (1, MANY), &["weight", "density", "normalize", "lambda", "int8_mask"]),
    (Method::TiesGlobal, "ties_global", true, (1, MANY), &["density", "lambda"]),
    (
        Method::DareLinear,
        "dare_linear",
        true,
        (1, MANY),
        &["weight", "density", "normalize", "lambda", "rescale", "seed", "int8_mask"],
    ),
    (
        Method::DareTies,
        "dare_ties",
        true,
        (1, MANY),
        &["weight", "density", "normalize", "lambda", "rescale", "seed", "int8_mask"],
    ),
    (
        Method::Breadcrumbs,
        "breadcrumbs",
        true,
        (1, MANY),
        &["weight", "density", "gamma", "mask", "normalize", "lambda", "int8_mask"],
    ),
    (
        Method::BreadcrumbsTies,
        "breadcrumbs_ties",
        true,
        (1, MANY),
        &["weight", "density", "gamma", "mask", "normalize", "lambda", "int8_mask"],
    ),
    (Method::Pcb, "pcb", true, (1, MANY), &["ratio", "lambda", "weight"]),
    (Method::Signature, "signature", true, (1, MANY), &["weight", "clean", "pre"]),
    (
        Method::Atlas,
        "atlas",
        true,
        (1, MANY),
        &["objective", "steps", "rate", "batch", "shots", "parts", "budget", "control", "seed"],
    ),
    (
        Method::Map,
        "map",
        true,
        (2, MANY),
        &["samples", "low", "high", "link", "population", "generations", "preference", "seed"],
    ),
    (Method::Rmm, "rmm", false, (2, MANY), &["basis"]),
    (Method::Pleas, "pleas", false, (2, 2), &["ratio", "ridge", "heads", "match"]),
    (Method::ModelStock, "model_stock", true, (2, MANY), &[]),
    (Method::Fisher, "fisher", false, (1, MANY), &["weight", "fisher", "floor", "normalize"]),
    (Method::MetricsWeighted, "metrics_weighted", false, (1, MANY), &["loss", "step", "power"]),
    (Method::Passthrough, "passthrough", false, (1, 1), &["scale"]),
];

/// Methods of mergekit that are not implemented here.
const ELSEWHERE: [&str; 10] = [
    "multislerp",
    "karcher",
    "della",
    "della_linear",
    "sce",
    "ram",
    "ramplus_tl",
    "nearswap",
    "arcee_fusion",
    "model_breadcrumbs",
];

impl Method {
    fn row(self) -> &'static Row {
        TABLE.iter().find(|row| row.0 == self).expect("every method has a row")
    }

    /// Returns the method of this name.
    ///
    /// # Errors
    /// When there is none; the message lists similar names.
    pub fn parse(name: &str) -> Result<Method, String> {
        if let Some(row) = TABLE.iter().find(|row| row.1 == name) {
            return Ok(row.0);
        }
        let near = nearest(name, TABLE.iter().map(|row| row.1));
        let whose = if ELSEWHERE.contains(&name) { "is not implemented here" } else { "is no method" };
        Err(format!("`{name}` {whose}; near: {near}"))
    }

    /// The name that [`Method::parse`] takes.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Whether it needs a base.
    pub fn needs_base(self) -> bool {
        self.row().2
    }

    /// Least and most models besides the base.
    pub fn models(self) -> (usize, usize) {
        self.row().3
    }

    /// Names of its parameters.
    pub fn parameters(self) -> &'static [&'static str] {
        self.row().4
    }

    /// Whether each model may have its own value of this parameter.
    pub fn is_per_model(self, key: &str) -> bool {
        matches!(key, "weight" | "gamma" | "loss" | "step" | "fisher" | "scale" | "int8_mask")
            || key == "density" && self != Method::TiesGlobal
    }

    /// Whether this parameter concerns all tensors at once and so cannot differ between tensors.
    pub fn is_global(self, key: &str) -> bool {
        matches!(
            (self, key),
            (Method::TiesGlobal, "density")
                | (Method::Pcb, "ratio")
                | (Method::Fisher, "normalize")
                | (Method::Signature, "clean" | "pre")
                | (Method::Rmm, _)
        ) || self.is_learned()
    }

    /// Whether what is written is learned on data, by [`Job::learn`](crate::merge::Job::learn), before it is written.
    pub fn is_learned(self) -> bool {
        matches!(self, Method::Atlas | Method::Map | Method::Pleas)
    }

    /// Whether it merges task vectors. A model that is the base then adds nothing and is left out.
    pub fn has_task_vectors(self) -> bool {
        self.needs_base() || matches!(self, Method::NuSlerp | Method::Rmm)
    }
}
