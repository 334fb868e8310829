//! Merging by data from end to end: each method's defining property on small networks, and what it refuses.

use crate::merges::Folder;
use crate::support::{download, gpu, within};
use std::collections::BTreeMap;
use std::sync::Arc;
use tiebeam::merge::evaluate::{Task, TaskData};
use tiebeam::merge::fisher::{FisherOptions, Labels, fisher_of};
use tiebeam::merge::learn::{LearnOptions, Objective, learn};
use tiebeam::merge::learned::fisher_diagonal;
use tiebeam::merge::map::{Combined, MapOptions, map};
use tiebeam::merge::pareto::Search;
use tiebeam::merge::written::Written;
use tiebeam::merge::{Architecture, Shards, Weights, job};
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::network::Network;
use tiebeam::nn::Module;
use tiebeam::store::{Entry, Tracked, save, save_tensors};
use tiebeam::{Rng, Tensor};

pub(crate) type Named = BTreeMap<String, Tensor>;

pub(crate) fn normal(shape: &[usize], rng: &mut Rng) -> Tensor {
    Tensor::randn(gpu(), shape, rng).contiguous()
}

/// A perceptron `6 -> 8 -> 8 -> 3`.
pub(crate) fn mlp(rng: &mut Rng) -> Named {
    let sizes = [6, 8, 8, 3];
    let mut all = Named::new();
    for i in 0..3 {
        all.insert(format!("fc{i}.weight"), normal(&[sizes[i + 1], sizes[i]], rng).scale(0.4).contiguous());
        all.insert(format!("fc{i}.bias"), normal(&[sizes[i + 1]], rng).scale(0.1).contiguous());
    }
    all
}

pub(crate) const CNN: &str = r#"{"input": [2, 5, 5], "steps": [
    {"conv": {"name": "c0", "padding": 1}}, {"batch_norm": {"name": "n0"}}, "relu",
    {"residual": {"body": [{"conv": {"name": "c1", "padding": 1}}, {"group_norm": {"name": "g"}}, "relu",
        {"conv": {"name": "d", "padding": 1, "groups": 4}}, "relu", {"conv": {"name": "c3"}}]}}, "relu",
    {"conv": {"name": "c2", "stride": 2, "padding": 1}}, "relu", "flatten", {"linear": "f0"}, "relu", {"layer_norm": {"name": "l"}},
    {"linear": "f1"}]}"#;

/// Weights of [`CNN`].
pub(crate) fn cnn(rng: &mut Rng) -> Named {
    let shapes: [(&str, &[usize]); 22] = [
        ("c0.weight", &[4, 2, 3, 3]),
        ("c0.bias", &[4]),
        ("n0.weight", &[4]),
        ("n0.bias", &[4]),
        ("n0.running_mean", &[4]),
        ("n0.running_var", &[4]),
        ("d.weight", &[4, 1, 3, 3]),
        ("d.bias", &[4]),
        ("g.weight", &[4]),
        ("g.bias", &[4]),
        ("c1.weight", &[4, 4, 3, 3]),
        ("c1.bias", &[4]),
        ("c3.weight", &[4, 4, 1, 1]),
        ("c3.bias", &[4]),
        ("c2.weight", &[5, 4, 3, 3]),
        ("c2.bias", &[5]),
        ("f0.weight", &[6, 45]),
        ("f0.bias", &[6]),
        ("l.weight", &[6]),
        ("l.bias", &[6]),
        ("f1.weight", &[3, 6]),
        ("f1.bias", &[3]),
    ];
    let one = |(name, shape): (&str, &[usize])| {
        let inner: usize = shape[1..].iter().product();
        let x = normal(shape, rng).scale(if shape.len() > 1 { 1.2 / (inner as f32).sqrt() } else { 0.1 });
        let shift =
            if name.ends_with("var") || name.ends_with("g.weight") || name == "l.weight" { 1.0 } else { 0.0 };
        (name.to_string(), x.affine(1.0, shift).contiguous())
    };
    shapes.map(one).into()
}

pub(crate) fn task(rows: usize, width: usize, rng: &mut Rng) -> Task {
    let labels = (0..rows).map(|_| rng.below(3) as u32).collect();
    Task::labelled("rows", normal(&[rows, width], rng), labels)
}

fn inputs(task: &Task) -> &Tensor {
    match &task.data {
        TaskData::Labelled(data) => &data.inputs,
        _ => panic!("rows"),
    }
}

pub(crate) fn nothing(_: usize, _: usize) -> tiebeam::Result<()> {
    Ok(())
}

/// The batched diagonals are those of one backward pass for each sample and class, for every kind of layer.
#[test]
fn fisher_in_batches_is_fisher_by_samples() {
    let mut rng = Rng::new(1);
    let networks = [
        (Network::mlp(&mlp(&mut rng)).unwrap(), mlp(&mut rng), 6),
        (Network::from_json(CNN).unwrap(), cnn(&mut rng), 50),
    ];
    for (network, weights, width) in networks {
        let task = task(7, width, &mut rng);
        let architecture = Architecture::Network(network.clone());
        // Batches of 3, 3 and 1.
        let options = FisherOptions::default().batch(3);
        let got = fisher_of(gpu(), &architecture, &weights, &task, &options, &mut nothing).unwrap();
        let is_float = |name: &str| !name.contains("running");
        let leaves: Named = weights
            .iter()
            .filter(|(name, _)| is_float(name))
            .map(|(name, x)| (name.clone(), x.copy().requires_grad()))
            .collect();
        let mut all = leaves.clone();
        weights.iter().filter(|(name, _)| !is_float(name)).for_each(|(name, x)| {
            all.insert(name.clone(), x.clone());
        });
        let want = fisher_diagonal(&leaves, 7, |s| {
            let x = inputs(&task).slice(0, s..s + 1);
            network.logits(gpu(), &Tracked(&all), &x).unwrap().reshape([3])
        })
        .unwrap();
        for (name, want) in &want {
            let want = download(want);
            let most = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            assert!(most > 0.0, "{name} has a gradient");
            within(name, &download(&got[name]), &want, |i| 2e-4 * want[i].abs() + 1e-5 * most);
        }
        for name in weights.keys().filter(|name| !is_float(name)) {
            assert!(download(&got[name]).iter().all(|&f| f == 1.0), "{name}");
        }
        // Labels that are drawn have the exact diagonal as their mean, and the same seed draws the same.
        let of = |labels, seed| {
            let options = options.labels(Some(labels)).seed(seed);
            fisher_of(gpu(), &architecture, &weights, &task, &options, &mut nothing).unwrap()
        };
        let sum = |f: &Named| f.values().flat_map(download).sum::<f64>();
        let floor: f64 = weights.iter().filter(|(n, _)| !is_float(n)).map(|(_, x)| x.count() as f64).sum();
        let exact = sum(&got) - floor;
        let drawn = (0..40).map(|seed| sum(&of(Labels::Sampled, seed)) - floor).sum::<f64>() / 40.0;
        assert!((drawn / exact - 1.0).abs() < 0.35, "{drawn} {exact}");
        let name = weights.keys().next().unwrap();
        assert_eq!(download(&of(Labels::Sampled, 3)[name]), download(&of(Labels::Sampled, 3)[name]));
        // The empirical matrix, by hand.
        let given = of(Labels::Given, 0);
        let TaskData::Labelled(data) = &task.data else { panic!("rows") };
        let mut by_hand: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for s in 0..7 {
            let logits = network.logits(gpu(), &Tracked(&all), &inputs(&task).slice(0, s..s + 1)).unwrap();
            let target = Tensor::from_slice(gpu(), &data.labels[s..s + 1], [1]);
            let grads = logits.cross_entropy(&target, None).backward().unwrap();
            for (name, leaf) in &leaves {
                let g = download(grads.get(leaf).unwrap());
                let sums = by_hand.entry(name.clone()).or_insert_with(|| vec![0.0; g.len()]);
                sums.iter_mut().zip(g).for_each(|(sum, g)| *sum += g * g / 7.0);
            }
        }
        for (name, want) in by_hand {
            let most = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            within(&name, &download(&given[&name]), &want, |i| 2e-4 * want[i] + 1e-5 * most);
        }
    }
}

#[test]
fn fisher_of_a_language_model_is_of_windows() {
    let mut rng = Rng::new(2);
    let config = LmConfig::small().vocab(13).width(8).heads(2).kv_heads(1).hidden(12).depth(1).context(6);
    let lm = Lm::new(gpu(), config, &mut rng);
    let folder = Folder::new("fisher-lm");
    let path = folder.0.join("lm.safetensors");
    lm.save(&path).unwrap();
    let shards = Shards::open(&path).unwrap();
    let architecture = Architecture::open(gpu(), &shards, None).unwrap();
    let tokens: Vec<u32> = (0..25).map(|_| rng.below(13) as u32).collect();
    let data = tiebeam::merge::evaluate::Tokens { tokens: tokens.clone(), limit: 100, context: 6 };
    let task = Task { name: "text".into(), data: TaskData::Tokens(data) };
    assert_eq!(architecture.samples(&task), 4);
    let options = FisherOptions::default().labels(Some(Labels::Given));
    let got = fisher_of(gpu(), &architecture, &shards, &task, &options, &mut nothing).unwrap();
    let named: Named = lm.parameters().named().iter().cloned().collect();
    let mut want: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for w in 0..4 {
        let part = |from: usize| Tensor::from_slice(gpu(), &tokens[6 * w + from..][..6], [1, 6]);
        let grads = lm.loss(&part(0), &part(1)).scale(6.0).backward().unwrap();
        for (name, leaf) in &named {
            let g = download(grads.get(leaf).unwrap());
            let sums = want.entry(name.clone()).or_insert_with(|| vec![0.0; g.len()]);
            sums.iter_mut().zip(g).for_each(|(sum, g)| *sum += g * g / 4.0);
        }
    }
    for (name, want) in want {
        let most = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        within(&name, &download(&got[&name]), &want, |i| 1e-3 * want[i] + 1e-5 * most);
    }
    let exact = options.labels(Some(Labels::Exact));
    let message =
        fisher_of(gpu(), &architecture, &shards, &task, &exact, &mut nothing).unwrap_err().to_string();
    assert!(message.contains("too many classes for exact labels"), "{message}");
    // Sampled ones are the default, and do not read the targets.
    let sampled =
        fisher_of(gpu(), &architecture, &shards, &task, &FisherOptions::default(), &mut nothing).unwrap();
    assert!(sampled.values().all(|f| download(f).iter().all(|x| x.is_finite() && *x >= 0.0)));
    // Rows are for networks.
    let rows = Task::labelled("rows", normal(&[2, 3], &mut rng), vec![0, 1]);
    let message = architecture.score(gpu(), &shards, &rows, &mut nothing).unwrap_err().to_string();
    assert!(message.contains("a language model needs `text`"), "{message}");
}

/// A base, two networks that were moved from it, and tasks on which the moves help: the labels are those of a target that has
/// coefficients of its own for each tensor.
pub(crate) fn moved(rng: &mut Rng) -> (Named, [Named; 2], Task) {
    let base = mlp(rng);
    let models = [mlp(rng), mlp(rng)];
    let target: Named = base
        .iter()
        .enumerate()
        .map(|(i, (name, b))| {
            let c = if i % 2 == 0 { [0.9, -0.3] } else { [0.1, 0.8] };
            let step = |m: &Named, c: f32| m[name].sub(b).scale(c);
            (name.clone(), b.add(&step(&models[0], c[0])).add(&step(&models[1], c[1])).contiguous())
        })
        .collect();
    let x = normal(&[300, 6], rng).scale(2.0).contiguous();
    let logits = download(&Network::mlp(&target).unwrap().logits(gpu(), &target, &x).unwrap());
    let best = |row: &[f64]| (0..3).fold(0, |b, i| if row[i] > row[b] { i } else { b }) as u32;
    (base, models, Task::labelled("target", x, logits.chunks(3).map(best).collect()))
}

pub(crate) fn score(
    architecture: &Architecture,
    weights: &dyn Weights,
    task: &Task,
) -> tiebeam::merge::evaluate::Score {
    architecture.score(gpu(), weights, task, &mut nothing).unwrap()
}

#[test]
fn coefficients_are_learned_with_and_without_labels() {
    let mut rng = Rng::new(3);
    let (base, models, task) = moved(&mut rng);
    let network = Architecture::Network(Network::mlp(&base).unwrap());
    let both: [&dyn Weights; 2] = [&models[0], &models[1]];
    let run = |tasks: &[Task], options: &LearnOptions| {
        learn(gpu(), &network, &base, &both, tasks, options, &mut |_, _, _| Ok(()))
    };
    let usual = LearnOptions::default().steps(120).batch(100);
    let learned = run(std::slice::from_ref(&task), &usual).unwrap();
    let [before, after] = [&base, &learned.weights].map(|w| score(&network, w, &task));
    // One number for all tensors cannot do it.
    let fixed = (0..36).map(|i| {
        let coefficients = vec![f64::from(i % 6) / 5.0, f64::from(i / 6) / 5.0];
        score(&network, &Combined { base: &base, models: &both, coefficients }, &task).accuracy.unwrap()
    });
    let fixed = fixed.fold(0.0, f64::max);
    let (before, after) = (before.accuracy.unwrap(), after.accuracy.unwrap());
    assert!(after > fixed && after > before + 0.1 && learned.best > 0, "{before} {fixed} {after}");
    assert!(learned.losses.last().unwrap() < &learned.losses[0]);
    assert_eq!(learned.coefficients.shape()[..], [2, 6, 1]);
    // The same seed learns the same bits.
    let again = run(std::slice::from_ref(&task), &usual).unwrap();
    assert_eq!(download(&again.coefficients), download(&learned.coefficients));
    // A budget of one task vector for each tensor leaves the other at 0.
    let budget = run(std::slice::from_ref(&task), &usual.budget(Some(1))).unwrap();
    for (name, x) in &budget.weights {
        let part = |model: &Named| {
            let [x, b, m] = [x, &base[name], &model[name]].map(download);
            let (d, t): (Vec<f64>, Vec<f64>) =
                x.iter().zip(&b).zip(&m).map(|((x, b), m)| (x - b, m - b)).unzip();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let along = dot(&d, &t) / dot(&t, &t);
            dot(&d, &d) - along * along * dot(&t, &t)
        };
        assert!(
            part(&models[0]).abs() < 1e-4 || part(&models[1]).abs() < 1e-4,
            "{name} uses one task vector"
        );
    }
    // Without labels, the labels make no difference.
    let TaskData::Labelled(data) = &task.data else { panic!("rows") };
    let other =
        Task::labelled("target", data.inputs.clone(), data.labels.iter().map(|l| (l + 1) % 3).collect());
    for objective in [Objective::Entropy, Objective::Information] {
        let options = usual.objective(objective).rate(0.01).steps(30);
        let [a, b] = [&task, &other].map(|task| run(std::slice::from_ref(task), &options).unwrap());
        assert_eq!(download(&a.coefficients), download(&b.coefficients), "{objective:?}");
        assert!(download(&a.coefficients).iter().any(|c| *c != 0.0), "{objective:?} learns");
        // Entropies fall.
        assert!(a.losses[20..].iter().sum::<f64>() / 10.0 < a.losses[0], "{objective:?}");
    }
    // A few rows of each class.
    let few = run(std::slice::from_ref(&task), &usual.shots(Some(5))).unwrap();
    assert!(score(&network, &few.weights, &task).accuracy.unwrap() > before);
    for (tasks, options, words) in [
        (vec![], usual, "there is no task"),
        (vec![task.clone()], usual.objective(Objective::Negate), "needs a second task, the control"),
        (vec![task.clone()], usual.shots(Some(1000)), "and `shots` asks for 1000"),
        (
            vec![Task::labelled("wide", normal(&[2, 7], &mut rng), vec![0, 0])],
            usual,
            "task `wide`: `fc0` reads 6 inputs",
        ),
        (vec![Task::labelled("far", normal(&[2, 6], &mut rng), vec![0, 3])], usual, "label 3 of row 1"),
        (
            vec![Task::labelled(
                "nan",
                normal(&[2, 6], &mut rng).affine(0.0, f32::NAN).contiguous(),
                vec![0, 1],
            )],
            usual,
            "task `nan`: the loss is NaN",
        ),
    ] {
        let message = run(&tasks, &options).expect_err(words).to_string();
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn negation_keeps_the_control() {
    let mut rng = Rng::new(4);
    // The base is right about both halves of the inputs. The task vector is a change of the first layer's first column.
    let base = mlp(&mut rng);
    let network = Architecture::Network(Network::mlp(&base).unwrap());
    let halves = [true, false].map(|first| {
        let x = normal(&[200, 6], &mut rng);
        let mask: Vec<f32> = (0..6).map(|i| f32::from(u8::from((i < 3) == first))).collect();
        let x = x.mul(&Tensor::from_slice(gpu(), &mask, [6])).scale(3.0).contiguous();
        let logits = download(&Network::mlp(&base).unwrap().logits(gpu(), &base, &x).unwrap());
        let best = |row: &[f64]| (0..3).fold(0, |b, i| if row[i] > row[b] { i } else { b }) as u32;
        Task::labelled(if first { "target" } else { "control" }, x, logits.chunks(3).map(best).collect())
    });
    let mut model = base.clone();
    let columns: Vec<f32> = (0..6).map(|i| if i < 3 { 1.0 } else { 0.05 }).collect();
    let change = normal(&[8, 6], &mut rng).mul(&Tensor::from_slice(gpu(), &columns, [6]));
    model.insert("fc0.weight".into(), base["fc0.weight"].add(&change).contiguous());
    let options = LearnOptions::default().objective(Objective::Negate).steps(60).rate(0.05);
    let learned = learn(gpu(), &network, &base, &[&model], &halves, &options, &mut |_, _, _| Ok(())).unwrap();
    let [target, control] = [0, 1].map(|i| score(&network, &learned.weights, &halves[i]).accuracy.unwrap());
    assert!(target < 0.7 && control >= 0.95, "{target} {control}");
}

#[test]
fn fronts_are_found_scored_and_chosen_from() {
    let mut rng = Rng::new(5);
    let (base, models, task) = moved(&mut rng);
    let network = Architecture::Network(Network::mlp(&base).unwrap());
    let both: [&dyn Weights; 2] = [&models[0], &models[1]];
    // A second task that wants the base.
    let TaskData::Labelled(data) = &task.data else { panic!("rows") };
    let logits = download(&Network::mlp(&base).unwrap().logits(gpu(), &base, &data.inputs).unwrap());
    let best = |row: &[f64]| (0..3).fold(0, |b, i| if row[i] > row[b] { i } else { b }) as u32;
    let own = Task::labelled("base", data.inputs.clone(), logits.chunks(3).map(best).collect());
    let tasks = [task, own];
    let search = Search::default().bounds([0.0, 1.0]).population(40).generations(30);
    let options = MapOptions::default().samples(24).search(search).checks(6);
    let found = map(gpu(), &network, &base, &both, &tasks, &options, &mut nothing).unwrap();
    assert!(found.r_squared.iter().all(|r| *r > 0.5), "{:?}", found.r_squared);
    assert_eq!((found.samples.len(), found.checked.len()), (24, 6));
    // On a front, what is better for one task is worse for the other.
    let merits = |i: usize| &found.front[i].objectives;
    for i in 1..found.front.len() {
        assert!(merits(i)[0] >= merits(i - 1)[0] && merits(i)[1] <= merits(i - 1)[1]);
    }
    // Who prefers a task gets one that is at least as good at it as any other.
    let reach = |preference: [f64; 2], t: usize| found.best(&preference).unwrap().scores[t].merit();
    let all = || found.samples.iter().chain(&found.checked);
    for t in 0..2 {
        let most = all().map(|scored| scored.scores[t].merit()).fold(f64::NEG_INFINITY, f64::max);
        let preference = [f64::from(u8::from(t == 0)), f64::from(u8::from(t == 1))];
        assert_eq!(reach(preference, t), most);
    }
    assert!(found.best(&[1.0]).is_err());
    for (options, tasks, words) in [
        (options.samples(5), &tasks[..], "need 6 samples or more, not 5"),
        (options, &tasks[..1], "two tasks or more"),
    ] {
        let message =
            map(gpu(), &network, &base, &both, tasks, &options, &mut nothing).expect_err(words).to_string();
        assert!(message.contains(words), "{message}");
    }
}

/// Writes models and tasks, and merges them by configurations.
#[test]
fn configurations_learn_search_repair_and_match() {
    let mut rng = Rng::new(8);
    let (base, models, task) = moved(&mut rng);
    let folder = Folder::new("merge-data");
    for (name, model) in [("base", &base), ("a", &models[0]), ("b", &models[1])] {
        save_tensors(folder.0.join(format!("{name}.safetensors")), model, &BTreeMap::new()).unwrap();
    }
    let TaskData::Labelled(data) = &task.data else { panic!("rows") };
    let x = data.inputs.to_vec::<f32>().unwrap();
    let entries = [Entry::f32("x", &[300, 6], &x), Entry::u32("y", &[300], &data.labels)];
    save(folder.0.join("rows.safetensors"), entries, &BTreeMap::new()).unwrap();
    let network = Architecture::Network(Network::mlp(&base).unwrap());
    let models = "models: [{model: a.safetensors}, {model: b.safetensors}]\nbase_model: base.safetensors\n";
    let learn = "learn: {data: rows.safetensors}\n";
    let job = |text: &str| {
        let config = tiebeam::merge::MergeConfig::from_yaml(text, &folder.0)?;
        tiebeam::merge::Job::open(config)
    };
    let merged = |text: &str| -> tiebeam::Result<Named> {
        let job = job(text)?;
        let tasks = job.learning_tasks(gpu())?;
        let quiet = &mut |_: usize, _: usize, _: &str| Ok(());
        Ok(match &job.config.search {
            Some(search) => {
                let (found, weighted) = job.searched(gpu(), &network, &tasks, search, quiet)?;
                assert_eq!(found.point.len(), 2);
                let once = |(a, b): (&job::Model, &job::Model)| Arc::ptr_eq(&a.checkpoint, &b.checkpoint);
                assert!(weighted.models.iter().zip(&job.models).all(once), "models are opened once");
                weighted.merged(gpu(), &job.sources())?
            }
            None => job.learn(gpu(), &job.sources(), &network, &tasks, quiet)?.weights,
        })
    };
    let accuracy = |weights: &Named| score(&network, weights, &task).accuracy.unwrap();
    let fixed = format!(
        "merge_method: task_arithmetic\n{}",
        models.replace("safetensors}", "safetensors, parameters: {weight: 0.5}}")
    );
    let fixed = job(&fixed).unwrap();
    let start = accuracy(&fixed.merged(gpu(), &fixed.sources()).unwrap());
    let search = "search: {low: -0.5, high: 1.5, start: 0.5, evaluations: 60}\n";
    for method in ["task_arithmetic", "pcb"] {
        let text = format!("merge_method: {method}\n{models}{learn}{search}");
        let [first, second] = [0, 1].map(|_| merged(&text).unwrap());
        assert!(method == "pcb" || accuracy(&first) > start, "{method}: {} {start}", accuracy(&first));
        for (name, x) in &first {
            assert_eq!(download(x), download(&second[name]), "the same seed");
        }
    }
    let text = format!("merge_method: atlas\n{models}{learn}parameters: {{steps: 60, batch: 100}}");
    assert!(accuracy(&merged(&text).unwrap()) > accuracy(&base));
    let text = format!(
        "merge_method: map\n{models}learn: {{tasks: [{{data: rows.safetensors}}, {{name: other, data: rows.safetensors}}]}}\nparameters: {{samples: 20, preference: [1, 0]}}"
    );
    assert!(accuracy(&merged(&text).unwrap()) >= accuracy(&base));
    // What is written can be read, and has the description of its steps.
    let text = "merge_method: pleas\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\nlearn: {data: rows.safetensors}\nparameters: {ratio: 0.5, heads: separate}";
    let own = job(text).unwrap();
    let tasks = own.learning_tasks(gpu()).unwrap();
    let learned = own.learn(gpu(), &own.sources(), &network, &tasks, &mut |_, _, _| Ok(())).unwrap();
    let out = folder.0.join("out");
    let record = serde_json::json!({"learned": true});
    let written = Written { weights: &learned.weights, network: learned.network.as_ref(), record: &record };
    own.write(&written, &out, 5 << 30, text, &mut |_| Ok(())).unwrap();
    own.check_learned(&written, &out).unwrap();
    let shards = Shards::open(&out).unwrap();
    let Architecture::Network(found) = Architecture::open(gpu(), &shards, None).unwrap() else {
        panic!("a network")
    };
    assert_eq!(Some(&found), learned.network.as_ref());
    assert_eq!(found.output(&shards, &[1, 6]).unwrap(), [1, 6]);
    // Matching by activations, and repair.
    let text = "merge_method: average\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\nlearn: {data: rows.safetensors}\nalign: {spec: network, matcher: activations}\nrepair: true";
    let own = job(text).unwrap();
    let align = own.config.align.clone().unwrap();
    let aligned = own.align(gpu(), &align, &mut |_, _| Ok(())).unwrap();
    let boxed = aligned.sources(&own);
    let sources: Vec<&dyn Weights> = boxed.iter().map(|source| &**source).collect();
    let mean = own.merged(gpu(), &sources).unwrap();
    let repaired = own.repaired(gpu(), &sources, &network, &mean, &tasks).unwrap();
    assert_ne!(download(&repaired["fc0.weight"]), download(&mean["fc0.weight"]));
    for (text, words) in [
        (format!("merge_method: atlas\n{models}"), "learn: `atlas` needs tasks to learn from"),
        (format!("merge_method: ties\n{models}{search}"), "learn: `search` needs tasks"),
        (
            format!("merge_method: model_stock\n{models}{learn}{search}"),
            "`model_stock` has no weights to search for",
        ),
        (
            format!("merge_method: atlas\n{models}{learn}repair: true"),
            "takes no `search`, `repair` or slices",
        ),
        (format!("merge_method: atlas\n{models}{learn}parameters: {{steps: 0}}"), "`steps` must be above 0"),
        (
            format!("merge_method: atlas\n{models}{learn}parameters: {{objective: best}}"),
            "one of supervised, entropy",
        ),
        (
            format!("merge_method: atlas\n{models}{learn}parameters: {{steps: [1, 2]}}"),
            "one value for the whole model",
        ),
        (format!("merge_method: map\n{models}{learn}"), "two tasks or more"),
        (
            format!("merge_method: linear\n{models}{learn}search: {{low: 1, high: 0}}"),
            "100 evaluations from 1 to 0",
        ),
        (
            format!("merge_method: atlas\n{models}learn: {{}}"),
            "either `data`, a file of labelled rows, or `text`",
        ),
        (format!("merge_method: atlas\n{models}learn: {{tasks: []}}"), "must be a list that is not empty"),
        (format!("merge_method: atlas\n{models}learn: {{data: none.safetensors}}"), "none.safetensors"),
        (
            format!("merge_method: atlas\n{models}learn: {{data: rows.safetensors, text: a.txt}}"),
            "needs either `data`",
        ),
    ] {
        let message = merged(&text).expect_err(words).to_string();
        assert!(message.contains(words), "{words}: {message}");
    }
}
