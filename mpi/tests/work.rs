//! Merges, zoos and predictions under `mpirun`, which have the results of one rank.

mod support;

use std::path::Path;
use support::{Place, errors, model, mpirun, program, run, said, two};
use tiebeam::geometry::xyz::{Frame, Writer};
use tiebeam::geometry::{Grid, PonitaConfig, Potential};
use tiebeam::store::Entry;

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect();
    all.sort();
    all
}

#[test]
fn merges_have_the_bytes_of_one_rank() {
    let place = Place::new();
    for seed in 0..3 {
        model(&place.path(&format!("m{seed}.safetensors")), seed);
    }
    let config = "merge_method: ties\nbase_model: m0.safetensors\nmodels:\n- {model: m1.safetensors, parameters: {weight: 1, density: 0.3}}\n- {model: \
                  m2.safetensors, parameters: {weight: 0.5, density: 0.5}}\n";
    std::fs::write(place.path("m.yaml"), config).unwrap();
    let merge = |ranks: usize, out: &str| {
        let words = ["merge", &place.text("m.yaml"), "--out", &place.text(out), "--shard-size", "100kB"]
            .map(String::from);
        run(ranks, &words)
    };
    for (ranks, out) in [(1, "one"), (2, "two"), (4, "four")] {
        let output = merge(ranks, out);
        assert!(output.status.success(), "{}", said(&output));
    }
    let one = files(&place.path("one"));
    assert!(one.len() > 4 && one == files(&place.path("two")) && one == files(&place.path("four")));
    // What one rank finds wrong with its tensor is said, and nothing is left.
    let mut bytes = std::fs::read(place.path("m1.safetensors")).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(place.path("m1.safetensors"), bytes).unwrap();
    // TIES finds it where the tensor is made, PCB already where all tensors are measured.
    let measured = "merge_method: pcb\nbase_model: m0.safetensors\nmodels:\n- {model: m1.safetensors}\n- {model: m2.safetensors}\nparameters: {ratio: 0.2}\n";
    for config in [config, measured] {
        std::fs::write(place.path("m.yaml"), config).unwrap();
        let output = merge(3, "bad");
        let told = errors(&output);
        assert!(told.len() == 1 && told[0].contains("has NaN or infinity at element "), "{}", said(&output));
        assert!(told[0].matches("rank ").count() < 2, "{told:?}");
        assert!(!place.path("bad").exists());
    }
}

/// Every rank aligns for itself, and all must find the same.
#[test]
fn aligned_merges_have_the_bytes_of_one_rank() {
    let place = Place::new();
    for seed in 0..2 {
        let mut rng = tiebeam::Rng::new(seed);
        let layers = [("fc0.weight", vec![40, 8]), ("fc0.bias", vec![40]), ("fc1.weight", vec![3, 40])];
        let all = layers.map(|(name, shape)| {
            let mut values = vec![0.0; shape.iter().product()];
            rng.fill_normal(&mut values);
            (name, shape, values)
        });
        let entries = all.iter().map(|(name, shape, values)| Entry::f32(*name, shape, values));
        tiebeam::store::save(place.path(&format!("m{seed}.safetensors")), entries, &Default::default())
            .unwrap();
    }
    let config = "merge_method: average\nmodels: [{model: m0.safetensors}, {model: m1.safetensors}]\nalign: {spec: mlp}\n";
    std::fs::write(place.path("m.yaml"), config).unwrap();
    for (ranks, out) in [(1, "one"), (3, "three")] {
        let output =
            run(ranks, &["merge", &place.text("m.yaml"), "--out", &place.text(out)].map(String::from));
        assert!(output.status.success(), "{}", said(&output));
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(printed.matches("aligned ").count(), 1, "{printed}");
    }
    assert!(files(&place.path("one")) == files(&place.path("three")));
}

#[test]
fn a_zoos_runs_are_shared() {
    let place = Place::new();
    let zoo = |ranks: usize, out: &str| {
        let words = [
            "zoo",
            "lm",
            "--text",
            &place.text("text.txt"),
            "--out",
            &place.text(out),
            "--scale",
            "tiny",
            "--steps",
            "4",
        ];
        let more = ["--seeds", "1,2", "--variants", "none,tied,narrow-4", "-q"];
        run(ranks, &words.iter().chain(&more).map(ToString::to_string).collect::<Vec<_>>())
    };
    for (ranks, out) in [(1, "one"), (3, "three")] {
        let output = zoo(ranks, out);
        assert!(output.status.success(), "{}", said(&output));
    }
    let results = |out: &str| {
        let text = std::fs::read_to_string(place.path(out).join("results.jsonl")).unwrap();
        let line = |line: &str| {
            let mut json: serde_json::Value = serde_json::from_str(line).unwrap();
            json.as_object_mut().unwrap().remove("seconds");
            json.to_string()
        };
        text.lines().map(line).collect::<Vec<String>>()
    };
    assert_eq!(results("one"), results("three"));
    assert_eq!(results("one").len(), 6);
    let again = zoo(2, "three");
    assert!(again.status.success() && results("three").len() == 6);
    // A call that was killed when it had put a rank's lines to the others counts none twice.
    let lines = std::fs::read_to_string(place.path("three").join("results.jsonl")).unwrap();
    std::fs::write(place.path("three").join("unfinished/rank-1.jsonl"), lines.lines().next().unwrap())
        .unwrap();
    assert!(zoo(2, "three").status.success() && results("three").len() == 6);
    // Folders that only look the same.
    let arguments = |out: &str| {
        let words = format!(
            "zoo lm --text {} --out {} --scale tiny --steps 4",
            place.text("text.txt"),
            place.text(out)
        );
        words
            .split(' ')
            .chain(["--seeds", "1,2", "--variants", "tied", "-q"])
            .map(String::from)
            .collect::<Vec<_>>()
    };
    let output = two(&arguments("here"), &arguments("there"), &[]);
    let told = errors(&output);
    assert!(!output.status.success() && told.len() == 1, "{}", said(&output));
    let wanted = "--out: 1 runs of other ranks are not in ";
    assert!(
        told[0].starts_with(wanted) && told[0].ends_with("name a folder that all ranks share"),
        "{told:?}"
    );
}

/// Clusters of copper and oxygen near a lattice.
fn clusters(count: usize) -> Vec<Frame> {
    let mut rng = tiebeam::Rng::new(5);
    let mut one = |i: usize| {
        let mut draws = [0.0; 3 * 64];
        rng.fill_normal(&mut draws);
        let place = |atom: usize, k: usize| [atom % 4, atom / 4 % 4, atom / 16][k] as f64;
        let at = |atom: usize| {
            std::array::from_fn(|k| 2.4 * (place(atom, k) + 0.1 * f64::from(draws[3 * atom + k])))
        };
        Frame {
            energy: Some(-200.0 + i as f64),
            positions: (0..64).map(at).collect(),
            forces: Some(vec![[0.5, -0.5, 0.25]; 64]),
            species: (0..64).map(|atom| if atom % 3 == 0 { 8 } else { 29 }).collect(),
            ..Frame::default()
        }
    };
    (0..count).map(&mut one).collect()
}

/// A small untrained potential for them.
fn potential(frames: &[Frame], path: &Path) {
    let gpu = tiebeam::Gpu::open().unwrap();
    let config = PonitaConfig::default().channels(8).hidden(8).basis(8).layers(1).radius(Some(4.0));
    let mut rng = tiebeam::Rng::new(3);
    let mut potential = Potential::new(&gpu, frames, config, Grid::icosahedron(), &mut rng).unwrap();
    let batch = potential.batch(&frames.iter().collect::<Vec<_>>()).unwrap();
    potential.net.calibrate(&batch.graph, &batch.input).unwrap();
    potential.save(path).unwrap();
}

#[test]
fn predictions_have_the_bytes_of_one_rank() {
    let place = Place::new();
    let frames = clusters(70);
    potential(&frames[..2], &place.path("model.safetensors"));
    let write = |name: &str, frames: &[Frame]| {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, name);
        frames.iter().try_for_each(|frame| writer.write(frame)).unwrap();
        std::fs::write(place.path(name), &bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    };
    let text = write("in.xyz", &frames);
    let predict = |ranks: usize, input: &str, out: &str| {
        let words = ["predict", &place.text("model.safetensors"), &place.text(input), &place.text(out)]
            .map(String::from);
        run(ranks, &words)
    };
    for (ranks, out) in [(1, "one.xyz"), (2, "two.xyz"), (4, "four.xyz")] {
        let output = predict(ranks, "in.xyz", out);
        assert!(output.status.success(), "{}", said(&output));
    }
    let read = |name: &str| std::fs::read(place.path(name)).unwrap();
    assert!(
        read("one.xyz").len() > 10_000
            && read("one.xyz") == read("two.xyz")
            && read("one.xyz") == read("four.xyz")
    );
    // Rank 0's stdin is everyone's. MPICH's mpirun gives up on more than a pipe holds.
    write("few.xyz", &frames[..2]);
    assert!(predict(1, "few.xyz", "few-out.xyz").status.success());
    let mut job = mpirun();
    job.args(["-n", "3"]).arg(program()).args([
        "predict",
        &place.text("model.safetensors"),
        "-",
        &place.text("piped.xyz"),
    ]);
    let output = job.stdin(std::fs::File::open(place.path("few.xyz")).unwrap()).output().unwrap();
    assert!(output.status.success() && read("piped.xyz") == read("few-out.xyz"), "{}", said(&output));
    // A frame that cannot be predicted, in a batch of rank 1.
    let mut text = text;
    let at = text.match_indices("\nCu ").nth(42 * 40).unwrap().0 + 1;
    text.replace_range(at..at + 2, "U");
    std::fs::write(place.path("bad.xyz"), text).unwrap();
    let output = predict(3, "bad.xyz", "bad-out.xyz");
    let told = errors(&output);
    assert!(told.len() == 1 && told[0].contains("frame 40"), "{}", said(&output));
    assert!(!place.path("bad-out.xyz").exists());
}
