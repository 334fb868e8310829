//! `tiebeam doctor`: whether each adapter works, what it offers, what is left off, and what to install.

use crate::context::Context;
use serde_json::{Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
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

/// Variables that leave adapters out: ours, and those of Vulkan's loader.
const HIDING: [&str; 4] =
    ["TIEBEAM_BACKEND", "VK_DRIVER_FILES", "VK_ICD_FILENAMES", "VK_LOADER_DRIVERS_SELECT"];

const FEATURES: [Feature; 5] = [
    Feature::F16,
    Feature::Subgroups,
    Feature::Timestamps,
    Feature::CooperativeMatrix,
    Feature::PipelineCache,
];

pub fn run(_: &Args, context: &Context) -> Result<()> {
    host(context)?;
    let adapters = Gpu::adapters()?;
    for adapter in &adapters {
        context.note(format_args!("found     {adapter}"));
    }
    // Which one is chosen is asked without opening it, so that a driver that hangs has been named before.
    let preferred = Gpu::preferred(&context.options);
    let mut working = 0;
    for adapter in &adapters {
        let chosen = preferred.as_ref().is_ok_and(|chosen| chosen.index == adapter.index);
        working += examine(adapter, chosen, context)? as usize;
    }
    let mut advice = advice(&adapters, |name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
    if let (Err(error), false) = (&preferred, adapters.is_empty()) {
        advice.insert(0, format!("the adapter that is asked for is not there: {error}"));
    }
    for line in &advice {
        context.result(format_args!("\nadvice    {line}"));
    }
    context.record(&json!({"line": "advice", "advice": advice}))?;
    context.whole();
    match (working, preferred) {
        (0, _) => Err(Error::no_adapter("none of this machine's adapters works; see above")),
        (_, Err(error)) => Err(error),
        _ => Ok(()),
    }
}

/// Shows the program, the machine and the settings.
fn host(context: &Context) -> Result<()> {
    let cache = Gpu::cache_folder();
    let shown = cache.as_deref().map_or("none".into(), |folder| folder.display().to_string());
    let (version, os, arch) = (env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH);
    context.result(format_args!("tiebeam {version}, {os} {arch}\ncache     {shown}"));
    let text = |part: std::ffi::OsString| part.to_string_lossy().into_owned();
    let all = std::env::vars_os().map(|(name, value)| (text(name), text(value)));
    let set: Vec<(String, String)> =
        all.filter(|(name, _)| name.starts_with("TIEBEAM_") || HIDING.contains(&name.as_str())).collect();
    for (name, value) in &set {
        context.result(format_args!("set       {name}={value}"));
    }
    let set: serde_json::Map<String, Value> =
        set.into_iter().map(|(name, value)| (name, value.into())).collect();
    context.record(&json!({
        "line": "host", "version": version, "os": os, "arch": arch, "cache": shown, "variables": set,
    }))
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
    let options = context.options.clone().adapter(Some(adapter.index.to_string()));
    // A driver's layer may panic; the other adapters are examined all the same.
    let tried =
        catch_unwind(AssertUnwindSafe(|| Gpu::open_with(options).and_then(|gpu| works(&gpu).map(|()| gpu))))
            .unwrap_or_else(|_| Err(Error::device("its driver's layer panicked; the message is above")));
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
            let tuned = !gpu.choices().is_empty();
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

/// What to install or to change. `set` says whether a variable is set.
fn advice(adapters: &[AdapterSummary], set: impl Fn(&str) -> bool) -> Vec<String> {
    let real = adapters.iter().any(|adapter| !adapter.is_software());
    let hiding: Vec<&str> = HIDING.into_iter().filter(|name| set(name)).collect();
    if !real && !hiding.is_empty() {
        return vec![format!("{} can hide adapters: try without", hiding.join(" and "))];
    }
    let mut advice = Vec::new();
    for (card, driver) in unseen(&cards(Path::new("/sys/class/drm")), adapters) {
        advice.push(format!(
            "the kernel sees a card of {card}, but no adapter of it is offered: install {driver}. In a container, give it the \
             card's device files; outside, be in the groups of /dev/dri"
        ));
    }
    let os = std::env::consts::OS;
    match (os, adapters.is_empty()) {
        (_, false) if real => {}
        ("linux", true) => advice.push(
            "for a software driver, install mesa-vulkan-drivers and libvulkan1 (Debian, Ubuntu), mesa-vulkan-drivers and \
             vulkan-loader (Fedora), or vulkan-swrast (Arch)"
                .into(),
        ),
        ("windows", _) => advice.push("install the driver of the graphics card's vendor".into()),
        (_, true) => advice.push(format!("no adapter is offered on {os}; Vulkan, Metal, DX12 or OpenGL is needed")),
        (_, false) => advice.push("only software drivers are offered: they compute on the CPU".into()),
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

    #[test]
    fn a_variable_that_hides_adapters_is_named_first() {
        let hidden = advice(&[], |name| name == "TIEBEAM_BACKEND");
        assert_eq!(hidden, ["TIEBEAM_BACKEND can hide adapters: try without"]);
        assert!(!advice(&[], |_| false).is_empty());
    }
}
