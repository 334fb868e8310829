//! Opening a device: features that are turned off, environment variables, and output to stdout and stderr.

use super::*;
use std::process::Command;
use tiebeam::{Feature, Options};

/// A product, a reduction and a fused chain in both float types.
fn some_ops(gpu: &Gpu) -> Vec<f32> {
    let whole: Vec<f32> = (0..48 * 48).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
    let x = Tensor::from_slice(gpu, &whole, [48, 48]);
    let half = x.cast(DType::F16);
    let y = x.matmul(&x.t()).add(&half.matmul(&half)).affine(0.5, 1.0);
    y.sum(0).to_vec().expect("readable")
}

#[test]
fn every_feature_can_be_left_alone() {
    let want = some_ops(gpu());
    for off in [Feature::F16, Feature::Subgroups, Feature::Timestamps, Feature::CooperativeMatrix] {
        let gpu = Gpu::open_with(Options::default().without(vec![off])).unwrap();
        let features = &gpu.adapter().features;
        assert!(!features.contains(&off.name()), "{off:?}: {features:?}");
        let kept = |feature: Feature| features.contains(&feature.name());
        let had = |feature: Feature| self::gpu().adapter().features.contains(&feature.name());
        assert_eq!(gpu.has_f16(), kept(Feature::F16));
        assert_eq!(gpu.has_timestamps(), kept(Feature::Timestamps));
        assert!(!gpu.has_coop_matrices() || kept(Feature::CooperativeMatrix));
        assert_eq!(off == Feature::Timestamps, had(Feature::Timestamps) && gpu.time(|| ()).is_err());
        if off == Feature::F16 {
            assert!(!kept(Feature::CooperativeMatrix), "they need f16");
        } else {
            assert_eq!(kept(Feature::F16), had(Feature::F16), "the others stay");
        }
        assert_eq!(some_ops(&gpu), want, "without {off:?}");
    }
}

/// Opens the device by the environment's variables. The tests below run this in a process of its own.
#[test]
#[ignore = "the tests below run it, each in a process of its own"]
fn child_opens() {
    let gpu = Gpu::open().unwrap_or_else(|error| {
        println!("error: {error}");
        std::process::exit(0)
    });
    println!("features: {}", gpu.adapter().features.join(" "));
    println!("adapters: {}", Gpu::adapters().map_or_else(|e| e.to_string(), |all| all.len().to_string()));
    assert!(some_ops(&gpu).iter().all(|x| x.is_finite()));
}

/// Returns stdout and stderr of a child that opens the device under this environment.
fn child(set: &[(&str, &str)], unset: &[&str]) -> (String, String) {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", "device::open::child_opens", "--ignored", "--nocapture"]);
    for name in unset {
        command.env_remove(name);
    }
    let done = command.envs(set.iter().copied()).output().expect("a child");
    assert!(done.status.success(), "{done:?}");
    let [out, err] = [done.stdout, done.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(out.contains("1 passed"), "{out}");
    (out, err)
}

#[test]
fn the_environment_leaves_features_alone() {
    let (out, _) = child(&[("TIEBEAM_OFF", "timestamps, f16")], &[]);
    let line = out.lines().find_map(|line| line.split_once("features: ")).expect("the features").1;
    assert!(!line.contains("timestamps") && !line.contains("f16"), "{line}");
}

#[test]
fn words_that_name_no_feature_are_refused() {
    let done = child_error("TIEBEAM_OFF", "f16,fp64");
    let want = "TIEBEAM_OFF: 'fp64' is no feature; there are f16, subgroups, timestamps, cooperative-matrix, pipeline-cache";
    assert!(done.contains(want), "{done}");
}

/// Returns the message of a child that cannot open the device.
fn child_error(name: &str, value: &str) -> String {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", "device::open::child_opens", "--ignored", "--nocapture"]);
    let done = command.env(name, value).output().expect("a child");
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// A search for OpenGL adapters would make its libraries print warnings if there is no display.
#[test]
fn nothing_is_written_to_stderr() {
    let unset =
        ["XDG_RUNTIME_DIR", "DISPLAY", "WAYLAND_DISPLAY", "RUST_LOG", "TIEBEAM_BACKEND", "TIEBEAM_ADAPTER"];
    let (_, err) = child(&[], &unset);
    assert_eq!(err, "");
}
