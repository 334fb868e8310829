//! Options for opening a device, and the optional features that the engine uses if an adapter has them.

use crate::error::{Error, Result};
use crate::setters::setters;
use std::time::Duration;

/// Options for opening a device. The environment (`TIEBEAM_ADAPTER`, `TIEBEAM_BACKEND`, `TIEBEAM_OFF`, ...) fills in
/// what is not set here.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Options {
    /// Index in [`Gpu::adapters`](super::Gpu::adapters), or part of the adapter's name, in any case.
    pub adapter: Option<String>,
    /// `vulkan`, `metal`, `dx12` or `gl`, or several separated by commas. By default the first three, and OpenGL if
    /// those offer no adapter, or none of the wanted name.
    pub backend: Option<String>,
    /// Features not to use although the adapter has them, in addition to those that `TIEBEAM_OFF` lists
    /// (`f16,subgroups,timestamps,cooperative-matrix,pipeline-cache`). For drivers in which a feature is broken. Cooperative matrices
    /// need f16.
    pub without: Vec<Feature>,
    /// Runs kernels with bounds checks and bounded loops even in release builds (`TIEBEAM_CHECKED=1`), and checks ids
    /// before they are used. An id outside its table is reported as [`Error::Outside`].
    pub checked: bool,
    /// Whether to read operands through textures: never, or wherever possible. By default only on llvmpipe, and only
    /// where it pays, because llvmpipe's loads from storage buffers are ten times slower. Results have the same bits
    /// either way.
    pub texels: Option<bool>,
    /// Whether measured choices of kernels are used (`TIEBEAM_TUNE`, by default `read`).
    pub tuning: Option<Tuning>,
    /// Folder of measured choices and of what the driver keeps of compiled kernels (`TIEBEAM_CACHE`, by default in the
    /// user's cache folder). Drivers run what they have kept, so name a folder that only trusted users may write. On
    /// Unix, only files that belong to the process's user, and that nobody else may write, are given to the driver.
    pub cache: Option<std::path::PathBuf>,
    /// A file of measured choices that the program ships, as `tiebeam tune --export` writes it. The section for exactly
    /// this adapter and driver is used, else those for its class of devices. Choices measured on this machine take
    /// precedence.
    pub choices: Option<std::path::PathBuf>,
    /// Whether matrix products may round f32 operands to f16 on adapters with cooperative matrices
    /// (`TIEBEAM_ROUND_PRODUCTS=1`). This is several times faster, with relative errors near 2^-11 per operand. Sums
    /// stay f32. Off by default.
    pub round_products: bool,
    /// How long to wait for the device, or for its driver to compile a kernel, before it counts as hung
    /// (`TIEBEAM_WAIT`, in seconds; `0` or `off` for no limit). 600 s by default. `Duration::MAX` means no limit.
    pub wait: Option<Duration>,
    /// Most bytes of device memory for tensors, recorded steps and the pool together (`TIEBEAM_MEMORY`, such as `2GB` or
    /// `1.5GiB`). What needs more fails with [`Error::OutOfMemory`], as if the device had no more. Staging
    /// buffers of the host, textures that hold copies of operands, what measuring kernels holds for a moment and what the
    /// driver needs for itself are not counted. By default there is no limit but the device's.
    pub memory: Option<u64>,
    /// The class of devices for which kernels are chosen (`TIEBEAM_DEVICE`): a kind (`cpu`, `integrated`, `discrete`,
    /// `virtual`) or a finer row of the table, such as `h200` ([`DeviceClass::all`](super::DeviceClass::all)). The
    /// default is the adapter's own class, with the numbers that `tiebeam tune` measured, if any. `auto` here means the
    /// default too, whatever the variable says. A named class has the numbers of the table. The class changes choices
    /// only: limits, features and lanes stay the adapter's.
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
    memory: Option<u64>,
    device: Option<String>,
});

/// How this process uses measured choices (`TIEBEAM_TUNE`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tuning {
    /// Kernels are chosen by the built-in tables alone. Results then have the same bits whatever was measured on this
    /// machine.
    Off,
    /// Choices made by an earlier `tiebeam tune` are used.
    #[default]
    Read,
    /// A class of problems without a choice is measured when it first runs, and the choice is kept.
    On,
}

/// A feature that the engine uses if the adapter has it, and can do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Feature {
    /// Arithmetic in half precision.
    F16,
    /// Sums over the lanes of a subgroup.
    Subgroups,
    /// Device time, for [`Gpu::time`](super::Gpu::time).
    Timestamps,
    /// Matrix units, for products of f16.
    CooperativeMatrix,
    /// What the driver keeps of compiled kernels, in a file that later runs read.
    PipelineCache,
}

impl Feature {
    pub(super) const ALL: [Feature; 5] = [
        Feature::F16,
        Feature::Subgroups,
        Feature::Timestamps,
        Feature::CooperativeMatrix,
        Feature::PipelineCache,
    ];

    /// Its name in `TIEBEAM_OFF` and in [`AdapterSummary::features`](super::AdapterSummary::features).
    pub fn name(self) -> &'static str {
        match self {
            Feature::F16 => "f16",
            Feature::Subgroups => "subgroups",
            Feature::Timestamps => "timestamps",
            Feature::CooperativeMatrix => "cooperative-matrix",
            Feature::PipelineCache => "pipeline-cache",
        }
    }

    pub(super) fn bits(self) -> wgpu::Features {
        match self {
            Feature::F16 => wgpu::Features::SHADER_F16,
            Feature::Subgroups => wgpu::Features::SUBGROUP,
            Feature::Timestamps => wgpu::Features::TIMESTAMP_QUERY,
            Feature::CooperativeMatrix => wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX,
            Feature::PipelineCache => wgpu::Features::PIPELINE_CACHE,
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

/// Returns the optional features to use: those that the adapter has, except `without`.
pub(super) fn used(have: wgpu::Features, without: &[Feature]) -> Vec<Feature> {
    let on = |feature: Feature| have.contains(feature.bits()) && !without.contains(&feature);
    let with = |feature| on(feature) && (feature != Feature::CooperativeMatrix || on(Feature::F16));
    Feature::ALL.into_iter().filter(|&feature| with(feature)).collect()
}
