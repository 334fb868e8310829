//! Converts a trained model to shared weights.

use indicatif::{ProgressBar, ProgressStyle};
use std::fmt;
use std::str::FromStr;
use tiebeam::models::convert::{Selection, recursive_sites};
use tiebeam::models::llama::{LINEARS, Llama};
use tiebeam::models::masa::MasaPlan;
use tiebeam::{Gpu, Result, Tensor, no_grad};

/// How weights are shared.
#[derive(Clone, Copy, Debug)]
pub enum Conversion {
    /// The layers use this many blocks in turn.
    Recursive(usize),
    /// The matrices of q, k, v and o are combined from this many atoms each.
    Masa(usize),
    /// Groups of this many neighbouring layers use the matrices of the first.
    Fold(usize),
}

impl FromStr for Conversion {
    type Err = String;

    fn from_str(text: &str) -> Result<Conversion, String> {
        let wrong = || format!("'{text}' is none of recursive:B, masa:S and fold:G, with a number above 0");
        let (kind, count) = text.split_once(':').ok_or_else(wrong)?;
        let count = count.parse().ok().filter(|&n| n > 0).ok_or_else(wrong)?;
        match kind {
            "recursive" => Ok(Conversion::Recursive(count)),
            "masa" => Ok(Conversion::Masa(count)),
            "fold" => Ok(Conversion::Fold(count)),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Conversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Conversion::Recursive(blocks) => write!(f, "{blocks} blocks in turn"),
            Conversion::Masa(atoms) => write!(f, "attention from {atoms} atoms"),
            Conversion::Fold(group) => write!(f, "groups of {group}"),
        }
    }
}

impl Conversion {
    /// Returns the model with shared weights. Its norms and token embeddings are the same leaves as in `model`. A dictionary's
    /// groups and low-rank parts are fitted to the tokens `sample`.
    pub fn apply(&self, model: &Llama, rank: usize, groups: usize, sample: &Tensor) -> Result<Llama> {
        let count = if matches!(self, Conversion::Masa(_)) { 4 * groups } else { LINEARS.len() };
        let bar = ProgressBar::new(count as u64);
        let style = "{bar:24} {pos}/{len} {wide_msg} {elapsed} so far, about {eta} to go";
        bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
        let step = |name: &str| {
            bar.set_message(format!("converting {name}"));
            bar.inc(1);
        };
        if let Conversion::Masa(atoms) = *self {
            let plan = MasaPlan { atoms, groups, rank };
            let new = model.masa(plan, sample, step);
            bar.finish_and_clear();
            return new;
        }
        let mut new = model.clone();
        for (i, name) in LINEARS.iter().enumerate() {
            step(name);
            let weights: Vec<Tensor> =
                model.layers.iter().map(|l| l.linear(i).weight.leaves().remove(0)).collect();
            let sites = match *self {
                Conversion::Recursive(blocks) => {
                    let selection = if rank > 0 { Selection::Average } else { Selection::Stepwise };
                    recursive_sites(&weights, blocks, rank, selection)?
                }
                Conversion::Fold(group) => (0..weights.len())
                    .map(|l| model.layers[l / group * group].linear(i).weight.clone())
                    .collect(),
                Conversion::Masa(_) => continue,
            };
            for (layer, site) in new.layers.iter_mut().zip(sites) {
                layer.linear_mut(i).weight = site;
            }
        }
        bar.finish_and_clear();
        Ok(new)
    }
}

/// Returns the norm of the difference of both models' last hidden states on these tokens, relative to the norm of the first's.
pub fn output_error(gpu: &Gpu, before: &Llama, after: &Llama, tokens: &[u32]) -> Result<f64> {
    let x = Tensor::from_slice(gpu, tokens, [1, tokens.len()]);
    let [a, b] = [before, after].map(|model| no_grad(|| model.hidden(&x)));
    let norm = |x: &Tensor| x.square().sum_all().item().map(|v| (v as f64).sqrt());
    Ok(norm(&a.sub(&b))? / norm(&a)?)
}
