//! Products of matrices, and attention.

use super::{Inputs, U, gradient};
use crate::bench::{Case, Check, Row};
use crate::nn::Mask;
use crate::ops::product::matmul::choose::chosen;
use crate::ops::product::matmul::tune::BENCHED;

/// Of the sizes that `tiebeam tune` measures too.
pub(super) fn matmuls(cpu: bool, full: bool) -> Vec<Case> {
    let wanted = |size: &[usize; 4]| match size[1].min(size[2]) {
        2048 => full || !cpu,
        4096 => full && !cpu,
        _ => true,
    };
    let mut all: Vec<Case> = BENCHED.into_iter().filter(wanted).map(|size| matmul(size, false)).collect();
    let half = if cpu { &[1024][..] } else { &[1024, 4096] };
    all.extend(half.iter().map(|&size| matmul([1, size, size, size], true)));
    all
}

fn matmul([batch, m, n, k]: [usize; 4], half: bool) -> Case {
    let shape = if batch > 1 { format!("{batch}x({m}x{k}x{n})") } else { format!("{m}x{k}x{n}") };
    Case::new(if half { "matmul f16" } else { "matmul" }, shape, move |gpu| {
        let (a, b) = (vec![batch, m, k], vec![batch, k, n]);
        let skip = (batch == 1) as usize;
        let mut inputs = Inputs::new(gpu, &[&a[skip..], &b[skip..]]);
        if half {
            inputs.round();
        }
        let checks = [(0, 0, 0), (batch / 2, m / 2, n / 3), (batch - 1, m - 1, n - 1)]
            .iter()
            .map(|&(q, row, col)| {
                let [a, b] = [&inputs.host[0], &inputs.host[1]];
                let term = |i: usize| a[(q * m + row) * k + i] as f64 * b[(q * k + i) * n + col] as f64;
                let norm = (0..k).map(|i| term(i).powi(2)).sum::<f64>().sqrt();
                let bound = 4.0 * U * (k as f64).sqrt() * norm;
                Check { at: (q * m + row) * n + col, want: (0..k).map(term).sum(), bound }
            })
            .collect();
        let size = if half { 2 } else { 4 };
        let bytes = (batch * (size * (m * k + k * n) + 4 * m * n)) as f64;
        let constants = chosen(&inputs.sets[0][0], &inputs.sets[0][1]);
        let work = [bytes, 2.0 * (batch * m * n * k) as f64];
        Ok(Row { half, constants, ..inputs.row(work, checks, |x| x[0].matmul(&x[1])) })
    })
}

pub(super) fn attentions(cpu: bool) -> Vec<Case> {
    let sizes = if cpu { &[[4, 8, 512, 64]][..] } else { &[[4, 8, 512, 64], [8, 16, 1024, 64]] };
    let mut all: Vec<Case> =
        sizes.iter().flat_map(|&size| [false, true].map(|backward| attention(size, backward))).collect();
    all.push(one_query([4, 32, 8, 2048, 64]));
    all
}

/// Causal attention of `[batch, heads, tokens, size]`, forward or backward.
fn attention(of: [usize; 4], backward: bool) -> Case {
    let [batch, heads, tokens, size] = of;
    let family = if backward { "attention backward" } else { "attention" };
    Case::new(family, format!("{batch}x{heads}x{tokens}x{size} causal"), move |gpu| {
        let inputs = Inputs::new(gpu, &[&of[..]; 4]);
        let [q, k, v, dy] = [0, 1, 2, 3].map(|i| &inputs.host[i]);
        let weights = |i: usize| -> Vec<f64> {
            let score = |j: usize| {
                let dot = (0..size).map(|d| q[i * size + d] as f64 * k[j * size + d] as f64).sum::<f64>();
                (dot / (size as f64).sqrt()).exp()
            };
            let all: Vec<f64> = (0..=i).map(score).collect();
            let sum: f64 = all.iter().sum();
            all.into_iter().map(|s| s / sum).collect()
        };
        let array = 4.0 * of.iter().product::<usize>() as f64;
        // Half of the pairs are masked: two products forward, five backward.
        let pairs = (batch * heads * tokens * tokens / 2 * size) as f64;
        if !backward {
            let at = (tokens - 1) * size + 3;
            let want = weights(tokens - 1).iter().enumerate().map(|(j, w)| w * v[j * size + 3] as f64).sum();
            let checks = vec![Check { at, want, bound: 1e-5 }];
            let work = [4.0 * array, 4.0 * pairs];
            return Ok(inputs.row(work, checks, |x| x[0].attention(&x[1], &x[2], &Mask::Causal)));
        }
        let key = tokens / 2;
        let want = (key..tokens).map(|i| weights(i)[key] * dy[i * size + 3] as f64).sum();
        let checks = vec![Check { at: key * size + 3, want, bound: 1e-5 }];
        let graphs: Vec<_> = inputs
            .sets
            .iter()
            .map(|x| {
                let leaves = [0, 1, 2].map(|i| x[i].requires_grad());
                (leaves[0].attention(&leaves[1], &leaves[2], &Mask::Causal), leaves, x[3].clone())
            })
            .collect();
        let sets = graphs.len();
        let run = move |i: usize| {
            let (y, leaves, dy) = &graphs[i];
            gradient(y, dy, &leaves[2])
        };
        Ok(Row { sets, checks, ..Row::new([8.0 * array, 10.0 * pairs], run) })
    })
}

/// One query a head against many keys: `[batch, heads, key heads, keys, size]`.
fn one_query([batch, heads, kv_heads, keys, size]: [usize; 5]) -> Case {
    let shape = format!("{batch}x{heads}/{kv_heads}x{keys}x{size}");
    Case::new("attention, one query", shape, move |gpu| {
        let (q, kv) = ([batch, heads, 1, size], [batch, kv_heads, keys, size]);
        let inputs = Inputs::new(gpu, &[&q[..], &kv, &kv]);
        let [q, k, v] = [0, 1, 2].map(|i| &inputs.host[i]);
        let score = |j: usize| {
            let dot = (0..size).map(|d| q[d] as f64 * k[j * size + d] as f64).sum::<f64>();
            (dot / (size as f64).sqrt()).exp()
        };
        let total: f64 = (0..keys).map(score).sum();
        let want = (0..keys).map(|j| score(j) * v[j * size + 3] as f64).sum::<f64>() / total;
        let checks = vec![Check { at: 3, want, bound: 1e-5 }];
        let bytes = 4.0 * (2 * batch * (kv_heads * keys + heads) * size) as f64;
        let work = [bytes, 4.0 * (batch * heads * keys * size) as f64];
        Ok(inputs.row(work, checks, |x| x[0].attention(&x[1], &x[2], &Mask::Causal)))
    })
}
