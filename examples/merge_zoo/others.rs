//! What does not merge all five networks: signatures, partly merged pairs, learned negation, and matching of three networks.

use crate::digits::Data;
use crate::mlp::{Recipe, train};
use crate::tasks::{Change, Task};
use crate::{Args, Family, Model, file_name};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tiebeam::merge::evaluate;
use tiebeam::merge::partial::{PleasOptions, merge_networks};
use tiebeam::merge::{
    Architecture, MatchOptions, Mean, ReversibleModels, Similarity, Spec, StraightThroughOptions, Weights,
    match_activations, match_weights, straight_through,
};
use tiebeam::models::network::Network;
use tiebeam::store::{Tracked, save_tensors};
use tiebeam::{Precision, Result, Rng, Tensor};

/// A line for the table: what `method` of `part` reaches, by name.
fn line(part: &str, seed: u64, method: &str, accuracy: &[(&str, f64)]) -> Value {
    let all: serde_json::Map<String, Value> =
        accuracy.iter().map(|(name, a)| (name.to_string(), json!(a))).collect();
    json!({"part": part, "seed": seed, "method": method, "accuracy": all})
}

pub fn lines(
    family: &Family,
    data: &Data,
    args: &Args,
    seed: u64,
    stop: &Arc<AtomicBool>,
) -> Result<Vec<Value>> {
    let mut all = signatures(family, data, args, seed, stop)?;
    all.extend(pairs(family, data, args, seed, stop)?);
    all.extend(negation(family, seed)?);
    all.extend(reversible(family, seed)?);
    all.extend(trend(family, seed)?);
    all.extend(three(family, data, args, seed, stop)?);
    Ok(all)
}

/// The signature of training with noise, blur or turned images, added to a network that was trained on clean images.
fn signatures(
    family: &Family,
    data: &Data,
    args: &Args,
    seed: u64,
    stop: &Arc<AtomicBool>,
) -> Result<Vec<Value>> {
    let clean = Task::new(family.gpu, data, ("clean", Change::Nothing), &mut Rng::new(0))?;
    let sizes = sizes(data, args);
    let recipe = Recipe { epochs: args.epochs as usize, batch: 50, lr: 0.02, precision: Precision::F32 };
    let model = train(family.gpu, &clean.train, (&sizes, Some(&family.base)), &recipe, seed, stop)?;
    save_tensors(family.folder.join("clean.safetensors"), &model, &BTreeMap::new())?;
    let mut lines = Vec::new();
    for task in family.tasks.iter().filter(|task| !matches!(task.change, Change::Classes(..))) {
        let reach = |weights: &dyn Weights| -> Result<[(&str, f64); 2]> {
            Ok([
                ("corrupted", family.accuracy(weights, &task.test)?),
                ("clean", family.accuracy(weights, &clean.test)?),
            ])
        };
        lines.push(line("signature", seed, &format!("{}: clean network", task.name), &reach(&model)?));
        for (word, pre) in [("with the pretrained network", true), ("without it", false)] {
            let mut parameters = json!({"weight": 1.0});
            if pre {
                parameters["pre"] = json!("base.safetensors");
            }
            let config = json!({
                "merge_method": "signature", "base_model": "clean.safetensors", "parameters": parameters,
                "models": [{"model": format!("{}.safetensors", file_name(task.name))}],
            });
            let patched = family.merge(&config)?;
            lines.push(line("signature", seed, &format!("{}: {word}", task.name), &reach(&patched)?));
        }
    }
    Ok(lines)
}

fn sizes(data: &Data, args: &Args) -> [usize; 4] {
    let width = args.width as usize;
    [data.train.x.shape()[1], width, width, data.classes()]
}

/// Two networks of different seeds, each trained on one half of the classes, merged in part and as a whole.
fn pairs(family: &Family, data: &Data, args: &Args, seed: u64, stop: &Arc<AtomicBool>) -> Result<Vec<Value>> {
    let gpu = family.gpu;
    let halves: Vec<&Task> =
        family.tasks.iter().filter(|task| matches!(task.change, Change::Classes(..))).collect();
    let recipe = Recipe { epochs: args.epochs as usize, batch: 50, lr: 0.1, precision: Precision::F32 };
    let sizes = sizes(data, args);
    let trained =
        |(n, task): (u64, &&Task)| train(gpu, &task.train, (&sizes, None), &recipe, 200 * seed + n, stop);
    let models = (0..).zip(&halves).map(trained).collect::<Result<Vec<Model>>>()?;
    let [a, b] = [&models[0], &models[1]];
    // Heads that stand apart have the classes of the second network behind those of the first.
    let reach = |network: &Network, weights: &dyn Weights, apart: bool| -> Result<Vec<(&str, f64)>> {
        let one = |(i, task): (usize, &&&Task)| {
            let own = evaluate::Task::labelled(task.name, task.test.x.clone(), task.test.labels.clone());
            let own = if apart { own.outputs(10 * i..10 * i + 10) } else { own };
            let architecture = Architecture::Network(network.clone());
            let score = architecture.score(gpu, weights, &own, &mut |_, _| Ok(()))?;
            Ok((task.name, score.main()))
        };
        halves.iter().enumerate().map(|(i, task)| one((i, &task))).collect()
    };
    let mut lines = Vec::new();
    lines.push(line("pair", seed, "average", &reach(&family.network, &Mean(vec![a, b]), false)?));
    let spec = Spec::network(a, &family.network)?;
    let matching = match_weights(gpu, &spec, a, b, &MatchOptions::default())?;
    let moved = matching.permuted(b);
    lines.push(line(
        "pair",
        seed,
        "weight matching",
        &reach(&family.network, &Mean(vec![a, &moved]), false)?,
    ));
    let inputs = Tensor::concat(&[&halves[0].train.x, &halves[1].train.x], 0);
    for (ratio, apart) in [(0.0, false), (0.5, false), (1.0, false), (0.0, true), (0.25, true), (0.5, true)] {
        let options = PleasOptions::default().ratio(ratio).separate_heads(apart);
        let merged = merge_networks(gpu, &family.network, [a, b], &inputs, &options, &mut |_, _| Ok(()))?;
        let heads = if apart { ", two heads" } else { "" };
        let name = format!("PLeaS, {ratio} apart{heads}, cost {:.2}", merged.flops);
        lines.push(line("pair", seed, &name, &reach(&merged.network, &merged.weights, apart)?));
    }
    Ok(lines)
}

/// Coefficients by which the base forgets one half of the classes, and keeps the other.
fn negation(family: &Family, seed: u64) -> Result<Vec<Value>> {
    let part =
        |name: &str| json!({"name": name, "data": format!("{}-validation.safetensors", file_name(name))});
    let (target, control) = ("digits 5-9", "digits 0-4");
    let parameters = json!({"objective": "negate", "steps": 100, "rate": 0.03, "batch": 64});
    let config = json!({
        "merge_method": "atlas", "base_model": "base.safetensors",
        "models": [{"model": format!("{}.safetensors", file_name(target))}],
        "parameters": parameters, "learn": {"tasks": [part(target), part(control)]},
    });
    let negated = family.merge(&config)?;
    let test =
        |name: &str| &family.tasks.iter().find(|task| task.name == name).expect("a task of the zoo").test;
    let reach = |weights: &dyn Weights| -> Result<[(&str, f64); 2]> {
        Ok([
            ("forgotten", family.accuracy(weights, test(target))?),
            ("kept", family.accuracy(weights, test(control))?),
        ])
    };
    let mut lines = vec![line("negation", seed, "base", &reach(&family.base)?)];
    let fixed = json!({
        "merge_method": "task_arithmetic", "base_model": "base.safetensors",
        "models": [{"model": format!("{}.safetensors", file_name(target)), "parameters": {"weight": -1.0}}],
    });
    lines.push(line("negation", seed, "task arithmetic, weight -1", &reach(&family.merge(&fixed)?)?));
    lines.push(line("negation", seed, "aTLAS, negated", &reach(&negated)?));
    Ok(lines)
}

/// Each task's network, rebuilt from bases of few vectors for all five.
fn reversible(family: &Family, seed: u64) -> Result<Vec<Value>> {
    let names: Vec<String> = family.tasks.iter().map(|task| task.name.to_string()).collect();
    let models: Vec<(String, &dyn Weights)> =
        names.iter().cloned().zip(family.models.iter().map(|model| model as &dyn Weights)).collect();
    let mut lines = Vec::new();
    for p in 1..=models.len() {
        let kept = ReversibleModels::new(family.gpu, Some(&family.base), &models, p, &mut |_, _| Ok(()))?;
        let [stored, all] = kept.numbers();
        let mut reached = Vec::new();
        for (i, task) in family.tasks.iter().enumerate() {
            let model = kept.model(family.gpu, i, Some(&family.base))?;
            reached.push((task.name, family.accuracy(&model, &task.test)?));
        }
        let name = format!("basis of {p}, {:.0}% of the numbers", 100.0 * stored as f64 / all as f64);
        lines.push(line("reversible", seed, &name, &reached));
    }
    Ok(lines)
}

/// The networks of the first tasks merged, for more and more tasks: the mean over those that are merged.
fn trend(family: &Family, seed: u64) -> Result<Vec<Value>> {
    let methods = [
        ("task arithmetic", json!({"merge_method": "task_arithmetic", "parameters": {"weight": 0.4}})),
        ("TIES", json!({"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.2}})),
        (
            "breadcrumbs, by rows",
            json!({
                "merge_method": "breadcrumbs",
                "parameters": {"weight": 0.4, "density": 0.85, "gamma": 0.01, "mask": "last_axis"},
            }),
        ),
    ];
    let names: Vec<String> = family.tasks.iter().map(|task| file_name(task.name)).collect();
    let mut lines = Vec::new();
    for (name, config) in methods {
        let mut reached = Vec::new();
        let titles = ["1 task", "2 tasks", "3 tasks", "4 tasks", "5 tasks"];
        for (n, title) in (1..=names.len()).zip(titles) {
            let mut config = config.clone();
            config["base_model"] = json!("base.safetensors");
            config["models"] =
                names[..n].iter().map(|name| json!({"model": format!("{name}.safetensors")})).collect();
            let merged = family.merge(&config)?;
            let own = family.tasks[..n].iter().map(|task| family.accuracy(&merged, &task.test));
            reached.push((title, own.sum::<Result<f64>>()? / n as f64));
        }
        lines.push(line("trend", seed, name, &reached));
    }
    Ok(lines)
}

/// Three networks from three seeds, of which two are matched to the first in several ways.
fn three(family: &Family, data: &Data, args: &Args, seed: u64, stop: &Arc<AtomicBool>) -> Result<Vec<Value>> {
    let gpu = family.gpu;
    let sizes = sizes(data, args);
    let recipe = Recipe { epochs: 20, batch: 50, lr: 0.1, precision: Precision::F32 };
    let clean = Task::new(gpu, data, ("clean", Change::Nothing), &mut Rng::new(0))?;
    let trained = |n: u64| train(gpu, &clean.train, (&sizes, None), &recipe, 100 * seed + n, stop);
    let models = (0..3).map(trained).collect::<Result<Vec<Model>>>()?;
    let network = Network::mlp(&models[0])?;
    let spec = Spec::network(&models[0], &network)?;
    let (a, inputs) = (&models[0], &clean.train.x);
    let labels = Tensor::from_slice(gpu, &clean.train.labels, [clean.train.labels.len()]);
    let mut lines = Vec::new();
    for method in ["as they are", "weight matching", "activation matching", "straight-through"] {
        let permuted = |b: &Model| -> Result<Model> {
            let permutation = match method {
                "weight matching" => match_weights(gpu, &spec, a, b, &MatchOptions::default())?.permutation,
                "activation matching" => {
                    match_activations(
                        gpu,
                        &network,
                        &spec,
                        [a, b],
                        inputs,
                        Similarity::InnerProduct,
                        &mut |_, _| Ok(()),
                    )?
                    .permutation
                }
                "straight-through" => {
                    let options = StraightThroughOptions::default().steps(60);
                    let mut loss = |middle: &Model, _: usize| {
                        let logits = network.run(gpu, &Tracked(middle), inputs, &mut |_| None)?;
                        Ok(logits.cross_entropy(&labels, None))
                    };
                    straight_through(gpu, &spec, a, b, &options, &mut loss)?.permutation
                }
                _ => return Ok(b.clone()),
            };
            let moved = permutation.permuted(b);
            moved.names().into_iter().map(|name| Ok((name.clone(), moved.read(gpu, &name)?))).collect()
        };
        let [b, c] = [permuted(&models[1])?, permuted(&models[2])?];
        let mean = Mean(vec![a, &b, &c]);
        let accuracy = family.accuracy(&mean, &clean.test)?;
        lines.push(line("three", seed, method, &[("test", accuracy)]));
    }
    Ok(lines)
}
