//! `tiebeam barrier`.

use crate::context::{Context, is_standard, on_interrupt, unless_stopped};
use crate::data::Tasks;
use clap::Parser;
use serde_json::json;
use std::path::{Path, PathBuf};
use tiebeam::merge::evaluate::{Score, Task, TaskData};
use tiebeam::merge::plot::{Curve, Panel, svg};
use tiebeam::merge::{
    Architecture, Barrier, Interpolated, MatchOptions, Permutation, Spec, Weights, distance, match_weights,
    singular_alignment,
};
use tiebeam::{Error, Gpu, Result};

const EXAMPLES: &str = "\
Examples:
  tiebeam barrier a.safetensors b.safetensors --data test.safetensors --out curve.html
  tiebeam barrier a.safetensors b.safetensors --data train.safetensors --data test.safetensors --json
  tiebeam barrier resnet-a.safetensors resnet-b.safetensors --spec resnet --data test.safetensors
  tiebeam barrier models/base models/tuned --spec none --text book.txt --points 5";

/// Evaluate models between two, unmatched and matched
#[derive(Parser)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// One end: a safetensors file or folder of a network, or the folder of a language model
    a: PathBuf,
    /// The other end
    b: PathBuf,
    #[command(flatten)]
    tasks: Tasks,
    /// What may be permuted: network, mlp, resnet, llama, llama:HEADS:KV_HEADS, a spec file, or none for the models as they are
    /// [default: what the model is]
    #[arg(long)]
    spec: Option<String>,
    /// Permutation of B, written by `tiebeam match --out` [default: found by weight matching]
    #[arg(long)]
    permutation: Option<PathBuf>,
    /// Points on each path, including both ends
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u32).range(3..=1001))]
    points: u32,
    /// Compare singular vectors too (half a minute for layers 512 wide)
    #[arg(long)]
    singular: bool,
    /// Draw the paths to this file: .svg, or .html with the numbers; `-` writes SVG to stdout
    #[arg(long)]
    out: Option<PathBuf>,
}

/// Losses of one kind along one path.
struct Row {
    name: &'static str,
    losses: Vec<f64>,
    middle: Score,
}

/// All rows for one task.
struct Table {
    name: String,
    ends: [Score; 2],
    lambdas: Vec<f64>,
    rows: Vec<Row>,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    context.expect_data(args.out.as_deref())?;
    if let Some(out) = &args.out
        && !is_standard(out)
        && !["svg", "html"].iter().any(|kind| out.extension().is_some_and(|e| e == *kind))
    {
        let message = format!("--out {}: the name must end in .svg or .html", out.display());
        return Err(Error::config(message));
    }
    let network = args.tasks.network()?;
    args.tasks.files()?;
    let gpu = context.open()?;
    let [a, b] = [context.shards(&args.a)?, context.shards(&args.b)?];
    let architecture = Architecture::open(&gpu, &a, network.as_ref())?;
    let tasks = args.tasks.open(&gpu, &tiebeam::store::located(&args.a))?;
    for task in &tasks {
        [&a, &b].into_iter().try_for_each(|end| architecture.check(end, task))?;
    }
    let spec = |name: Option<&str>| match (name, &architecture) {
        (None | Some("network"), Architecture::Network(network)) => Spec::network(&a, network),
        (None, _) => Spec::named("llama", &a),
        (Some(name), _) => Spec::named(name, &a),
    };
    let permutation = match (&args.permutation, args.spec.as_deref()) {
        (Some(path), _) => Some(Permutation::load(path)?),
        (None, Some("none")) => None,
        (None, name) => {
            Some(match_weights(&gpu, &spec(name)?, &a, &b, &MatchOptions::default())?.permutation)
        }
    };
    permutation.iter().try_for_each(|permutation| permutation.check(&b))?;
    let permuted = permutation.as_ref().map(|permutation| permutation.permuted(&b));
    let matched = permuted.as_ref().map(|permuted| permuted as &dyn Weights);
    let before = distance(&gpu, &a, &b)?;
    let after = matched.map(|end| distance(&gpu, &a, end)).transpose()?;
    match after {
        Some(after) => context.result(format_args!(
            "L2 distance {before:.4} -> {after:.4} ({:.1}% less)",
            100.0 * (1.0 - after / before)
        )),
        None => context.result(format_args!("L2 distance {before:.4}")),
    }
    context.record(&json!({"line": "distance", "before": before, "after": after}))?;
    if args.singular {
        singular(&gpu, context, &a, &[&b as &dyn Weights].into_iter().chain(matched).collect::<Vec<_>>())?;
    }
    let ends: Vec<&dyn Weights> = [&a as &dyn Weights, &b].into_iter().chain(matched).collect();
    let tables = evaluate(&gpu, args, context, &architecture, &ends, &tasks)?;
    tables.iter().try_for_each(|table| show(table, context))?;
    match &args.out {
        Some(path) => draw(path, &tables, context),
        None => Ok(()),
    }
}

/// Compares the singular vectors of all matrices and convolutions with those of each other end.
fn singular(gpu: &Gpu, context: &Context, a: &dyn Weights, ends: &[&dyn Weights]) -> Result<()> {
    let is_matrix = |name: &String| a.shape(name).is_ok_and(|shape| shape.len() > 1);
    let tensors: Vec<String> = a.names().into_iter().filter(is_matrix).collect();
    let names: Vec<&str> = tensors.iter().map(String::as_str).collect();
    for gamma in [0.0, 0.3] {
        let all = ends.iter().map(|&end| singular_alignment(gpu, [a, end], &names, gamma));
        let all = all.collect::<Result<Vec<f64>>>()?;
        let text: Vec<String> = all.iter().map(|r| format!("{r:.3}")).collect();
        context.result(format_args!("singular vectors, gamma {gamma}: R {}", text.join(" -> ")));
        let (before, after) = (all[0], all.get(1));
        let line = json!({"line": "singular vectors", "gamma": gamma, "before": before, "after": after});
        context.record(&line)?;
    }
    Ok(())
}

/// Scores the models on the segments from the first end to each of the others.
fn evaluate(
    gpu: &Gpu,
    args: &Args,
    context: &Context,
    architecture: &Architecture,
    ends: &[&dyn Weights],
    tasks: &[Task],
) -> Result<Vec<Table>> {
    let stop = on_interrupt()?;
    let points = args.points as usize;
    let lambdas: Vec<f64> = (0..points).map(|i| i as f64 / (points - 1) as f64).collect();
    let all = (ends.len() - 1) * points * tasks.len();
    let bar = context.bar(Some(all as u64), "{bar:32} {pos}/{len} models, ETA {eta}");
    let table = |task: &Task| {
        let mut rows = Vec::new();
        let mut found = [None; 2];
        for (&end, name) in ends[1..].iter().zip(["naive", "matched"]) {
            let (mut scores, mut tempered) = (Vec::new(), Vec::new());
            for &t in &lambdas {
                let between = Interpolated { a: ends[0], b: end, t };
                let mut on = |_, _| unless_stopped(&stop, "nothing was written");
                on(0, 0)?;
                scores.push(match &task.data {
                    TaskData::Labelled(data) => {
                        let evaluation = architecture.evaluation(gpu, &between, data)?;
                        tempered.push(evaluation.tempered_loss);
                        Score::from(evaluation)
                    }
                    _ => architecture.score(gpu, &between, task, &mut on)?,
                });
                bar.inc(1);
            }
            let losses = scores.iter().map(|score| score.loss).collect();
            let middle = scores[points / 2];
            rows.push(Row { name, losses, middle });
            if name == "naive" {
                found = [Some(scores[0]), Some(scores[points - 1])];
                if !tempered.is_empty() {
                    rows.push(Row { name: "naive, best temperature", losses: tempered, middle });
                }
            }
        }
        let [Some(first), Some(last)] = found else { return Err(Error::config("a path has two ends")) };
        Ok(Table { name: task.name.clone(), ends: [first, last], lambdas: lambdas.clone(), rows })
    };
    let tables = tasks.iter().map(table).collect();
    bar.finish_and_clear();
    tables
}

fn show(table: &Table, context: &Context) -> Result<()> {
    let [a, b] = table.ends;
    let word = a.main_name();
    context.result(format_args!(
        "\n{}: ends have loss {:.4} and {:.4}, {word} {:.4} and {:.4}",
        table.name,
        a.loss,
        b.loss,
        a.main(),
        b.main()
    ));
    let middle = format!("middle {word}");
    let head = ["barrier above the", "ends' mean", "line", &middle];
    context.result(format_args!("  {:<26} {:>10} {:>10} {:>17}", head[0], head[1], head[2], head[3]));
    for row in &table.rows {
        let Barrier { above_mean, above_line, .. } = Barrier::of(&row.losses);
        let middle = row.middle.main();
        context
            .result(format_args!("  {:<26} {above_mean:>10.4} {above_line:>10.4} {middle:>17.4}", row.name));
        context.record(&json!({
            "line": "path",
            "data": table.name,
            "path": row.name,
            "lambdas": table.lambdas,
            "losses": row.losses,
            "above_mean": above_mean,
            "above_line": above_line,
            (format!("middle_{word}")): middle,
            (format!("end_{word}")): [a.main(), b.main()],
        }))?;
    }
    Ok(())
}

fn draw(path: &Path, tables: &[Table], context: &Context) -> Result<()> {
    let panel = |table: &Table| Panel {
        title: table.name.clone(),
        y: "loss".into(),
        curves: table
            .rows
            .iter()
            .map(|row| Curve {
                label: row.name.into(),
                points: table.lambdas.iter().copied().zip(row.losses.iter().copied()).collect(),
            })
            .collect(),
    };
    let panels: Vec<Panel> = tables.iter().map(panel).collect();
    let picture = svg(&panels, "from the first model to the second")
        .map_err(|message| Error::io(path, std::io::Error::other(message)))?;
    let text = if path.extension().is_some_and(|e| e == "html") { page(&picture, tables) } else { picture };
    context.write(path, &text)
}

/// Returns a page with the picture and a table of its numbers.
fn page(picture: &str, tables: &[Table]) -> String {
    let mut rows = String::new();
    for table in tables {
        let name = table.name.replace('&', "&amp;").replace('<', "&lt;");
        for row in &table.rows {
            let Barrier { above_mean, above_line, .. } = Barrier::of(&row.losses);
            rows += &format!(
                "<tr><td>{name}<td>{}<td>{above_mean:.4}<td>{above_line:.4}<td>{:.4}\n",
                row.name,
                row.middle.main()
            );
        }
    }
    format!(
        "<!doctype html>\n<meta charset=\"utf-8\">\n<title>Between two models</title>\n\
         <style>body {{ font-family: sans-serif; margin: 2em }} td, th {{ padding: 2px 12px; text-align: left }}</style>\n\
         {picture}\n<table>\n<tr><th>data<th>path<th>barrier above the ends' mean<th>above the line<th>middle\n\
         {rows}</table>\n"
    )
}
