//! What merges that look at data keep as it is, what they may look at, and what they refuse.

use crate::merge_data::{Named, mlp, moved, normal, nothing, score, task};
use crate::merges::Folder;
use crate::support::{download, gpu, within};
use std::collections::BTreeMap;
use tiebeam::merge::evaluate::{Task, TaskData, Tokens};
use tiebeam::merge::fisher::{FisherOptions, Labels, fisher_of};
use tiebeam::merge::learn::{LearnOptions, Objective, learn};
use tiebeam::merge::written::Written;
use tiebeam::merge::{Architecture, Job, MergeConfig, Shards, Weights};
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::network::Network;
use tiebeam::store::{Entry, File, FileDType, save, save_tensors};
use tiebeam::{Rng, Tensor};

const STEPS: &str =
    r#"{"steps": [{"linear": "f0"}, {"batch_norm": {"name": "n"}}, "relu", {"linear": "f1"}]}"#;

/// Writes a network with a batch norm, as PyTorch does with the number of its batches.
fn with_integers(folder: &Folder, name: &str, batches: i64, rng: &mut Rng) {
    let shapes: [(&str, &[usize]); 8] = [
        ("f0.weight", &[5, 6]),
        ("f0.bias", &[5]),
        ("n.weight", &[5]),
        ("n.bias", &[5]),
        ("n.running_mean", &[5]),
        ("n.running_var", &[5]),
        ("f1.weight", &[3, 5]),
        ("f1.bias", &[3]),
    ];
    let values = shapes.map(|(name, shape)| {
        let x = normal(shape, rng);
        let x = if name.ends_with("var") { x.square().affine(1.0, 0.5) } else { x };
        (name, shape, x.to_vec::<f32>().unwrap())
    });
    let mut entries: Vec<Entry> = values.iter().map(|(name, shape, x)| Entry::f32(*name, shape, x)).collect();
    let integers = batches.to_le_bytes().to_vec();
    entries.push(Entry::bytes("n.num_batches_tracked", FileDType::I64, &[], integers));
    save(folder.0.join(format!("{name}.safetensors")), entries, &BTreeMap::new()).unwrap();
}

fn open(folder: &Folder, text: &str) -> tiebeam::Result<Job> {
    Job::open(MergeConfig::from_yaml(text, &folder.0)?)
}

#[test]
fn integers_are_copied_whatever_is_learned() {
    let mut rng = Rng::new(21);
    let folder = Folder::new("integers");
    for (name, batches) in [("base", 7), ("a", 7), ("b", 7)] {
        with_integers(&folder, name, batches, &mut rng);
    }
    folder.write("net.json", STEPS);
    let x = normal(&[40, 6], &mut rng).to_vec::<f32>().unwrap();
    let y: Vec<u32> = (0..40).map(|i| i % 3).collect();
    let entries = [Entry::f32("x", &[40, 6], &x), Entry::u32("y", &[40], &y)];
    save(folder.0.join("rows.safetensors"), entries, &BTreeMap::new()).unwrap();
    let models = "models: [{model: a.safetensors}, {model: b.safetensors}]\nnetwork: net.json\n";
    let learned = format!("{models}learn: {{data: rows.safetensors}}\n");
    let based = format!("{learned}base_model: base.safetensors\n");
    for text in [
        format!("merge_method: atlas\n{based}parameters: {{steps: 4, batch: 20}}\n"),
        format!("merge_method: task_arithmetic\n{based}search: {{evaluations: 10}}\n"),
        format!("merge_method: average\n{learned}repair: true\n"),
        format!("merge_method: pleas\n{learned}parameters: {{ratio: 0.5}}\n"),
        format!(
            "merge_method: map\n{models}base_model: base.safetensors\nlearn: {{tasks: [{{data: rows.safetensors}}, {{name: other, data: \
             rows.safetensors}}]}}\nparameters: {{samples: 20, preference: [1, 1]}}\n"
        ),
    ] {
        let job = open(&folder, &text).unwrap();
        let tasks = job.learning_tasks(gpu()).unwrap();
        let network = Network::read(folder.0.join("net.json")).unwrap();
        let architecture = Architecture::Network(network);
        let quiet = &mut |_: usize, _: usize, _: &str| Ok(());
        let sources = job.sources();
        let weights = if let Some(search) = &job.config.search {
            job.searched(gpu(), &architecture, &tasks, search, quiet)
                .unwrap()
                .1
                .merged(gpu(), &sources)
                .unwrap()
        } else if job.config.repair {
            let merged = job.merged(gpu(), &sources).unwrap();
            job.repaired(gpu(), &sources, &architecture, &merged, &tasks).unwrap()
        } else {
            job.learn(gpu(), &sources, &architecture, &tasks, quiet).unwrap().weights
        };
        let (out, record) = (folder.0.join("out"), serde_json::json!({}));
        let written = Written { weights: &weights, network: None, record: &record };
        job.write(&written, &out, 5 << 30, &text, &mut |_| Ok(())).unwrap();
        job.check_learned(&written, &out).unwrap();
        let file = File::open(out.join("model.safetensors")).unwrap();
        assert_eq!(file.names().count(), 9, "{text}");
        assert_eq!(file.bytes("n.num_batches_tracked").unwrap(), 7i64.to_le_bytes(), "{text}");
    }
}

/// At an end of the line between two networks there is nothing to repair.
#[test]
fn repair_takes_the_place_of_the_merge() {
    let mut rng = Rng::new(22);
    let folder = Folder::new("repair-place");
    let models = [mlp(&mut rng), mlp(&mut rng)];
    for (name, model) in ["a", "b"].iter().zip(&models) {
        save_tensors(folder.0.join(format!("{name}.safetensors")), model, &BTreeMap::new()).unwrap();
    }
    let tasks = [task(60, 6, &mut rng)];
    let architecture = Architecture::Network(Network::mlp(&models[0]).unwrap());
    let merge = |method: &str, weights: [f64; 2]| {
        let [a, b] = weights;
        let text = format!(
            "merge_method: {method}\nmodels: [{{model: a.safetensors, parameters: {{weight: {a}}}}}, \
             {{model: b.safetensors, parameters: {{weight: {b}}}}}]\nlearn: {{data: none}}\nrepair: true\n"
        );
        let job = open(&folder, &text.replace("learn: {data: none}\nrepair: true\n", "")).unwrap();
        let sources = job.sources();
        let merged = job.merged(gpu(), &sources).unwrap();
        job.repaired(gpu(), &sources, &architecture, &merged, &tasks)
    };
    for (i, weights) in [[1.0, 0.0], [0.0, 1.0]].into_iter().enumerate() {
        for (name, x) in merge("linear", weights).unwrap() {
            within(&name, &download(&x), &download(&models[i][&name]), |_| 1e-4);
        }
    }
}

/// What is learned from one row of each class depends on no other row.
#[test]
fn shots_look_at_their_rows_only() {
    let mut rng = Rng::new(23);
    let (base, models, target) = moved(&mut rng);
    let network = Architecture::Network(Network::mlp(&base).unwrap());
    let TaskData::Labelled(data) = &target.data else { panic!("rows") };
    let x = data.inputs.to_vec::<f32>().unwrap();
    let options = LearnOptions::default().steps(20).batch(3).rate(0.1).shots(Some(1));
    let run = |x: &[f32]| {
        let task = Task::labelled("target", Tensor::from_slice(gpu(), x, [300, 6]), data.labels.clone());
        let both: [&dyn Weights; 2] = [&models[0], &models[1]];
        let learned = learn(gpu(), &network, &base, &both, &[task], &options, &mut |_, _, _| Ok(())).unwrap();
        (download(&learned.coefficients), learned.best)
    };
    let own = run(&x);
    let depends = (0..10).filter(|part| {
        let mut other = x.clone();
        other[180 * part..180 * (part + 1)].iter_mut().for_each(|x| *x = -2.0 * *x + 1.0);
        run(&other) != own
    });
    // Three rows are in three parts at the most, and in one at least.
    let count = depends.count();
    assert!((1..=3).contains(&count), "{count}");
}

/// The merit of a text is negative: a share of it is a larger loss, not a smaller one.
#[test]
fn negation_of_texts_chooses_a_step() {
    let mut rng = Rng::new(24);
    let config = LmConfig::small().vocab(13).width(8).heads(2).kv_heads(1).hidden(12).depth(1).context(6);
    let folder = Folder::new("negate-text");
    let shards = ["base", "model"].map(|name| {
        let path = folder.0.join(format!("{name}.safetensors"));
        Lm::new(gpu(), config.clone(), &mut rng).save(&path).unwrap();
        Shards::open(&path).unwrap()
    });
    let architecture = Architecture::open(gpu(), &shards[0], None).unwrap();
    let text = |name: &str, rng: &mut Rng| {
        let tokens = (0..49).map(|_| rng.below(13) as u32).collect();
        Task { name: name.into(), data: TaskData::Tokens(Tokens { tokens, limit: 100, context: 6 }) }
    };
    let tasks = [text("target", &mut rng), text("control", &mut rng)];
    let options = LearnOptions::default().objective(Objective::Negate).steps(20).rate(0.1).control(0.8);
    let found =
        learn(gpu(), &architecture, &shards[0], &[&shards[1]], &tasks, &options, &mut |_, _, _| Ok(()))
            .unwrap();
    assert!(found.best > 0);
    let loss = |weights: &dyn Weights, i: usize| score(&architecture, weights, &tasks[i]).loss;
    assert!(loss(&found.weights, 0) > loss(&shards[0], 0));
    assert!(loss(&found.weights, 1) <= loss(&shards[0], 1) / 0.8);
}

/// Fewer tokens than a window are one shorter window, not a whole one.
#[test]
fn no_more_tokens_are_seen_than_are_asked_for() {
    let mut rng = Rng::new(27);
    let config = LmConfig::small().vocab(13).width(8).heads(2).kv_heads(1).hidden(12).depth(1).context(12);
    let folder = Folder::new("few-tokens");
    let path = folder.0.join("lm.safetensors");
    Lm::new(gpu(), config, &mut rng).save(&path).unwrap();
    let shards = Shards::open(&path).unwrap();
    let architecture = Architecture::open(gpu(), &shards, None).unwrap();
    let all: Vec<u32> = (0..30).map(|_| rng.below(13) as u32).collect();
    let of = |tokens: &[u32], limit: usize| {
        let data = TaskData::Tokens(Tokens { tokens: tokens.to_vec(), limit, context: 12 });
        let task = Task { name: "text".into(), data };
        assert_eq!(architecture.samples(&task), 1);
        let options = FisherOptions::default().labels(Some(Labels::Given));
        fisher_of(gpu(), &architecture, &shards, &task, &options, &mut nothing).unwrap()
    };
    let (limited, short) = (of(&all, 5), of(&all[..6], 100));
    for (name, x) in &short {
        assert_eq!(download(&limited[name]), download(x), "{name}");
    }
}

#[test]
fn diagonals_of_what_is_no_number_or_used_twice_are_refused() {
    let mut rng = Rng::new(25);
    let weights = mlp(&mut rng);
    let rows = task(4, 6, &mut rng);
    let of = |network: Network, weights: &Named| {
        let architecture = Architecture::Network(network);
        fisher_of(gpu(), &architecture, weights, &rows, &FisherOptions::default(), &mut nothing)
            .unwrap_err()
            .to_string()
    };
    let mut damaged = weights.clone();
    let nan = weights["fc1.bias"].affine(0.0, f32::NAN).contiguous();
    damaged.insert("fc1.bias".into(), nan);
    let message = of(Network::mlp(&weights).unwrap(), &damaged);
    assert!(message.contains("is NaN or infinite"), "{message}");
    let twice = r#"{"steps": [{"linear": "fc0"}, "relu", {"linear": "fc1"}, "relu", {"linear": "fc1"}, {"linear": "fc2"}]}"#;
    let message = of(Network::from_json(twice).unwrap(), &weights);
    assert!(message.contains("`fc1` is used twice"), "{message}");
}

/// Images whose features at once are more than one binding holds are computed in parts.
#[test]
fn rows_follow_from_the_adapter() {
    let mut rng = Rng::new(26);
    let text = r#"{"input": [1, 128, 128], "steps": [{"conv": {"name": "c", "padding": 1}}, "relu", "global_pool", {"linear": "f"}]}"#;
    let network = Network::from_json(text).unwrap();
    let mut weights = Named::new();
    for (name, shape) in
        [("c.weight", &[8, 1, 3, 3][..]), ("c.bias", &[8]), ("f.weight", &[3, 8]), ("f.bias", &[3])]
    {
        weights.insert(name.into(), normal(shape, &mut rng));
    }
    let rows = 300; // 8 features of 64 KiB a row: 157 MB, more than a binding of 128 MiB
    let x = normal(&[rows, 128 * 128], &mut rng);
    let whole = download(&network.logits(gpu(), &weights, &x).unwrap());
    let part = x.slice(0, 297..300).contiguous();
    let part = download(&network.logits(gpu(), &weights, &part).unwrap());
    within("the last rows", &part, &whole[297 * 3..], |i| 1e-5 * (1.0 + whole[297 * 3 + i].abs()));
}
