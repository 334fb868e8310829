//! How a device is chosen: the options, and the features that the engine uses where an adapter has them.

use crate::error::{Error, Result};
use crate::setters::setters;
use std::time::Duration;

/// How to choose an adapter; the environment (`TIEBEAM_ADAPTER`, `TIEBEAM_BACKEND`, `TIEBEAM_OFF`, ...) fills what is left
/// open.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Options {
    /// Index in [`Gpu::adapters`](super::Gpu::adapters), or part of the adapter's name, any case.
    pub adapter: Option<String>,
    /// `vulkan`, `metal`, `dx12` or `gl`; comma separated for several. By default the first three, and OpenGL where those
    /// offer no adapter or none of the wanted name.
    pub backend: Option<String>,
    /// Features to leave alone though the adapter has them, beside those that `TIEBEAM_OFF` lists (`f16,subgroups,timestamps,
    /// cooperative-matrix`): for a driver whose feature is broken. Cooperative matrices need f16.
    pub without: Vec<Feature>,
    /// Runs kernels with bounds checks and bounded loops even in release builds (`TIEBEAM_CHECKED=1`), and looks at ids before
    /// they are used: those outside a table come out as [`Error::Outside`].
    pub checked: bool,
    /// Whether to read operands through textures: never, or wherever it can be done. By default on llvmpipe where it pays:
    /// its loads from storage buffers are ten times slower. The bits do not depend on it.
    pub texels: Option<bool>,
    /// Whether measured choices of kernels are used (`TIEBEAM_TUNE`, by default `read`).
    pub tuning: Option<Tuning>,
    /// Folder of measured choices (`TIEBEAM_CACHE`, by default in the user's cache folder).
    pub cache: Option<std::path::PathBuf>,
    /// A file of measured choices that comes with the program, as `tiebeam tune --export` writes it: those of exactly this adapter
    /// and driver, else those of its class of devices. What was measured on this machine goes before.
    pub choices: Option<std::path::PathBuf>,
    /// Whether matrix products may round f32 operands to f16, on adapters with cooperative matrices: several times faster,
    /// relative errors near 2^-11 an operand (`TIEBEAM_ROUND_PRODUCTS=1`). Sums stay f32. Off by default.
    pub round_products: bool,
    /// How long to wait for the device before it counts as hung (`TIEBEAM_WAIT`, in seconds; `0` or `off` for no limit); by default
    /// 600 s. `Duration::MAX` is no limit.
    pub wait: Option<Duration>,
    /// The class of devices whose kernels are chosen (`TIEBEAM_DEVICE`): a kind (`cpu`, `integrated`, `discrete`, `virtual`) or
    /// a finer row of the table, such as `h200` ([`DeviceClass::all`](super::DeviceClass::all)). By default, and with `auto` here
    /// whatever the variable says, the adapter's own, as measured where `tiebeam tune` did so; one that is named is as in the table.
    /// It changes choices only: limits, features and lanes stay the adapter's.
    pub device: Option<String>,
}

setters!(Options {
    adapter: Option<String>,
    backend: Option<String>,
    without: Vec<Feature>,
    checked: bool,
    texels: Option<bool>,
    tuning: Option<Tuning>,
    cache: Option<std::path::PathBuf>,
    choices: Option<std::path::PathBuf>,
    round_products: bool,
    wait: Option<Duration>,
    device: Option<String>,
});

/// What measured choices do in this process (`TIEBEAM_TUNE`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tuning {
    /// Kernels are chosen by the built-in tables alone: the same bits whatever was measured on this machine.
    Off,
    /// Choices made by an earlier `tiebeam tune` are used.
    #[default]
    Read,
    /// What has no choice yet is measured when it first runs, and kept.
    On,
}

/// What the engine uses where an adapter has it, and can do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Feature {
    /// Arithmetic in half precision.
    F16,
    /// Sums over the lanes that run together.
    Subgroups,
    /// Device time, for [`Gpu::time`](super::Gpu::time).
    Timestamps,
    /// Matrix units, for products of f16.
    CooperativeMatrix,
}

impl Feature {
    pub(super) const ALL: [Feature; 4] =
        [Feature::F16, Feature::Subgroups, Feature::Timestamps, Feature::CooperativeMatrix];

    /// The word for it in `TIEBEAM_OFF` and in [`AdapterSummary::features`](super::AdapterSummary::features).
    pub fn name(self) -> &'static str {
        match self {
            Feature::F16 => "f16",
            Feature::Subgroups => "subgroups",
            Feature::Timestamps => "timestamps",
            Feature::CooperativeMatrix => "cooperative-matrix",
        }
    }

    pub(super) fn bits(self) -> wgpu::Features {
        match self {
            Feature::F16 => wgpu::Features::SHADER_F16,
            Feature::Subgroups => wgpu::Features::SUBGROUP,
            Feature::Timestamps => wgpu::Features::TIMESTAMP_QUERY,
            Feature::CooperativeMatrix => wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX,
        }
    }

    pub(super) fn parse_list(words: &str) -> Result<Vec<Feature>> {
        let one = |word: &str| {
            let known = Feature::ALL.into_iter().find(|feature| feature.name() == word);
            known.ok_or_else(|| {
                let all = Feature::ALL.map(Feature::name).join(", ");
                Error::config(format!("TIEBEAM_OFF: '{word}' is no feature; there are {all}"))
            })
        };
        words.split(',').map(str::trim).filter(|word| !word.is_empty()).map(one).collect()
    }
}

/// What of the adapter's features is used.
pub(super) fn used(have: wgpu::Features, without: &[Feature]) -> Vec<Feature> {
    let on = |feature: Feature| have.contains(feature.bits()) && !without.contains(&feature);
    let with = |feature| on(feature) && (feature != Feature::CooperativeMatrix || on(Feature::F16));
    Feature::ALL.into_iter().filter(|&feature| with(feature)).collect()
}
