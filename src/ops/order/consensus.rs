//! The sign vote of TIES over differences that are cut down to ranges of ranks, in one kernel.

use super::rank::{self, Kept};
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::tensor::Tensor;

/// The most models of one kernel: so many have their parameters in a uniform's 256 bytes.
const MODELS: usize = 12;

/// How the differences are weighed and summed.
#[derive(Clone, Copy, Debug)]
pub struct Vote<'a> {
    /// A weight for each model.
    pub weights: &'a [f32],
    /// Whether a sum is divided by the sum of its weights.
    pub normalize: bool,
    /// The factor of the sum.
    pub lambda: f32,
}

/// Whether a device's kernels can read so many models at once.
pub fn takes(gpu: &Gpu, models: usize) -> bool {
    models <= MODELS.min(gpu.max_bindings().saturating_sub(3))
}

/// With `d_m = w_m (x_m - base)` inside of the range of ranks `kept[m]`, else 0, and the sign `s = +1` where `sum d_m >= 0`, else
/// -1, returns `base + lambda sum [sign d_m = s] d_m`. If `normalize`, the sum is divided by `sum [sign d_m = s] w_m` where that is
/// not 0. The tensors are the next ones that were ranked. No gradient.
///
/// The second result has what [`Tensor::non_finite`] says of `base` and of every `x_m`, which is known without a further pass.
///
/// # Errors
/// The device's fault.
///
/// # Panics
/// If there are more models than [`takes`] says, or their numbers differ.
#[track_caller]
pub fn consensus(base: &Tensor, xs: &[Tensor], kept: &mut [Kept], vote: Vote) -> Result<(Tensor, Tensor)> {
    const NAME: &str = "consensus";
    assert!(takes(base.gpu(), xs.len()), "{NAME}: {} models", xs.len());
    assert!(kept.len() == xs.len() && vote.weights.len() == xs.len(), "{NAME}: numbers of models differ");
    let plain = |x: &Tensor| crate::ops::float(NAME, x).detach().contiguous();
    let (base, xs) = (plain(base), xs.iter().map(plain).collect::<Vec<Tensor>>());
    let y = Tensor::empty(base.gpu(), NAME, base.shape(), DType::F32);
    let n = y.count();
    let finite = rank::counters(&base, xs.len() + 1, 2);
    if n == 0 {
        return Ok((y, finite));
    }
    let source = Source::file(NAME).u32("MODELS", xs.len() as u32);
    let mut launch =
        Launch::new(NAME, &source, NAME, grid(n.div_ceil(4).div_ceil(64))).turns(5 * (xs.len() + 1));
    launch =
        launch.set("n", n).set("normalize", vote.normalize).set("lambda", vote.lambda).bind("base", &base);
    for (m, (x, kept)) in xs.iter().zip(kept).enumerate() {
        assert!(x.shape() == base.shape(), "{NAME}: shapes differ: {}, {}", base.shape(), x.shape());
        let [low, high] = kept.bounds(&x.sub(&base))?;
        launch = launch.bind(format!("x{m}"), x).set(format!("weight{m}"), vote.weights[m]);
        launch = launch.set(format!("low_key{m}"), low[0]).set(format!("low_index{m}"), low[1]);
        launch = launch.set(format!("high_key{m}"), high[0]).set(format!("high_index{m}"), high[1]);
    }
    base.gpu().launch(launch.bind_mut("y", &y).bind_mut("finite", &finite));
    Ok((y, finite))
}

pub(super) fn cases() -> Vec<Case> {
    const WEIGHTS: [f32; 4] = [0.5, -1.0, 2.0, 1.5];
    let mut all = Vec::new();
    for (n, models, normalize) in
        [(1, 1, true), (13, 2, false), (1023, 2, true), (4099, 3, true), (257, 4, false)]
    {
        // Differences of integers have many ties, and their sums are exact, so that their signs are those of the reference.
        // The base is far from 0, where no division's error could show.
        let inputs = (0..=models).map(|_| Input::normal([n]).fill(Fill::Integers(64, 80)).fixed()).collect();
        let ranges: Vec<_> = (0..models).map(|m| n * (m + 1) / 8..n - m * n / 16).collect();
        let of = ranges.clone();
        let forward = move |x: &[Tensor]| {
            let deltas: Vec<Tensor> = x[1..].iter().map(|m| m.sub(&x[0])).collect();
            let counts = vec![n; models];
            let mut kept = rank::ranges(&counts, &of, |visit| visit(&deltas)).expect("a device");
            let vote = Vote { weights: &WEIGHTS[..models], normalize, lambda: 0.75 };
            consensus(&x[0], &x[1..], &mut kept, vote).expect("a device").0
        };
        let reference = move |x: &[Array]| {
            let delta = |m: usize| Array::from_fn([n], |i| x[1 + m].data[i] - x[0].data[i]);
            let kept: Vec<Array> = (0..models).map(|m| rank::keep64(&delta(m), ranges[m].clone())).collect();
            Array::from_fn([n], |i| {
                let d: Vec<[f64; 2]> =
                    kept.iter().zip(WEIGHTS).map(|(d, w)| [d.data[i] * w as f64, w as f64]).collect();
                let total: f64 = d.iter().map(|d| d[0]).sum();
                // Where the total is NaN, nobody agrees.
                let agree =
                    || d.iter().filter(|d| (d[0] > 0.0 && total >= 0.0) || (d[0] < 0.0 && total < 0.0));
                let [sum, weight] = [0, 1].map(|k| agree().map(|d| d[k]).sum::<f64>());
                let divisor = if normalize && weight != 0.0 { weight } else { 1.0 };
                x[0].data[i] + 0.75 * sum / divisor
            })
        };
        all.push(Case::new(format!("{models} models of {n}"), inputs, forward, reference));
    }
    all
}
