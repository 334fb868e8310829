//! Each op with one walk of `n` turns. The sums are whole numbers below 2^24, so an exact comparison shows whether a turn is
//! missing.

use crate::Long;
use crate::support::download;
use std::sync::Arc;
use tiebeam::geometry::{Clouds, Graph};
use tiebeam::nn::{CrossEntropy, Mask};
use tiebeam::ops::points::edges::Edges;
use tiebeam::ops::points::table_conv::SplineTable;
use tiebeam::ops::product::conv::Conv2dConfig;
use tiebeam::ops::product::matmul::Epilogue;
use tiebeam::share::{Dictionary, Draw, Hashed, LowRank, Mapping, Site};
use tiebeam::{Gpu, Grads, Tensor};

/// Returns 1, 2, 3, 1, 2, ..., of which the sum of `n` is `2 n` or slightly less.
fn ramp(gpu: &Gpu, shape: &[usize]) -> Tensor {
    let data: Vec<f32> = (0..shape.iter().product()).map(|i| (i % 3 + 1) as f32).collect();
    Tensor::from_slice(gpu, &data, shape)
}

fn ramp_sum(n: usize) -> f64 {
    (0..n).map(|i| (i % 3 + 1) as f64).sum()
}

fn ones(gpu: &Gpu, shape: &[usize]) -> Tensor {
    Tensor::ones(gpu, shape).contiguous()
}

fn ids(gpu: &Gpu, n: usize) -> Tensor {
    Tensor::from_slice(gpu, &vec![1u32; n], [n])
}

/// Checks that every element is exactly `want`.
fn equal(what: &str, x: &Tensor, want: f64) {
    near(what, x, want, 0.0);
}

/// Checks that every element is within `relative` of `want`.
fn near(what: &str, x: &Tensor, want: f64, relative: f64) {
    for (i, got) in download(x).into_iter().enumerate() {
        assert!((got - want).abs() <= relative * want.abs(), "{what}, element {i}: got {got}, want {want}");
    }
}

fn gradient<'a>(grads: &'a Grads, leaf: &Tensor) -> &'a Tensor {
    grads.get(leaf).expect("a gradient")
}

fn reductions(n: usize, tests: &mut Vec<Long>) {
    for shape in [[2, n, 1], [1, n, 3], [1, n, 4], [3, n + 1, 1]] {
        let elements: usize = shape.iter().product();
        tests.push(Long::new(format!("reductions over the middle of {shape:?}"), elements, move |gpu| {
            let x = ones(gpu, &shape);
            equal("sum", &x.sum(1), shape[1] as f64);
            equal("mean", &x.mean(1), 1.0);
            // The last element is the largest.
            let last = Tensor::positions(gpu, shape[1])
                .cast(tiebeam::DType::F32)
                .reshape([1, shape[1], 1])
                .expand(shape);
            let last = last.contiguous();
            equal("max", &last.max(1), shape[1] as f64 - 1.0);
            equal("min", &last.neg().min(1), 1.0 - shape[1] as f64);
            let place = last.argmax(1).to_vec::<u32>().unwrap();
            assert!(place.iter().all(|&i| i as usize == shape[1] - 1), "argmax: {place:?}");
            let sums = x.cumsum(1);
            let (first, rest) = (sums.slice(1, 0..1), sums.slice(1, shape[1] - 1..shape[1]));
            equal("cumsum begins", &first.contiguous(), 1.0);
            equal("cumsum ends", &rest.contiguous(), shape[1] as f64);
            equal("cumsum_reverse begins", &x.cumsum_reverse(1).slice(1, 0..1).contiguous(), shape[1] as f64);
        }));
    }
}

/// Tests kernels over rows, with rows that one thread or 64 threads walk.
fn rows(pieces: usize, count: usize, tests: &mut Vec<Long>) {
    for width in [4 * pieces, 4 * pieces - 3] {
        tests.push(Long::new(format!("rows of {width}"), count * width, move |gpu| {
            let x = ones(gpu, &[count, width]).requires_grad();
            near("softmax", &x.softmax(1).detach(), 1.0 / width as f64, 1e-6);
            let log = (width as f64).ln();
            near("log_softmax", &x.log_softmax(1).detach(), -log, 1e-6);
            let targets = Tensor::from_slice(gpu, &vec![width as u32 - 1; count], [count]);
            near("cross_entropy", &x.cross_entropy(&targets, None).detach(), log, 1e-6);
            let smoothed = CrossEntropy::default().smoothing(0.5);
            near("smoothed", &x.cross_entropy_with(&targets, smoothed).detach(), log, 1e-6);
            equal("rms_norm", &x.rms_norm(None, 0.0).detach(), 1.0);
            equal("layer_norm", &x.layer_norm(None, None, 1.0).detach(), 0.0);
            // The elements of a softmax sum to 1, so the gradient of their sum is 0.
            let y = x.softmax(1).sum_all().backward().unwrap();
            let most = download(&gradient(&y, &x).abs().max(1)).into_iter().fold(0.0, f64::max);
            assert!(most < 4e-6 / width as f64, "softmax gradient: {most:e}");
        }));
    }
}

fn products(n: usize, tests: &mut Vec<Long>) {
    for (m, k, cols) in [(3, n + 3, 3), (1, n, 16), (16, n, 8), (20, n, 28)] {
        tests.push(Long::new(format!("matmul {m} x {k} x {cols}"), k * m.max(cols), move |gpu| {
            let (a, b) = (ones(gpu, &[m, k]), ramp(gpu, &[k]).unsqueeze(1).expand([k, cols]).contiguous());
            equal("plain", &a.matmul(&b), ramp_sum(k));
            equal("transposed", &a.t().contiguous().t().matmul(&b.t().contiguous().t()), ramp_sum(k));
        }));
    }
    tests.push(Long::new(format!("weight gradient over {n} rows"), 8 * n, move |gpu| {
        let w = ones(gpu, &[4, 8]).requires_grad();
        let bias = ones(gpu, &[4]).requires_grad();
        let site = tiebeam::share::Tied::new(&w).shared();
        let epilogue = Epilogue::default().bias(Some(&bias));
        let grads = ones(gpu, &[n, 8]).linear(&site, epilogue).sum_all().backward().unwrap();
        equal("weight", gradient(&grads, &w), n as f64);
        equal("bias", gradient(&grads, &bias), n as f64);
    }));
    tests.push(Long::new(format!("fused sharing over an inner axis of {n}"), 4 * n, move |gpu| {
        let rank = 8;
        let low = LowRank::new(&ones(gpu, &[4, n]), &ones(gpu, &[rank, n]), &ones(gpu, &[4, rank]), 1.0);
        let atoms = Dictionary::new(&ones(gpu, &[rank, 4, n]), &ones(gpu, &[1, rank]));
        let x = ones(gpu, &[2, n]);
        let sites: [(&str, Arc<dyn Site>, usize); 2] =
            [("low rank", Arc::new(low), 1 + rank), ("atoms", atoms.site(0), rank)];
        for (name, site, each) in sites {
            equal(name, &x.linear(&site, Epilogue::default()), (each * n) as f64);
            let bias = ones(gpu, &[4]);
            let with_bias = Epilogue::default().bias(Some(&bias));
            equal(name, &x.linear(&site, with_bias), (each * n) as f64 + 1.0);
        }
    }));
    // Limited to 64 MiB, which every adapter can bind.
    let n = n.min(1 << 18);
    let weights = 64 * n;
    tests.push(Long::new(format!("hashed: {weights} weights from 64 numbers"), weights, move |gpu| {
        let omega = ones(gpu, &[64]).requires_grad();
        let (mapping, seeds) = (Mapping::Stable, [1, 2]);
        let draw = Draw { stored: 64, size: [64, n], offset: 0, layer: 0, scale: 1.0, mapping, seeds };
        let site = Hashed::new(&omega, draw).shared();
        // Each number is read about n times, and its gradient is the sum of the signs.
        let mut want = vec![0f64; 64];
        draw.positions().iter().zip(draw.signs()).for_each(|(&at, sign)| want[at as usize] += sign as f64);
        let grads = ones(gpu, &[1, n]).linear(&site, Epilogue::default()).sum_all().backward().unwrap();
        assert_eq!(download(gradient(&grads, &omega)), want);
    }));
}

fn lookups(n: usize, tests: &mut Vec<Long>) {
    tests.push(Long::new(format!("{n} uses of one row"), 4 * n, move |gpu| {
        for width in [3, 4] {
            let sums =
                ramp(gpu, &[n]).unsqueeze(1).expand([n, width]).contiguous().index_sum(0, &ids(gpu, n), 3);
            let want: Vec<f64> =
                (0..3 * width).map(|i| if i / width == 1 { ramp_sum(n) } else { 0.0 }).collect();
            assert_eq!(download(&sums), want, "index_sum, width {width}");
            let w = ones(gpu, &[3, width]).requires_grad();
            let grads = w.embedding(&ids(gpu, n)).sum_all().backward().unwrap();
            let want: Vec<f64> =
                (0..3 * width).map(|i| if i / width == 1 { n as f64 } else { 0.0 }).collect();
            assert_eq!(download(gradient(&grads, &w)), want, "embedding, width {width}");
        }
        let w = ones(gpu, &[2, 1]).requires_grad();
        let grads = w.gather(0, &ids(gpu, n).reshape([n, 1])).sum_all().backward().unwrap();
        assert_eq!(download(gradient(&grads, &w)), [0.0, n as f64], "gather");
    }));
}

fn windows(side: usize, tests: &mut Vec<Long>) {
    tests.push(Long::new(format!("windows of {side} x {side}"), side * side, move |gpu| {
        let count = (side * side) as f64;
        let x = ones(gpu, &[1, 1, side, side]).requires_grad();
        let w = ones(gpu, &[1, 1, side, side]).requires_grad();
        // x has no gradient, which would take the square of that many products.
        let y = x.detach().conv2d(&w, None, Conv2dConfig::default());
        equal("conv2d", &y.detach(), count);
        let grads = y.sum_all().backward().unwrap();
        equal("conv2d's w", gradient(&grads, &w), 1.0);
        let kernel = [side, side];
        let y = x.avg_pool2d(kernel, [1, 1], [0, 0]);
        equal("avg_pool2d", &y.detach(), 1.0);
        near("avg_pool2d's x", gradient(&y.sum_all().backward().unwrap(), &x), 1.0 / count, 1e-6);
        // One element is the maximum of every window.
        let mut data = vec![0f32; side * side];
        data[side * side - 2] = 7.0;
        let x = Tensor::from_slice(gpu, &data, [1, 1, side, side]).requires_grad();
        let y = x.max_pool2d(kernel, [1, 1], [0, 0]);
        equal("max_pool2d", &y.detach(), 7.0);
        let grads = download(gradient(&y.sum_all().backward().unwrap(), &x));
        assert!(
            grads.iter().enumerate().all(|(i, &g)| g == (i == side * side - 2) as u8 as f64),
            "max_pool2d's x"
        );
    }));
    let n = side * side;
    tests.push(Long::new(format!("conv2d of {n} channels and over {n} positions"), 2 * n, move |gpu| {
        let (x, w) = (ones(gpu, &[1, n, 1, 2]), ramp(gpu, &[1, n, 1, 1]));
        equal("channels", &x.conv2d(&w, None, Conv2dConfig::default()), ramp_sum(n));
        let x = ones(gpu, &[1, 1, 1, 2]).requires_grad();
        let y = x.conv2d(&w.reshape([n, 1, 1, 1]), None, Conv2dConfig::default());
        equal("channels of the gradient", gradient(&y.sum_all().backward().unwrap(), &x), ramp_sum(n));
        let w = ones(gpu, &[1, 1, 1, 1]).requires_grad();
        let y = ones(gpu, &[1, 1, side, side]).conv2d(&w, None, Conv2dConfig::default());
        equal("positions", gradient(&y.sum_all().backward().unwrap(), &w), n as f64);
    }));
}

fn attention(n: usize, tests: &mut Vec<Long>) {
    for (head_dim, group) in [(4, 1), (4, 2), (96, 1)] {
        // As many as every adapter can bind. Wide heads get fewer, and their shared rows take more turns per key.
        let many = 4 * if head_dim > 64 { n.min(1 << 19) / 8 } else { n / group };
        let name = format!("attention over {many}, heads of {head_dim}, {group} to a key head");
        tests.push(Long::new(name, many * head_dim * group, move |gpu| {
            let few = [1, 1, 4, head_dim];
            let q = ones(gpu, &[1, group, many, head_dim]).requires_grad();
            let [k, v] = [(); 2].map(|()| ones(gpu, &few).requires_grad());
            let grads = q.attention(&k, &v, &Mask::None).sum_all().backward().unwrap();
            equal("dv of many queries", gradient(&grads, &v), (group * many) as f64 / 4.0);
            let q = ones(gpu, &[1, group, 3, head_dim]).requires_grad();
            let [k, v] = [(); 2].map(|()| ones(gpu, &[1, 1, many, head_dim]).requires_grad());
            let y = q.attention(&k, &v, &Mask::None);
            near("many keys", &y.detach(), 1.0, 1e-5);
            let grads = y.sum_all().backward().unwrap();
            near("dv of many keys", gradient(&grads, &v), 3.0 * group as f64 / many as f64, 1e-4);
            // One key gets as much weight as all others together, so every key contributes to the gradient of q.
            let scale = 1.0 / (head_dim as f64).sqrt();
            let far = (many as f64).ln() / (scale * head_dim as f64);
            let of = |i: usize| if i / head_dim == many - 1 { 1.0 + far as f32 } else { 1.0 };
            let data: Vec<f32> = (0..many * head_dim).map(of).collect();
            let k = Tensor::from_slice(gpu, &data, [1, 1, many, head_dim]);
            let grads = q.attention(&k, &k, &Mask::None).sum_all().backward().unwrap();
            let share = many as f64 / (2.0 * many as f64 - 1.0);
            // The scale times the covariance of k and v, for every pair of channels.
            let want = scale * head_dim as f64 * share * (1.0 - share) * far * far;
            near("dq of many keys", gradient(&grads, &q), want, 1e-3);
        }));
    }
}

fn geometry(n: usize, tests: &mut Vec<Long>) {
    tests.push(Long::new(format!("a node with {n} edges"), 8 * n, move |gpu| {
        // From every other node to node 0.
        let (from, to): (Vec<u32>, Vec<u32>) = ((1..=n as u32).collect(), vec![0; n]);
        let edges = Edges::new(gpu, n + 1, &from, &to).unwrap();
        let x = Tensor::zeros(gpu, [n + 1, 3]).contiguous().requires_grad();
        let dx = x.edge_vectors(&edges).sum_all().backward().unwrap();
        let dx = download(gradient(&dx, &x));
        assert!(
            dx[..3].iter().all(|&d| d == -(n as f64)) && dx[3..].iter().all(|&d| d == 1.0),
            "edge_vectors"
        );
        // With a table that is 1 everywhere, the result is the sum over the neighbours.
        let table = SplineTable::new(&ones(gpu, &[5, 1, 4]), [0.0, 0.0], [1.0, 1.0]);
        let seen: Vec<f32> = (0..n).flat_map(|_| [0.5, 0.0, 1.0, 0.0]).collect();
        let seen = Tensor::from_slice(gpu, &seen, [n, 1, 4]);
        let h = ones(gpu, &[n + 1, 1, 4]).requires_grad();
        let y = h.table_conv(&seen, &table, &edges);
        near("table_conv", &y.detach().slice(0, 0..1).contiguous(), n as f64, 1e-6);
        // With reversed edges, the gradient is the sum.
        let back = Edges::new(gpu, n + 1, &to, &from).unwrap();
        let grads = h.table_conv(&seen, &table, &back).sum_all().backward().unwrap();
        near("table_conv's h", &gradient(&grads, &h).slice(0, 0..1).contiguous(), n as f64, 1e-6);
    }));
    tests.push(Long::new(format!("fiber_conv over {n} nodes"), 4 * n, move |gpu| {
        let k = ones(gpu, &[1, 1, 4]).requires_grad();
        let y = ones(gpu, &[n, 1, 4]).fiber_conv(&k, None);
        equal("kernel", gradient(&y.sum_all().backward().unwrap(), &k), n as f64);
        let [gain, shift] = [(); 2].map(|()| ones(gpu, &[4]).requires_grad());
        let grads =
            ones(gpu, &[n, 4]).layer_norm(Some(&gain), Some(&shift), 1.0).sum_all().backward().unwrap();
        equal("a norm's shift", gradient(&grads, &shift), n as f64);
        equal("a norm's gain", gradient(&grads, &gain), 0.0);
    }));
}

/// Tests points in a row, and one point so far away that all others share a cell of the search.
fn crowded(count: usize, tests: &mut Vec<Long>) {
    tests.push(Long::new(format!("{count} points in one cell of a search"), 4 * count, move |gpu| {
        let mut positions: Vec<f32> = (0..count).flat_map(|i| [2.0 * i as f32, 0.0, 0.0]).collect();
        positions.extend([1e15, 0.0, 0.0]);
        let sizes = [count + 1];
        let clouds = Clouds { positions: &positions, dimension: 3, sizes: &sizes, cells: &[] };
        let graph = Graph::radius(gpu, &clouds, 3.0, false).unwrap();
        // Each point has its predecessor and its successor as neighbours.
        assert_eq!(graph.edges().len(), 2 * (count - 1));
    }));
}

/// All tests, with walks just above that driver's limit per thread, or far above it.
pub fn all(long: bool) -> Vec<Long> {
    let n = if long { 1 << 20 } else { 70_000 };
    let mut tests = Vec::new();
    reductions(n, &mut tests);
    rows(64_000, 128, &mut tests);
    rows(n.max(270_000), 2, &mut tests);
    products(n, &mut tests);
    lookups(n, &mut tests);
    windows(if long { 1025 } else { 257 }, &mut tests);
    attention(n, &mut tests);
    geometry(n, &mut tests);
    crowded(if long { 61_000 } else { 3_000 }, &mut tests);
    tests
}
