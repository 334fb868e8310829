//! The adapters that this machine offers, and the choice among them.

use super::options::{Feature, used};
use crate::error::{Error, Result};
use std::fmt;

/// One adapter that this machine offers.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AdapterSummary {
    /// Position in [`Gpu::adapters`](super::Gpu::adapters), usable as `TIEBEAM_ADAPTER`.
    pub index: usize,
    /// The adapter's name.
    pub name: String,
    /// `Vulkan`, `Metal`, `Dx12` or `Gl`.
    pub backend: String,
    /// Discrete, integrated, virtual, software or other.
    pub kind: &'static str,
    /// The vendor's PCI id, or Vulkan's id for a vendor without one. 0 if the backend reports none.
    pub vendor: u32,
    /// Driver name and version.
    pub driver: String,
    /// Largest single buffer in bytes.
    pub max_buffer: u64,
    /// Largest part of a buffer that one kernel can see, in bytes.
    pub max_binding: u64,
    /// Optional features that the engine uses and this adapter has.
    pub features: Vec<&'static str>,
}

impl AdapterSummary {
    /// Whether the driver computes on the host's own cores, whatever class kernels are chosen for. If so, only wall
    /// time tells what work costs.
    pub fn is_software(&self) -> bool {
        self.kind == "software"
    }
}

impl fmt::Display for AdapterSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} ({}, {}, {}), buffer {} MiB, binding {} MiB, {}",
            self.index,
            self.name,
            self.backend,
            self.kind,
            self.driver,
            self.max_buffer >> 20,
            self.max_binding >> 20,
            if self.features.is_empty() { "no optional features".into() } else { self.features.join(" ") }
        )
    }
}

fn kind(device: wgpu::DeviceType) -> &'static str {
    match device {
        wgpu::DeviceType::DiscreteGpu => "discrete",
        wgpu::DeviceType::IntegratedGpu => "integrated",
        wgpu::DeviceType::VirtualGpu => "virtual",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    }
}

pub(super) fn summarize(index: usize, adapter: &wgpu::Adapter, without: &[Feature]) -> AdapterSummary {
    let info = adapter.get_info();
    let limits = adapter.limits();
    AdapterSummary {
        index,
        name: info.name.clone(),
        backend: format!("{:?}", info.backend),
        kind: kind(info.device_type),
        vendor: info.vendor,
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
        max_buffer: limits.max_buffer_size,
        max_binding: limits.max_storage_buffer_binding_size,
        features: used(adapter.features(), without).into_iter().map(Feature::name).collect(),
    }
}

fn backends(names: &str) -> Result<wgpu::Backends> {
    let mut all = wgpu::Backends::empty();
    for part in names.split(',').map(str::trim) {
        all |= match part.to_ascii_lowercase().as_str() {
            "vulkan" | "vk" => wgpu::Backends::VULKAN,
            "metal" => wgpu::Backends::METAL,
            "dx12" | "d3d12" => wgpu::Backends::DX12,
            "gl" | "gles" | "opengl" => wgpu::Backends::GL,
            other => {
                return Err(Error::config(format!(
                    "TIEBEAM_BACKEND: '{other}' is no backend; use vulkan, metal, dx12 or gl"
                )));
            }
        };
    }
    Ok(all)
}

/// Lists the adapters of these backends, or of the native ones by default. OpenGL is tried only if those have no
/// adapter, or none of the wanted name or index, because listing it is enough to make its libraries complain on stderr without a
/// display.
pub(super) fn list(backend: Option<&str>, wanted: Option<&str>) -> Result<Vec<wgpu::Adapter>> {
    if let Some(names) = backend {
        return Ok(enumerate(backends(names)?));
    }
    let mut adapters = enumerate(wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12);
    let there = |name: &str| match name.parse::<usize>() {
        Ok(index) => index < adapters.len(),
        Err(_) => adapters.iter().any(|a| is_named(a, name)),
    };
    if adapters.is_empty() || !wanted.is_none_or(there) {
        adapters.extend(enumerate(wgpu::Backends::GL));
    }
    Ok(adapters)
}

fn is_named(adapter: &wgpu::Adapter, part: &str) -> bool {
    adapter.get_info().name.to_lowercase().contains(&part.to_lowercase())
}

fn enumerate(mut backends: wgpu::Backends) -> Vec<wgpu::Adapter> {
    let mut adapters = Vec::new();
    if backends.contains(wgpu::Backends::VULKAN)
        && let Some(instance) = vulkan_without_wayland()
    {
        backends -= wgpu::Backends::VULKAN;
        adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::VULKAN));
    }
    if !backends.is_empty() {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = backends;
        let instance = wgpu::Instance::new(descriptor);
        adapters.extend(pollster::block_on(instance.enumerate_adapters(backends)));
    }
    adapters
}

/// Returns a Vulkan instance without the Wayland extension, if there can be no Wayland session. With that extension,
/// Mesa's device-selection layer tries to connect to a session, and libwayland complains on stderr that
/// `XDG_RUNTIME_DIR` is not set. We present nothing on a screen, so nothing is lost.
#[cfg(all(unix, not(target_vendor = "apple")))]
fn vulkan_without_wayland() -> Option<wgpu::Instance> {
    use wgpu::hal::api::Vulkan;
    use wgpu::hal::vulkan::{CreateInstanceCallbackArgs, Instance};
    if std::env::var_os("XDG_RUNTIME_DIR").is_some_and(|folder| std::path::Path::new(&folder).is_absolute()) {
        return None;
    }
    let descriptor = wgpu::hal::InstanceDescriptor {
        name: "wgpu",
        flags: wgpu::InstanceFlags::default(),
        memory_budget_thresholds: wgpu::MemoryBudgetThresholds::default(),
        backend_options: wgpu::BackendOptions::default(),
        telemetry: None,
        display: None,
    };
    let drop_wayland = |args: CreateInstanceCallbackArgs| {
        args.extensions.retain(|name| name.to_bytes() != b"VK_KHR_wayland_surface");
    };
    // SAFETY: wgpu-hal demands that no extension which it uses is removed. It uses this one only to make a Wayland
    // surface, which we never do, and it checks that the extension is in the list first.
    let made = unsafe { Instance::init_with_callback(&descriptor, Some(Box::new(drop_wayland))) };
    // SAFETY: the instance was made just now, and nobody else has it.
    made.ok().map(|instance| unsafe { wgpu::Instance::from_hal::<Vulkan>(instance) })
}

#[cfg(not(all(unix, not(target_vendor = "apple"))))]
fn vulkan_without_wayland() -> Option<wgpu::Instance> {
    None
}

/// The order of preference: discrete, integrated, virtual, other, software, and any native interface before OpenGL on
/// the same kind.
fn rank(adapter: &wgpu::Adapter) -> (u8, bool) {
    let info = adapter.get_info();
    let device = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    (device, info.backend == wgpu::Backend::Gl)
}

pub(super) fn choose(adapters: &[wgpu::Adapter], wanted: Option<&str>, without: &[Feature]) -> Result<usize> {
    let names = || {
        let lines: Vec<String> =
            adapters.iter().enumerate().map(|(i, a)| format!("  {}", summarize(i, a, without))).collect();
        lines.join("\n")
    };
    if adapters.is_empty() {
        return Err(Error::no_adapter(
            "this machine offers none. Install your GPU's Vulkan driver, or a software one: \
                      'make test' does that, or install mesa-vulkan-drivers (Debian, Fedora) by hand",
        ));
    }
    let Some(wanted) = wanted else {
        return Ok((0..adapters.len()).min_by_key(|&i| rank(&adapters[i])).unwrap_or(0));
    };
    if let Ok(index) = wanted.parse::<usize>() {
        return if index < adapters.len() {
            Ok(index)
        } else {
            Err(Error::no_adapter(format!("index {index} is not in the list:\n{}", names())))
        };
    }
    (0..adapters.len())
        .filter(|&i| is_named(&adapters[i], wanted))
        .min_by_key(|&i| rank(&adapters[i]))
        .ok_or_else(|| {
            Error::no_adapter(format!("no adapter's name contains '{wanted}'. There are:\n{}", names()))
        })
}
