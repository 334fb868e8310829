//! Trains networks that differ only in their seed, permutes one towards the other, and shows the losses between them.
//!
//!     cargo run --release --example rebasin
//!
//! Writes the networks and the data to OUT, where `tiebeam match`, `tiebeam barrier` and `tiebeam merge` can use them, and draws
//! the losses. `--models 3` also averages three networks. `--mnist DIR` reads MNIST's files.

#[path = "../common/digits.rs"]
mod digits;
#[path = "../common/mlp.rs"]
mod mlp;
#[path = "../common/terminal.rs"]
mod terminal;

use clap::Parser;
use digits::{Data, Set};
use mlp::{Recipe, train};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiebeam::merge::plot::{Curve, Panel, svg};
use tiebeam::merge::{
    ActivationMatching, Barrier, Evaluation, LossPath, MatchOptions, Matching, Mean, Permutation, Similarity,
    Spec, Weights, match_many, match_weights, singular_alignment,
};
use tiebeam::models::network::Network;
use tiebeam::store::{Entry, save, save_tensors};
use tiebeam::{Error, Gpu, Result, Tensor, files, no_grad};

/// Train networks of different seeds, match them and draw the losses between them.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Widths of the hidden layers
    #[arg(long, value_delimiter = ',', default_value = "64,128,512", value_parser = clap::value_parser!(u32).range(2..=8192))]
    widths: Vec<u32>,
    /// Hidden layers
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=16))]
    hidden: u32,
    /// Networks of each width
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=16))]
    models: u32,
    /// Passes over the training set
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: u32,
    /// Highest learning rate
    #[arg(long, default_value_t = 0.1)]
    lr: f32,
    /// The precision of training
    #[command(flatten)]
    scope: terminal::Scope,
    /// Images per step
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Points on each path, including both ends
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(3..=1001))]
    points: u32,
    /// Seed of the first network; the others follow
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Also compare directions of singular vectors (half a minute at width 512)
    #[arg(long)]
    singular: bool,
    /// Folder with MNIST's four files, unpacked, to use instead of the digits of the repository
    #[arg(long)]
    mnist: Option<PathBuf>,
    /// Most training images of MNIST
    #[arg(long, default_value_t = 8000, value_parser = clap::value_parser!(u32).range(100..))]
    limit: u32,
    /// Folder for networks, data and picture
    #[arg(long, default_value = "out/rebasin")]
    out: PathBuf,
}

/// Computes loss and accuracy of a network on a set.
fn evaluate(gpu: &Gpu, net: &Network, weights: &dyn Weights, set: &Set) -> Result<Evaluation> {
    Evaluation::of(&no_grad(|| net.logits(gpu, weights, &set.x))?, &set.labels)
}

/// Finds the permutation that makes hidden activations on the training set most similar.
fn by_activations(
    gpu: &Gpu,
    net: &Network,
    spec: &Spec,
    [a, b]: [&dyn Weights; 2],
    set: &Set,
) -> Result<Permutation> {
    let mut matching = ActivationMatching::new(spec, a, b, Similarity::InnerProduct)?;
    let [of_a, of_b] = [a, b].map(|weights| no_grad(|| net.activations(gpu, weights, &set.x)));
    for ((group, a), b) in spec.groups.iter().zip(of_a?).zip(of_b?) {
        matching.add(&group.name, &a, &b)?;
    }
    Ok(matching.solve()?.permutation)
}

/// A path from the first network to the second.
struct Way {
    name: &'static str,
    /// Losses on the training set.
    train: LossPath,
    /// The middle of the path on the test set.
    test: Evaluation,
}

struct Study<'a> {
    args: &'a Args,
    gpu: &'a Gpu,
    data: &'a Data,
    stop: &'a Arc<AtomicBool>,
}

impl Study<'_> {
    fn way(&self, name: &'static str, net: &Network, a: &dyn Weights, b: &dyn Weights) -> Result<Way> {
        let points = self.args.points as usize;
        let train = LossPath::between(a, b, points, |weights| match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::stopped("stopped")),
            false => evaluate(self.gpu, net, weights, &self.data.train),
        })?;
        let test = evaluate(self.gpu, net, &Mean(vec![a, b]), &self.data.test)?;
        Ok(Way { name, train, test })
    }

    /// Trains, matches and reports networks of one width. Returns their losses as a panel of the picture.
    fn width(&self, width: usize) -> Result<Panel> {
        let sizes: Vec<usize> = std::iter::once(self.data.train.x.shape()[1])
            .chain(std::iter::repeat_n(width, self.args.hidden as usize))
            .chain([self.data.classes()])
            .collect();
        let (epochs, batch) = (self.args.epochs as usize, self.args.batch as usize);
        let recipe = Recipe { epochs, batch, lr: self.args.lr, precision: self.args.scope.precision };
        let mut models = Vec::new();
        for i in 0..self.args.models {
            let model = train(
                self.gpu,
                &self.data.train,
                (&sizes, None),
                &recipe,
                self.args.seed + u64::from(i),
                self.stop,
            )?;
            let path = self.args.out.join(format!("h{width}-{}.safetensors", char::from(b'a' + i as u8)));
            save_tensors(&path, &model, &BTreeMap::new())?;
            models.push(model);
        }
        let (a, b) = (&models[0], &models[1]);
        let net = Network::mlp(a)?;
        let spec = Spec::mlp(a, &net.layers())?;
        let matching = match_weights(self.gpu, &spec, a, b, &MatchOptions::default())?;
        let activations = by_activations(self.gpu, &net, &spec, [a, b], &self.data.train)?;
        let [matched, alike] = [&matching.permutation, &activations].map(|p| p.permuted(b));
        let ways = [
            self.way("naive", &net, a, b)?,
            self.way("weight matching", &net, a, &matched)?,
            self.way("activation matching", &net, a, &alike)?,
        ];
        self.report(width, &net, &models, &matching, &ways)?;
        if models.len() > 2 {
            self.many(&net, &spec, &models)?;
        }
        if self.args.singular {
            let tensors: Vec<String> = net.layers().iter().map(|layer| format!("{layer}.weight")).collect();
            let names: Vec<&str> = tensors.iter().map(String::as_str).collect();
            for gamma in [0.0, 0.3] {
                let r = |end: &dyn Weights| singular_alignment(self.gpu, [a, end], &names, gamma);
                println!(
                    "  singular vectors, gamma {gamma}: R {:.3} naive, {:.3} matched",
                    r(b)?,
                    r(&matched)?
                );
            }
        }
        Ok(panel(width, &ways))
    }

    fn report(
        &self,
        width: usize,
        net: &Network,
        models: &[BTreeMap<String, Tensor>],
        matching: &Matching,
        ways: &[Way],
    ) -> Result<()> {
        let ends = models[..2]
            .iter()
            .map(|model| evaluate(self.gpu, net, model, &self.data.test))
            .collect::<Result<Vec<_>>>()?;
        println!(
            "width {width}: test accuracy {:.4} and {:.4}; L2 distance {:.2} -> {:.2} ({:.0}% less), {} sweeps, gap {:.1e}",
            ends[0].accuracy,
            ends[1].accuracy,
            matching.distance_before,
            matching.distance,
            100.0 * matching.distance_ratio(),
            matching.sweeps,
            matching.gap
        );
        println!(
            "  {:<28} {:>10} {:>10} {:>12}",
            "train barrier, above the", "ends' mean", "line", "mid test acc"
        );
        for way in ways {
            let rows = [(way.name.to_string(), way.train.losses()), tempered(way)];
            for (name, losses) in rows.iter().filter(|(name, _)| !name.is_empty()) {
                let Barrier { above_mean, above_line, .. } = Barrier::of(losses);
                println!("  {name:<28} {above_mean:>10.4} {above_line:>10.4} {:>12.4}", way.test.accuracy);
            }
        }
        Ok(())
    }

    /// Averages all networks in three ways: unmatched, each matched to the first, and all matched together.
    fn many(&self, net: &Network, spec: &Spec, models: &[BTreeMap<String, Tensor>]) -> Result<()> {
        let all: Vec<&dyn Weights> = models.iter().map(|model| model as &dyn Weights).collect();
        let options = MatchOptions::default();
        let together = match_many(self.gpu, spec, &all, &options)?;
        let first = all[1..]
            .iter()
            .map(|&model| Ok(match_weights(self.gpu, spec, all[0], model, &options)?.permutation))
            .collect::<Result<Vec<_>>>()?;
        let start = Permutation::identity(spec, all[0])?;
        let to_first: Vec<Permutation> = std::iter::once(start.clone()).chain(first).collect();
        let as_they_are = vec![start; all.len()];
        println!("  mean of {} networks:", all.len());
        let ways =
            [("naive", &as_they_are), ("each to the first", &to_first), ("together", &together.permutations)];
        for (name, permutations) in ways {
            let placed: Vec<_> = permutations.iter().zip(&all).map(|(p, &model)| p.permuted(model)).collect();
            let mean = Mean(placed.iter().map(|model| model as &dyn Weights).collect());
            let [train, test] =
                [&self.data.train, &self.data.test].map(|set| evaluate(self.gpu, net, &mean, set));
            println!("  {name:<28} train loss {:.4}, test accuracy {:.4}", train?.loss, test?.accuracy);
        }
        Ok(())
    }
}

/// Returns the naive path's losses at the best temperature of each point. Large width and the right temperature already connect
/// networks to some degree without matching.
fn tempered(way: &Way) -> (String, Vec<f64>) {
    match way.name {
        "naive" => ("naive, best temperature".into(), way.train.tempered_losses()),
        _ => (String::new(), Vec::new()),
    }
}

fn panel(width: usize, ways: &[Way]) -> Panel {
    let mut curves = Vec::new();
    for way in ways {
        for (name, losses) in [(way.name.to_string(), way.train.losses()), tempered(way)] {
            let points = way.train.lambdas.iter().copied().zip(losses).collect();
            if !name.is_empty() {
                curves.push(Curve { label: name, points });
            }
        }
    }
    Panel { title: format!("width {width}"), y: "training loss".into(), curves }
}

/// Writes a set as `x` and `y`, which `tiebeam barrier --data` reads.
fn save_set(path: &Path, set: &Set) -> Result<()> {
    let x = set.x.to_vec::<f32>()?;
    let entries = [Entry::f32("x", set.x.shape(), &x), Entry::u32("y", &[set.labels.len()], &set.labels)];
    save(path, entries, &BTreeMap::new())
}

fn body(args: &Args) -> Result<()> {
    let gpu = Gpu::open()?;
    println!("adapter {}", gpu.adapter());
    let data = match &args.mnist {
        Some(folder) => Data::mnist(&gpu, folder, args.limit as usize)?,
        None => Data::digits(&gpu)?,
    };
    if data.train.labels.len() < args.batch as usize {
        let message =
            format!("--batch {} is more than the {} training images", args.batch, data.train.labels.len());
        return Err(Error::config(message));
    }
    std::fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, e))?;
    for (name, set) in [("train", &data.train), ("test", &data.test)] {
        save_set(&args.out.join(format!("{name}.safetensors")), set)?;
    }
    println!("{} images to train on, {} to test", data.train.labels.len(), data.test.labels.len());
    let stop = terminal::interruptible()?;
    let study = Study { args, gpu: &gpu, data: &data, stop: &stop };
    let mut panels = Vec::new();
    for &width in &args.widths {
        panels.push(study.width(width as usize)?);
    }
    let picture = args.out.join("curves.svg");
    let text = svg(&panels, "from the first network to the second")
        .map_err(|message| Error::io(&picture, std::io::Error::other(message)))?;
    files::replace_with(&picture, text)?;
    println!("wrote {}", picture.display());
    Ok(())
}

fn main() -> ExitCode {
    terminal::main(|| body(&Args::parse()))
}
