//! `tiebeam train --data`: networks on labelled rows.

use crate::merges::Folder;
use crate::{command, merge, text};
use std::process::Command;

/// A folder with `data.safetensors`, in which are 8 x 8 digits `x` and their classes `y`, and the settings of a network.
fn folder(name: &str) -> Folder {
    let folder = merge::networks(name);
    folder.write("net.toml", "layers = [64, 16, 10]\n");
    folder
}

fn train(folder: &Folder, more: &[&str]) -> Command {
    let mut train = command();
    train.args(["train", "--model", "net.toml", "--data", "data.safetensors"]);
    train.args(more).current_dir(&folder.0);
    train
}

/// What a run that must succeed printed.
fn done(folder: &Folder, more: &[&str]) -> String {
    let output = train(folder, more).output().expect("the command starts");
    assert!(output.status.success(), "{more:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// What a run that must fail said.
fn failed(folder: &Folder, more: &[&str]) -> String {
    let output = train(folder, more).output().expect("the command starts");
    assert_eq!(output.status.code(), Some(1), "{more:?}: {output:?}");
    text(&output.stderr)
}

/// A run with `--resume` ends with the bytes of one that was not stopped: parameters and curve, also where it was stopped between two
/// points. `tiebeam evaluate` opens what it wrote.
#[cfg(unix)]
#[test]
fn a_stopped_network_goes_on_with_the_same_bytes() {
    use serde_json::Value;
    use std::process::Stdio;
    let folder = folder("network-resume");
    for (kind, exchange) in [("g", "gradients"), ("s", "scalars:8")] {
        let [whole, parts] = ["whole", "parts"].map(|name| format!("{kind}-{name}"));
        let run = |out: &str, more: &[&str]| {
            let all = ["--steps", "2800", "--every", "200", "--batch", "16", "--exchange", exchange, "--out"];
            train(&folder, &[&all[..], &[out], more].concat())
        };
        assert!(run(&whole, &[]).output().unwrap().status.success());
        let mut child = run(&parts, &[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let checkpoint = folder.0.join(&parts).join("checkpoint.safetensors");
        while !checkpoint.is_file() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        let stopped = child.wait_with_output().unwrap();
        assert!(text(&stopped.stderr).contains("stopped after step "), "{stopped:?}");
        let again = run(&parts, &[]).output().unwrap();
        assert!(text(&again.stderr).contains("--resume goes on"), "{again:?}");
        let other = run(&parts, &["--resume", "--warmup", "9"]).output().unwrap();
        assert!(text(&other.stderr).contains("`train.warmup` is '280' there and '9' here"), "{other:?}");
        let resumed = run(&parts, &["--resume"]).output().unwrap();
        assert!(resumed.status.success(), "{}", text(&resumed.stderr));
        for name in ["model.safetensors", "curve.jsonl"] {
            let [a, b] = [&whole, &parts].map(|out| std::fs::read(folder.0.join(out).join(name)).unwrap());
            assert!(a == b, "{exchange}: {name} differs: {} and {}", text(&a), text(&b));
        }
        let curve = std::fs::read_to_string(folder.0.join(&parts).join("curve.jsonl")).unwrap();
        let points: Vec<Value> = curve.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let steps: Vec<u64> = points.iter().filter_map(|point| point["step"].as_u64()).collect();
        assert_eq!(steps, (1..=14).map(|i| 200 * i).collect::<Vec<_>>());
        assert!(points.iter().all(|point| point["loss"].is_f64()), "{curve}");
    }
    let last = std::fs::read_to_string(folder.0.join("g-whole/curve.jsonl")).unwrap();
    let last: Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
    assert!(last["accuracy"].as_f64().unwrap() > 0.8, "{last}");
    let scored = command()
        .args(["evaluate", "g-whole/model.safetensors", "--data", "data.safetensors"])
        .current_dir(&folder.0)
        .output()
        .unwrap();
    assert!(scored.status.success(), "{}", text(&scored.stderr));
}

/// What does not fit is told before a folder is made.
#[test]
fn rows_that_do_not_fit_are_told_first() {
    let folder = folder("network-refused");
    let with = |layers: &str, more: &[&str]| {
        folder.write("net.toml", layers);
        failed(&folder, &[&["--out", "none"], more].concat())
    };
    for (layers, more, want) in [
        ("width = 3", &[][..], "it needs `layers`, such as [64, 32, 10]"),
        ("layers = [64, 10]\ndepth = 2", &[], "`depth` is no setting of a network"),
        ("layers = [64]", &[], "give two sizes above 0 or more"),
        ("layers = [64, 0, 10]", &[], "give two sizes above 0 or more"),
        ("layers = [63, 10]", &[], "rows of 64 numbers, and the network has 63 inputs"),
        ("layers = [64, 9]", &[], "label 9, and the network has 9 outputs"),
        ("layers = [64, 10]", &["--held-out", "100000"], "give --held-out a number of at least 1 and below"),
        ("layers = [64, 10]", &["--batch", "2", "--accumulate", "3"], "take a batch of at least 3"),
        ("layers = [64, 10]", &["--labels", "z"], "`z`"),
        ("layers = [64, 3000000000, 10]", &[], "a matrix of 64 x 3000000000 has more than 2^29 numbers"),
        (
            "layers = [64, 10]",
            &["--exchange", "scalars", "--weight-decay", "0.1"],
            "--weight-decay: with --exchange scalars there is none",
        ),
        ("layers = [64, 10]", &["--resume"], "there is no none/checkpoint.safetensors"),
    ] {
        let told = with(layers, more);
        assert!(told.contains(want), "{layers} {more:?}: {told}");
    }
    assert!(!folder.0.join("none").exists(), "what is refused leaves nothing behind");
    for option in [["--precision", "f16"], ["--validation", "v"], ["--tokenizer", "t"], ["--sample", "s"]] {
        // Wrong arguments, with the status of those.
        let output = train(&folder, &[&["--out", "none"], &option[..]].concat()).output().unwrap();
        let told = text(&output.stderr);
        assert!(
            output.status.code() == Some(2)
                && told.contains("cannot be used with")
                && told.contains(option[0]),
            "{told}"
        );
    }
    // A run that diverges says so, and the same command begins again.
    let told = with("layers = [64, 10]", &["--steps", "40", "--lr", "1e38"]);
    assert!(told.contains("begin again with a smaller learning rate"), "{told}");
    let printed = done(&folder, &["--out", "none", "--steps", "4", "--every", "2"]);
    assert!(printed.contains("step      2  loss ") && printed.contains("rows are right"), "{printed}");
}

/// More held-out rows than are measured at a time have the numbers that `tiebeam evaluate` finds in a file of them alone.
#[test]
fn many_held_out_rows_are_measured_in_parts() {
    use tiebeam::store::{Entry, save};
    let folder = folder("network-many");
    folder.write("net.toml", "layers = [3, 2]\n");
    let mut x = vec![0.0; 3 * 10_000];
    tiebeam::Rng::new(1).fill_normal(&mut x);
    let labels: Vec<u32> = x.chunks(3).map(|row| u32::from(row[0] + 0.5 * row[1] > 0.3)).collect();
    let rows = |name: &str, rows: std::ops::Range<usize>| {
        let inputs = Entry::f32("x", &[rows.len(), 3], &x[3 * rows.start..3 * rows.end]);
        let entries = [inputs, Entry::u32("y", &[rows.len()], &labels[rows])];
        save(folder.0.join(name), entries, &Default::default()).unwrap();
    };
    rows("data.safetensors", 0..10_000);
    rows("held-out.safetensors", 1_000..10_000);
    let output = train(&folder, &["--out", "out", "--held-out", "9000", "--steps", "20"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let scored = command()
        .args(["evaluate", "out/model.safetensors", "--data", "held-out.safetensors", "--json"])
        .current_dir(&folder.0)
        .output()
        .unwrap();
    let line = |text: &str| serde_json::from_str::<serde_json::Value>(text.lines().last().unwrap()).unwrap();
    let point = line(&std::fs::read_to_string(folder.0.join("out/curve.jsonl")).unwrap());
    let scored = line(&text(&scored.stdout));
    let near = |a: &serde_json::Value, b: &serde_json::Value| {
        (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-6
    };
    assert!(near(&point["accuracy"], &scored["accuracy"]), "{point} {scored}");
    assert!(near(&point["validation"], &scored["loss"]), "{point} {scored}");
}
