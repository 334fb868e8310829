//! The `matching` family's merges. Formulas: `tests/vectors/matching/README.md`.

use super::tying::open;
use crate::support::{download, gpu, within};
use std::path::Path;
use tiebeam::merge::global::{Each, Pcb, TiesGlobal, l2_norms};
use tiebeam::merge::methods::*;
use tiebeam::merge::pleas::least_squares;
use tiebeam::store::{File, FileDType};
use tiebeam::{Result, Tensor};

pub const FILES: &[(&str, super::Check)] = &[("merge", merge), ("pleas_ls", pleas_ls)];

/// The bound of the vectors' README.
const BOUND: f64 = 2e-6;

fn tensor(file: &File, name: &str) -> Tensor {
    let info = file.info(name).unwrap_or_else(|e| panic!("{e}"));
    match info.dtype {
        FileDType::U8 | FileDType::I32 => {
            Tensor::from_slice(gpu(), &file.tensor_u32(name).unwrap(), &info.shape[..])
        }
        _ => Tensor::from_slice(gpu(), &file.tensor_f32(name).unwrap(), &info.shape[..]),
    }
}

fn numbers(file: &File, name: &str) -> Vec<f64> {
    let bytes = file.bytes(name).unwrap_or_else(|e| panic!("{e}"));
    bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect()
}

fn same(file: &File, name: &str, got: &Tensor) {
    let want = tensor(file, name);
    assert_eq!(got.shape(), want.shape(), "{name}");
    within(name, &download(got), &download(&want), |_| BOUND);
}

struct Inputs {
    names: Vec<String>,
    base: Vec<Tensor>,
    /// `[tensor][model]`
    models: Vec<Vec<Tensor>>,
}

impl Inputs {
    fn open(file: &File) -> Inputs {
        // The order of the concatenated vector: layer.weight, layer.bias, norm.weight.
        let mut names: Vec<String> =
            file.names().filter_map(|n| n.strip_prefix("base.")).map(String::from).collect();
        names.sort_by_key(|n| (!n.starts_with("layer"), !n.ends_with("weight")));
        let count = (0..).take_while(|i| file.contains(&format!("m{i}.{}", names[0]))).count();
        let of = |prefix: &str, n: &String| tensor(file, &format!("{prefix}.{n}"));
        Inputs {
            base: names.iter().map(|n| of("base", n)).collect(),
            models: names.iter().map(|n| (0..count).map(|i| of(&format!("m{i}"), n)).collect()).collect(),
            names,
        }
    }

    fn each(&self, visit: &mut dyn FnMut(&Tensor, &[Tensor]) -> Result<()>) -> Result<()> {
        self.base.iter().zip(&self.models).try_for_each(|(base, models)| visit(base, models))
    }
}

fn merge(path: &Path) {
    let file = open(path);
    let inputs = Inputs::open(&file);
    let p = numbers(&file, "params");
    let n = inputs.models[0].len();
    let f32s = |range: std::ops::Range<usize>| p[range].iter().map(|&x| x as f32).collect::<Vec<f32>>();
    let weights = f32s(0..n);
    let [lambda, density, gamma, t, ratio, floor] = [0, 1, 2, 3, 4, 5].map(|i| p[n + i]);
    let (losses, steps, power) = (&p[n + 6..2 * n + 6], &p[2 * n + 6..3 * n + 6], p[3 * n + 6]);
    let (lambda, t) = (lambda as f32, t as f32);
    let coefficients = tensor(&file, "atlas.coef").to_vec::<f32>().unwrap();
    for (b, name) in inputs.names.iter().enumerate() {
        let (base, models) = (&inputs.base[b], &inputs.models[b]);
        let check = |method: &str, got: Tensor| same(&file, &format!("out.{method}.{name}"), &got);
        let deltas = task_vectors(base, models);
        check("average", average(models));
        check("linear", linear(models, &weights, true));
        check("linear_unnormalized", linear(models, &weights, false));
        check("slerp_m0_m1", slerp(&models[0], &models[1], t).unwrap());
        let colinear = tensor(&file, &format!("colinear.{name}"));
        check("slerp_m0_colinear", slerp(&models[0], &colinear, t).unwrap());
        check("slerp_taskvec_m0_m1", slerp_task_vectors(base, [&models[0], &models[1]], t).unwrap());
        check("task_arithmetic", task_arithmetic(base, &deltas, &weights, false, lambda));
        let trimmed = trim(&deltas, &vec![density; n]).unwrap();
        check("ties", sign_consensus(base, &trimmed, &weights, true, lambda));
        let crumbs = breadcrumbs(&deltas, &vec![density; n], &vec![gamma; n]).unwrap();
        check("breadcrumbs", task_arithmetic(base, &crumbs, &weights, false, lambda));
        check("breadcrumbs_ties", sign_consensus(base, &crumbs, &weights, false, lambda));
        let mask = |i: usize| tensor(&file, &format!("mask{i}.{name}")).cast(tiebeam::DType::F32);
        let kept: Vec<Tensor> = (0..n).map(|i| deltas[i].mul(&mask(i))).collect();
        let dropped: Vec<Tensor> = kept.iter().map(|d| d.scale(1.0 / density as f32)).collect();
        check("dare_linear", task_arithmetic(base, &dropped, &weights, false, lambda));
        check("dare_ties", sign_consensus(base, &dropped, &weights, false, lambda));
        let rescaled: Vec<Tensor> = deltas.iter().zip(&kept).map(|(d, k)| rescale_l1(d, k)).collect();
        check("dare_linear_l1", task_arithmetic(base, &rescaled, &weights, false, lambda));
        check("model_stock", model_stock(base, models).unwrap());
        check("mwa_loss", linear(models, &loss_weights(losses, power), false));
        check("mwa_step", linear(models, &step_weights(steps, power), false));
        let blocks = inputs.names.len();
        let own: Vec<f32> = (0..n).map(|i| coefficients[i * blocks + b]).collect();
        check("atlas", task_arithmetic(base, &deltas, &own, false, 1.0));
    }
    whole_vectors(&file, &inputs, lambda, density, ratio);
    fisher_weighted(&file, &inputs, floor as f32);
}

fn whole_vectors(file: &File, inputs: &Inputs, lambda: f32, density: f64, ratio: f64) {
    let (models, size) = (inputs.models[0].len(), inputs.base.iter().map(|b| b.count() as u64).sum());
    let each: &mut Each = &mut |visit| inputs.each(visit);
    let mut ties = TiesGlobal::measure(models, size, density, each).unwrap();
    let pcb = Pcb::measure(models, size, ratio, each).unwrap();
    for (name, (base, models)) in inputs.names.iter().zip(inputs.base.iter().zip(&inputs.models)) {
        same(file, &format!("out.ties_global.{name}"), &ties.merge(base, models, lambda).unwrap());
        same(file, &format!("out.pcb.{name}"), &pcb.merge(base, models, &vec![1.0; models.len()], lambda));
    }
}

fn fisher_weighted(file: &File, inputs: &Inputs, floor: f32) {
    let models = inputs.models[0].len();
    // The README's coefficients.
    let coefficients = [0.5, 0.3, 0.2];
    assert_eq!(models, coefficients.len());
    let fishers: Vec<Vec<Tensor>> = inputs
        .names
        .iter()
        .map(|n| (0..models).map(|i| tensor(file, &format!("fisher{i}.{n}"))).collect())
        .collect();
    let norms = l2_norms(models, |visit| fishers.iter().try_for_each(|f| visit(f))).unwrap();
    let divided: Vec<f32> = coefficients.iter().zip(&norms).map(|(&c, n)| (c / n) as f32).collect();
    for ((name, models), fishers) in inputs.names.iter().zip(&inputs.models).zip(&fishers) {
        let plain = fisher(models, fishers, &coefficients.map(|c| c as f32), floor);
        same(file, &format!("out.fisher.{name}"), &plain);
        same(file, &format!("out.fisher_normalized.{name}"), &fisher(models, fishers, &divided, floor));
    }
}

fn pleas_ls(path: &Path) {
    let file = open(path);
    let [x1, x2, w1, w2, into, out] =
        ["x1", "x2", "w1", "w2", "perm_in", "perm_out"].map(|name| tensor(&file, name));
    let z = x1.add(&x2.index_select(1, &into)).scale(0.5);
    let y = x1.matmul(&w1.t()).add(&x2.matmul(&w2.t()).index_select(1, &out)).scale(0.5);
    let mean = w1.add(&w2.index_select(0, &out).index_select(1, &into)).scale(0.5);
    let best = least_squares(&z, &y, numbers(&file, "ridge")[0]).unwrap();
    for (name, w) in [("w_star", &best), ("w_avg", &mean)] {
        within(name, &download(w), &numbers(&file, name), |_| BOUND);
    }
    let mse = |w: &Tensor| z.matmul(&w.t()).sub(&y).square().mean_all();
    for (name, w) in [("mse_star", &best), ("mse_avg", &mean)] {
        let want = numbers(&file, name);
        within(name, &download(&mse(w)), &want, |_| 1e-5 * want[0]);
    }
}
