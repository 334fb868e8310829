//! Rows for what is outside of the crate: cases of an op, and products with a sharing kind.

use super::ops::row_of;
use super::{Check, Entry, Row, Run, Settings, run};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ops::array::Array;
use crate::ops::case::{Case, Input};
use crate::ops::product::matmul::Epilogue;
use crate::ops::product::site::Site;
use crate::rng::Rng;
use crate::share::Tied;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::sync::Arc;
use std::time::Duration;

/// The time for the samples of one row.
const BUDGET: Duration = Duration::from_millis(500);

/// Checks and times cases on a device, those that are [timed](Case::timed). The result prints itself as a table, in which each
/// row stands beside the ceiling that the adapter's own speed sets.
///
/// # Errors
/// When a row fails, because its result is wrong or the device has a fault.
pub fn cases(gpu: &Gpu, cases: Vec<Case>) -> Result<Run> {
    measured(gpu, cases.into_iter().filter_map(row_of).collect())
}

/// Times products of so many `rows` with a site's weight, and their gradients, beside the same products with a stored matrix of that
/// size. The result prints itself as a table.
///
/// A product's bytes are its operands, its result and what the site stores, each moved once.
///
/// # Errors
/// As [`cases`].
pub fn site(gpu: &Gpu, site: &Arc<dyn Site>, rows: &[usize]) -> Result<Run> {
    let stored = Tied::new(&site.expand().requires_grad()).shared();
    let mut all = Vec::new();
    for &rows in rows {
        for weight in [site, &stored] {
            all.extend([false, true].map(|backward| entry(weight.clone(), rows, backward)));
        }
    }
    measured(gpu, all)
}

fn measured(gpu: &Gpu, entries: Vec<Entry>) -> Result<Run> {
    let run = run(gpu.clone(), entries, &Settings::new(BUDGET), &mut |_| Ok(()))?;
    // Nothing has told of it before, as the command does.
    match run.failed.first() {
        Some(failed) => Err(Error::device(format!("{}: {}", failed.name(), failed.error))),
        None => Ok(run),
    }
}

fn entry(site: Arc<dyn Site>, rows: usize, backward: bool) -> Entry {
    let [out, inner] = site.size();
    let which = if backward { " backward" } else { "" };
    let shape = format!("{rows}x{inner}x{out}{which}");
    Entry::new(site.name(), shape, move |gpu| {
        if backward { gradient(gpu, &site, rows) } else { value(gpu, &site, rows) }
    })
}

/// Bytes of what a site stores.
fn stored(site: &Arc<dyn Site>) -> f64 {
    let buffers = site.buffers().into_iter().map(|(_, buffer)| buffer);
    site.leaves().into_iter().chain(buffers).map(|x| (x.count() * x.dtype().size()) as f64).sum()
}

fn value(gpu: &Gpu, site: &Arc<dyn Site>, rows: usize) -> Result<Row> {
    let [out, inner] = site.size();
    let array = Input::normal([rows, inner]).draw(&mut Rng::new(7));
    let x = array.upload(gpu, crate::DType::F32);
    let w = Array::read(&site.expand())?;
    let check = |at: usize| {
        let term = |q: usize| array.data[at / out * inner + q] * w.data[at % out * inner + q];
        let norm: f64 = (0..inner).map(|q| term(q).abs()).sum();
        Check { at, want: (0..inner).map(term).sum(), bound: 1e-5 * norm + 1e-12 }
    };
    let checks = [0, rows * out / 2, rows * out - 1].map(check).into();
    let bytes = 4.0 * (rows * (inner + out)) as f64 + stored(site);
    let site = site.clone();
    let run = move |_| no_grad(|| x.linear(&site, Epilogue::default()));
    Ok(Row { checks, repeats: true, ..Row::new([bytes, 2.0 * (rows * out * inner) as f64], run) })
}

/// The gradients of the rows and of the leaves, whose work is that of two products.
fn gradient(gpu: &Gpu, site: &Arc<dyn Site>, rows: usize) -> Result<Row> {
    let [out, inner] = site.size();
    let drawn = |shape: [usize; 2], seed| Tensor::randn(gpu, shape, &mut Rng::new(seed));
    let (x, dy) = (drawn([rows, inner], 7).requires_grad(), drawn([rows, out], 8));
    let y = x.linear(site, Epilogue::default());
    let bytes = 4.0 * (rows * (2 * inner + 2 * out)) as f64 + 2.0 * stored(site);
    // dx = dy W.
    let (w, d) = (Array::read(&site.expand())?, Array::read(&dy)?);
    let check = |at: usize| {
        let term = |q: usize| d.data[at / inner * out + q] * w.data[q * inner + at % inner];
        let norm: f64 = (0..out).map(|q| term(q).abs()).sum();
        Check { at, want: (0..out).map(term).sum(), bound: 1e-5 * norm + 1e-12 }
    };
    let checks = [0, rows * inner / 2, rows * inner - 1].map(check).into();
    let gpu = gpu.clone();
    let run = move |_| {
        let found = y.backward_with_retain_graph(&dy).map(|grads| {
            // Those of the leaves may be pending, and their time counts.
            grads.leaves().for_each(|(_, gradient)| gradient.evaluate());
            grads.get(&x).cloned().unwrap_or_else(|| Tensor::zeros(&gpu, [1]))
        });
        super::carried(&gpu, found)
    };
    Ok(Row { checks, repeats: true, ..Row::new([bytes, 4.0 * (rows * out * inner) as f64], run) })
}
