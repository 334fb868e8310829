//! Every parameter of every method at the ends of its range, just inside and just outside.

use crate::merges::*;
use crate::support::within;
use std::collections::{BTreeMap, BTreeSet};
use tiebeam::Rng;
use tiebeam::merge::method::Method;
use tiebeam::store::{Entry, FileDType, save};

const SIZE: usize = 96;

/// Writes `base`, `a` and `b` with one tensor, and Fisher diagonals for `a` and `b`. Returns their values.
fn models(folder: &Folder, scale: f32) -> BTreeMap<&'static str, Vec<f64>> {
    let mut rng = Rng::new(5);
    let mut all = BTreeMap::new();
    for name in ["base", "a", "b", "fa", "fb"] {
        let mut x = vec![0.0f32; SIZE];
        rng.fill_normal(&mut x);
        x.iter_mut().for_each(|x| *x = if name.starts_with('f') { x.abs() } else { *x * scale });
        let entry = Entry::bytes("w", FileDType::F32, &[SIZE], bytemuck::cast_slice(&x).to_vec());
        save(folder.0.join(format!("{name}.safetensors")), [entry], &BTreeMap::new()).expect("written");
        all.insert(name, x.into_iter().map(f64::from).collect());
    }
    all
}

/// A configuration with one parameter changed.
fn config(method: &str, key: &str, value: &str) -> String {
    let of = Method::parse(method).expect("a method");
    let mut own = BTreeMap::from([("weight", "1"), ("loss", "1"), ("fisher", "f?.safetensors")]);
    own.retain(|key, _| of.parameters().contains(key));
    let mut top = BTreeMap::from([("t", "0.5")]);
    top.retain(|key, _| of.parameters().contains(key));
    if key == "step" {
        own.remove("loss");
    }
    if of.is_per_model(key) {
        own.insert(key, value)
    } else {
        top.insert(key, value)
    };
    let text = |map: &BTreeMap<&str, &str>, model: &str| {
        let pairs: Vec<String> = map.iter().map(|(k, v)| format!("{k}: {}", v.replace('?', model))).collect();
        pairs.join(", ")
    };
    let count = of.models().1.min(2);
    let listed: Vec<String> = ["a", "b"][..count]
        .iter()
        .map(|m| format!("{{model: {m}.safetensors, parameters: {{{}}}}}", text(&own, m)))
        .collect();
    let base = if of.needs_base() { "base_model: base.safetensors\n" } else { "" };
    format!(
        "merge_method: {method}\n{base}models: [{}]\nparameters: {{{}}}\n",
        listed.join(", "),
        text(&top, "")
    )
}

enum Want {
    /// The base, to the last bit.
    Base,
    /// This of the base and the two models, element by element.
    Is(fn(f64, f64, f64) -> f64),
    /// Numbers that are finite.
    Finite,
    /// An error with these words.
    Refused(&'static str),
}
use Want::*;

const METHODS: [&str; 17] = [
    "average",
    "linear",
    "slerp",
    "nuslerp",
    "task_arithmetic",
    "ties",
    "ties_global",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "pcb",
    "signature",
    "model_stock",
    "fisher",
    "metrics_weighted",
    "passthrough",
];

/// What is wanted at a value of a parameter.
fn wanted(method: &str, key: &str, value: &str) -> Option<Want> {
    let share = "it must be in [0, 1]";
    let thins = !matches!(method, "linear" | "nuslerp" | "task_arithmetic" | "fisher");
    Some(match (method, key, value) {
        (_, "density", "0") => Base,
        (_, "density" | "gamma" | "ratio", "-1e-9" | "1.000001" | ".nan") if value == ".nan" => {
            Refused("must be a number")
        }
        (_, "density" | "gamma" | "ratio", "-1e-9" | "1.000001") => Refused(share),
        ("dare_linear", "density", "1") => Is(|base, a, b| a + b - base),
        ("breadcrumbs", "density", "1") => Is(|base, a, b| a + b - base),
        ("pcb", "ratio", "0") => Base,
        (_, "density" | "gamma" | "ratio", _) => Finite,
        ("linear", "weight", "0") => Refused("sum to 0"),
        ("fisher", "weight", "0") => Refused("every weight is 0"),
        ("nuslerp", "weight", _) if !value.contains("39") => Finite,
        ("task_arithmetic", "weight", "0") => Base,
        (_, "weight", "0") if thins => Base,
        (_, "weight" | "lambda" | "scale" | "power" | "t", "1e39" | "-1e39") => Refused("a number of f32"),
        (_, "lambda", "0") => Base,
        ("task_arithmetic", "lambda", "1") => Is(|base, a, b| a + b - base),
        ("passthrough", "scale", "0") => Is(|_, _, _| 0.0),
        ("passthrough", "scale", "1") => Is(|_, a, _| a),
        ("passthrough", "scale", "-1") => Is(|_, a, _| -a),
        ("slerp", "t", "0") => Is(|base, _, _| base),
        ("slerp", "t", "1") => Is(|_, a, _| a),
        ("linear", "weight", "-1" | "1" | "1e-5") => Is(|_, a, b| (a + b) / 2.0),
        ("metrics_weighted", "power", _) => Is(|_, a, b| (a + b) / 2.0),
        ("metrics_weighted", "loss" | "step", "1e300" | "1" | "1e-30") => Is(|_, a, b| (a + b) / 2.0),
        ("metrics_weighted", "loss" | "step", _) => Refused("it must be above 0"),
        ("fisher", "floor", "0" | "-1" | "1e-60") => Refused("it must be above 0"),
        (_, "seed", "-1" | "0.5" | "1e16") => Refused("it must be a whole number"),
        (_, "weight" | "lambda" | "t" | "floor" | "seed", _) => Finite,
        _ => return None,
    })
}

#[test]
fn every_parameter_holds_at_its_ends() {
    let folder = Folder::new("ends");
    let x = models(&folder, 1.0);
    let mut seen = BTreeSet::new();
    for method in METHODS {
        for &key in Method::parse(method).expect("a method").parameters() {
            let values: &[&str] = match key {
                "density" | "gamma" | "ratio" => {
                    &["-1e-9", "0", "1e-300", "1e-9", "0.5", "0.999999", "1", "1.000001", ".nan"]
                }
                "weight" => &["-1e39", "-1", "0", "1e-5", "1", "1e39"],
                "lambda" => &["-1e39", "-1", "0", "1", "1e39"],
                "scale" => &["-1e39", "-1", "0", "1", "1e39"],
                "t" => &["-0.5", "0", "1e-9", "1", "1.5", "1e39"],
                "power" => &["-1e38", "0", "1", "1e38", "1e39"],
                "loss" | "step" => &["-1", "0", "1e-60", "1e-30", "1", "1e300"],
                "floor" => &["-1", "0", "1e-60", "1e-30", "1"],
                "seed" => &["-1", "0", "0.5", "9007199254740991", "1e16"],
                // Words and flags have no ends, and paths none either.
                "normalize" | "rescale" | "int8_mask" | "mask" | "fisher" | "clean" | "pre" => continue,
                other => panic!("{method}: `{other}` has no values here"),
            };
            seen.insert(key);
            for value in values {
                let text = config(method, key, value);
                let want = wanted(method, key, value).unwrap_or_else(|| panic!("{method} {key} {value}"));
                let found = folder.merge(&text).map(|merged| values_of(&merged));
                match (want, found) {
                    (Refused(words), Err(error)) => {
                        assert!(error.to_string().contains(words), "{text}{error}");
                    }
                    (Refused(words), Ok(_)) => panic!("{text}is merged; wanted {words}"),
                    (_, Err(error)) => panic!("{text}{error}"),
                    (Base, Ok(found)) => assert_eq!(found, x["base"], "{text}"),
                    (Finite, Ok(found)) => assert!(found.iter().all(|x| x.is_finite()), "{text}{found:?}"),
                    (Is(f), Ok(found)) => {
                        let want: Vec<f64> =
                            (0..SIZE).map(|i| f(x["base"][i], x["a"][i], x["b"][i])).collect();
                        within(&text, &found, &want, |_| 1e-5);
                    }
                }
            }
        }
    }
    assert!(seen.len() > 10, "{seen:?}");
}

fn values_of(merged: &tiebeam::merge::Shards) -> Vec<f64> {
    values(merged, "w").into_iter().map(f64::from).collect()
}

/// A model of density 0 among others leaves nothing of itself, whatever the method does with the rest.
#[test]
fn a_density_of_0_leaves_out_one_model() {
    let folder = Folder::new("density-0");
    models(&folder, 1.0);
    for method in ["ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"] {
        let listed = |b: &str| {
            format!(
                "merge_method: {method}\nbase_model: base.safetensors\nparameters: {{density: 0.5, normalize: false}}\n\
                 models: [{{model: a.safetensors, parameters: {{weight: 0.5}}}}{b}]\n"
            )
        };
        let alone = values_of(&folder.merge(&listed("")).expect(method));
        let b = ", {model: b.safetensors, parameters: {weight: 1, density: 0}}";
        assert_eq!(values_of(&folder.merge(&listed(b)).expect(method)), alone, "{method}");
    }
}

/// Angles and cosines do not depend on the size of the weights, although f32's squares end at 1e-38 and 3e38.
#[test]
fn directions_of_tiny_and_huge_weights() {
    for scale in [1e-24f32, 1e-20, 1.0, 1e19, 1e20] {
        let folder = Folder::new("sizes");
        models(&folder, scale);
        let plain = Folder::new("sizes-1");
        models(&plain, 1.0);
        for text in [
            config("slerp", "t", "0.25"),
            config("nuslerp", "weight", "2"),
            "merge_method: model_stock\nbase_model: base.safetensors\nmodels: [{model: a.safetensors}, {model: b.safetensors}]"
                .to_string(),
        ] {
            let [found, want] = [&folder, &plain].map(|f| values_of(&f.merge(&text).expect("merged")));
            let found: Vec<f64> = found.iter().map(|x| x / f64::from(scale)).collect();
            within(&format!("{scale} {text}"), &found, &want, |_| 2e-5);
        }
    }
}
