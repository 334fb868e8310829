//! `tiebeam doctor`: whether each adapter works, what it offers, what is left off, and what to install.

use crate::context::Context;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tiebeam::files::size;
use tiebeam::gpu::AdapterSummary;
use tiebeam::{Error, Feature, Gpu, Result, Tensor};

const EXAMPLES: &str = "\
Examples:
  tiebeam doctor
  tiebeam doctor --json | jq .";

/// Check every adapter: what it offers, what is left off, whether it computes, and what to install
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {}

/// What an adapter loses without a feature.
fn loss(feature: Feature) -> &'static str {
    match feature {
        Feature::F16 => "no arithmetic in half precision: f16 tensors are converted to f32 to compute",
        Feature::Subgroups => "sums go through workgroup memory",
        Feature::Timestamps => "times are measured by the host's clock",
        Feature::CooperativeMatrix => "products in f16 do not use matrix units",
        Feature::PipelineCache => "kernels are compiled anew by each process",
        _ => "see the documentation of tiebeam::Feature",
    }
}

const FEATURES: [Feature; 5] = [
    Feature::F16,
    Feature::Subgroups,
    Feature::Timestamps,
    Feature::CooperativeMatrix,
    Feature::PipelineCache,
];

pub fn run(_: &Args, context: &Context) -> Result<()> {
    let cache = Gpu::cache_folder();
    let shown = cache.as_deref().map_or("none".into(), |folder| folder.display().to_string());
    context.result(format_args!(
        "tiebeam {}, {} {}\ncache     {shown}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::OS,
        std::env::consts::ARCH
    ));
    let set: Vec<(String, String)> =
        std::env::vars().filter(|(name, _)| name.starts_with("TIEBEAM_")).collect();
    for (name, value) in &set {
        context.result(format_args!("set       {name}={value}"));
    }
    let set: serde_json::Map<String, Value> =
        set.into_iter().map(|(name, value)| (name, value.into())).collect();
    context.record(&json!({
        "line": "host", "version": env!("CARGO_PKG_VERSION"), "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH, "cache": cache, "variables": set,
    }))?;
    let adapters = Gpu::adapters()?;
    let best = context.open().ok().map(|gpu| gpu.adapter().index);
    let mut working = 0;
    for adapter in &adapters {
        working += examine(adapter, best == Some(adapter.index), context)? as usize;
    }
    let advice = advice(&adapters);
    for line in &advice {
        context.result(format_args!("\nadvice    {line}"));
    }
    context.record(&json!({"line": "advice", "advice": advice}))?;
    context.whole();
    match working {
        0 => Err(Error::no_adapter("none of this machine's adapters works; see the advice above")),
        _ => Ok(()),
    }
}

/// Shows one adapter and returns whether it works.
fn examine(adapter: &AdapterSummary, best: bool, context: &Context) -> Result<bool> {
    let chosen = if best { " (chosen)" } else { "" };
    context.result(format_args!(
        "\nadapter   {}: {}{chosen}\n  kind    {}, by {}, driver {}\n  limits  {} a tensor, {} a buffer",
        adapter.index,
        adapter.name,
        adapter.kind,
        adapter.backend,
        adapter.driver,
        size(adapter.max_binding.min(adapter.max_buffer)),
        size(adapter.max_buffer)
    ));
    let off: Vec<Feature> =
        FEATURES.into_iter().filter(|feature| !adapter.features.contains(&feature.name())).collect();
    context.result(format_args!("  has     {}", adapter.features.join(", ")));
    for &feature in &off {
        context.result(format_args!("  without {}: {}", feature.name(), loss(feature)));
    }
    let started = Instant::now();
    let tried = Gpu::open_with(context.options.clone().adapter(Some(adapter.index.to_string())))
        .and_then(|gpu| works(&gpu).map(|()| gpu));
    let seconds = started.elapsed().as_secs_f64();
    let mut line = json!({
        "line": "adapter", "index": adapter.index, "name": adapter.name, "backend": adapter.backend,
        "kind": adapter.kind, "driver": adapter.driver, "chosen": best, "max_binding": adapter.max_binding,
        "max_buffer": adapter.max_buffer, "features": adapter.features,
        "without": off.iter().map(|feature| feature.name()).collect::<Vec<_>>(),
        "works": tried.is_ok(), "seconds": seconds,
    });
    match &tried {
        Ok(gpu) => {
            let tuned = gpu.choices_file().is_some_and(Path::exists);
            let kernels = if tuned {
                "measured on it"
            } else {
                "from the built-in tables; `tiebeam tune` measures them"
            };
            let class = gpu.class().name;
            context.result(format_args!("  kernels for the class '{class}', {kernels}"));
            context.result(format_args!(
                "  works   a product and a sum are right, {seconds:.1} s with compiling"
            ));
            line["class"] = class.into();
            line["tuned"] = tuned.into();
        }
        Err(error) => {
            context.result(format_args!("  FAILS   {error}"));
            line["error"] = error.to_string().into();
        }
    }
    context.record(&line)?;
    Ok(tried.is_ok())
}

/// Computes a product and a sum in whole numbers, which every device must get right to the bit.
fn works(gpu: &Gpu) -> Result<()> {
    const N: usize = 64;
    let a: Vec<f32> = (0..N * N).map(|i| (i % 7) as f32 - 3.0).collect();
    let b: Vec<f32> = (0..N * N).map(|i| (i % 5) as f32 - 2.0).collect();
    let [x, y] = [&a, &b].map(|values| Tensor::from_slice(gpu, values, [N, N]));
    let product = x.matmul(&y);
    let (got, sum) = (product.to_vec::<f32>()?, product.sum_all().to_vec::<f32>()?);
    let want = |at: usize| (0..N).map(|k| a[at / N * N + k] * b[k * N + at % N]).sum::<f32>();
    let want: Vec<f32> = (0..N * N).map(want).collect();
    if got != want || sum != [want.iter().sum::<f32>()] {
        return Err(Error::device("a product or a sum of whole numbers is wrong; update the driver"));
    }
    Ok(())
}

/// What to install or to change.
fn advice(adapters: &[AdapterSummary]) -> Vec<String> {
    let mut advice = Vec::new();
    let real = adapters.iter().any(|adapter| !adapter.is_software());
    for (card, driver) in unseen(&cards(Path::new("/sys/class/drm")), adapters) {
        advice.push(format!(
            "the kernel sees a card of {card}, but no adapter of it is offered: install {driver}"
        ));
    }
    if adapters.is_empty() {
        advice.push(match std::env::consts::OS {
            "linux" => "install a software driver: mesa-vulkan-drivers and libvulkan1 (Debian, Ubuntu), \
                        mesa-vulkan-drivers and vulkan-loader (Fedora), vulkan-swrast (Arch)"
                .into(),
            "windows" => {
                "install the graphics driver of the card's vendor; Windows 10 or later brings a software one"
                    .into()
            }
            other => format!("no adapter is offered on {other}; Vulkan, Metal, DX12 or OpenGL is needed"),
        });
    } else if !real {
        advice.push("only software drivers are offered: they compute on the CPU".into());
    }
    advice
}

/// The vendors of this machine's graphics cards, as Linux lists them.
fn cards(folder: &Path) -> Vec<u32> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.map(|entry| -> PathBuf { entry.path().join("device/vendor") });
    let ids = files.filter_map(|file| {
        let text = std::fs::read_to_string(file).ok()?;
        u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
    });
    let mut ids: Vec<u32> = ids.collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Vendors with a card but without an adapter, and what to install for them.
fn unseen(cards: &[u32], adapters: &[AdapterSummary]) -> Vec<(&'static str, &'static str)> {
    let known = [
        (
            0x10de,
            "NVIDIA",
            "NVIDIA's driver with its Vulkan part (libnvidia-gl on Ubuntu, nvidia-vulkan-icd on Debian)",
        ),
        (0x1002, "AMD", "mesa-vulkan-drivers"),
        (0x8086, "Intel", "mesa-vulkan-drivers"),
    ];
    let there = |id: u32| adapters.iter().any(|adapter| adapter.vendor == id);
    let missing = known.into_iter().filter(|(id, ..)| cards.contains(id) && !there(*id));
    missing.map(|(_, name, driver)| (name, driver)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_without_a_driver_are_found() {
        let folder = tempfile::tempdir().expect("a folder");
        for (card, vendor) in
            [("card0", "0x10de\n"), ("card1", "0x8086\n"), ("renderD128", "0x10de\n"), ("card2", "x")]
        {
            let device = folder.path().join(card).join("device");
            std::fs::create_dir_all(&device).expect("made");
            std::fs::write(device.join("vendor"), vendor).expect("written");
        }
        let found = cards(folder.path());
        assert_eq!(found, [0x10de, 0x8086]);
        let missing: Vec<&str> = unseen(&found, &[]).into_iter().map(|(name, _)| name).collect();
        assert_eq!(missing, ["NVIDIA", "Intel"]);
        assert!(cards(&folder.path().join("nothing")).is_empty());
    }
}
