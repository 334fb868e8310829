//! `tiebeam barrier`.

use crate::context::{Context, is_standard, on_interrupt, unless_stopped};
use crate::data::Data;
use clap::Parser;
use serde_json::json;
use std::path::{Path, PathBuf};
use tiebeam::merge::plot::{Curve, Panel, svg};
use tiebeam::merge::{
    Barrier, Evaluation, LossPath, MatchOptions, Matching, MlpModel, Permutation, Shards, Spec, Weights,
    distance, match_weights, singular_alignment,
};
use tiebeam::{Error, Gpu, Result, no_grad};

const EXAMPLES: &str = "\
Examples:
  tiebeam barrier a.safetensors b.safetensors --data test.safetensors --out curve.html
  tiebeam barrier a.safetensors b.safetensors --data train.safetensors --data test.safetensors --json";

/// Evaluate models between two multilayer perceptrons, unmatched and matched
#[derive(Parser)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// One end: a safetensors file of `NAME.weight` [out, in] and `NAME.bias`, with ReLU between layers
    a: PathBuf,
    /// The other end
    b: PathBuf,
    /// Rows to evaluate on: safetensors with x [rows, inputs] and y [rows]; several files are evaluated one by one
    #[arg(long, required = true)]
    data: Vec<PathBuf>,
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
    middle: Evaluation,
}

/// All rows for one file of data.
struct Table {
    name: String,
    ends: [Evaluation; 2],
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
    let gpu = context.open()?;
    let [a, b] = [context.shards(&args.a)?, context.shards(&args.b)?];
    let net = MlpModel::of(&a)?;
    if MlpModel::of(&b)? != net {
        let message =
            format!("{} and {} are networks of different layers", args.a.display(), args.b.display());
        return Err(Error::config(message));
    }
    let data = args.data.iter().map(|path| Data::read(&gpu, path, &net)).collect::<Result<Vec<_>>>()?;
    let permutation = match &args.permutation {
        Some(path) => Permutation::load(path)?,
        None => matched(&gpu, &net, &a, &b)?.permutation,
    };
    permutation.check(&b)?;
    let permuted = permutation.permuted(&b);
    let [before, after] = [distance(&gpu, &a, &b)?, distance(&gpu, &a, &permuted)?];
    context.result(format_args!(
        "L2 distance {before:.4} -> {after:.4} ({:.1}% less)",
        100.0 * (1.0 - after / before)
    ));
    context.record(&json!({"line": "distance", "before": before, "after": after}))?;
    if args.singular {
        let tensors: Vec<String> = net.layers().iter().map(|layer| format!("{layer}.weight")).collect();
        let names: Vec<&str> = tensors.iter().map(String::as_str).collect();
        for gamma in [0.0, 0.3] {
            let r = |end: &dyn Weights| singular_alignment(&gpu, [&a, end], &names, gamma);
            let [before, after] = [r(&b)?, r(&permuted)?];
            context.result(format_args!("singular vectors, gamma {gamma}: R {before:.3} -> {after:.3}"));
            let line = json!({"line": "singular vectors", "gamma": gamma, "before": before, "after": after});
            context.record(&line)?;
        }
    }
    let tables = evaluate(&gpu, args, context, &net, [&a, &b, &permuted], &data)?;
    tables.iter().try_for_each(|table| show(table, context))?;
    match &args.out {
        Some(path) => draw(path, &tables, context),
        None => Ok(()),
    }
}

fn matched(gpu: &Gpu, net: &MlpModel, a: &Shards, b: &Shards) -> Result<Matching> {
    let spec = Spec::mlp(a, &net.layers())?;
    match_weights(gpu, &spec, a, b, &MatchOptions::default())
}

fn evaluate(
    gpu: &Gpu,
    args: &Args,
    context: &Context,
    net: &MlpModel,
    ends: [&dyn Weights; 3],
    data: &[Data],
) -> Result<Vec<Table>> {
    let stop = on_interrupt()?;
    let points = args.points as usize;
    let bar = context.bar(Some((2 * points * data.len()) as u64), "{bar:32} {pos}/{len} models, ETA {eta}");
    let [a, b, permuted] = ends;
    let table = |data: &Data| {
        let path = |end: &dyn Weights| {
            LossPath::between(a, end, points, |weights| {
                bar.inc(1);
                unless_stopped(&stop, "nothing was written")?;
                Evaluation::of(&no_grad(|| net.logits(gpu, weights, &data.x))?, &data.labels)
            })
        };
        let [naive, matched] = [path(b)?, path(permuted)?];
        let row = |name, path: &LossPath, losses| Row { name, losses, middle: *path.middle() };
        Ok(Table {
            name: data.name(),
            ends: [naive.points[0], naive.points[points - 1]],
            lambdas: naive.lambdas.clone(),
            rows: vec![
                row("naive", &naive, naive.losses()),
                row("naive, best temperature", &naive, naive.tempered_losses()),
                row("matched", &matched, matched.losses()),
            ],
        })
    };
    let tables = data.iter().map(table).collect();
    bar.finish_and_clear();
    tables
}

fn show(table: &Table, context: &Context) -> Result<()> {
    let [a, b] = table.ends;
    context.result(format_args!(
        "\n{}: ends have loss {:.4} and {:.4}, accuracy {:.4} and {:.4}",
        table.name, a.loss, b.loss, a.accuracy, b.accuracy
    ));
    let head = ["barrier above the", "ends' mean", "line", "middle correct"];
    context.result(format_args!("  {:<26} {:>10} {:>10} {:>14}", head[0], head[1], head[2], head[3]));
    for row in &table.rows {
        let Barrier { above_mean, above_line, .. } = Barrier::of(&row.losses);
        let accuracy = row.middle.accuracy;
        context.result(format_args!(
            "  {:<26} {above_mean:>10.4} {above_line:>10.4} {accuracy:>14.4}",
            row.name
        ));
        context.record(&json!({
            "line": "path",
            "data": table.name,
            "path": row.name,
            "lambdas": table.lambdas,
            "losses": row.losses,
            "above_mean": above_mean,
            "above_line": above_line,
            "middle_accuracy": accuracy,
            "end_accuracies": [a.accuracy, b.accuracy],
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
                row.name, row.middle.accuracy
            );
        }
    }
    format!(
        "<!doctype html>\n<meta charset=\"utf-8\">\n<title>Between two models</title>\n\
         <style>body {{ font-family: sans-serif; margin: 2em }} td, th {{ padding: 2px 12px; text-align: left }}</style>\n\
         {picture}\n<table>\n<tr><th>data<th>path<th>barrier above the ends' mean<th>above the line<th>middle, correct\n\
         {rows}</table>\n"
    )
}
