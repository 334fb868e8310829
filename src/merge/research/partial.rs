//! PLeaS from end to end: two networks are matched, pairs of units that agree are merged and others kept apart, and every layer is
//! fitted to both networks' outputs by least squares in which the zeros between what is kept apart stay zeros.
//!
//! Source: Nasery et al., arXiv 2407.02447, with a closed form in the place of its steps of Adam.

use super::pleas::{Split, flops_factor, merge_bias, targets};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::linalg::solve_positive;
use crate::merge::Weights;
use crate::merge::align::activations::Similarity;
use crate::merge::align::matching::{MatchOptions, group_costs, match_weights};
use crate::merge::align::networks::{match_activations, rows_of, shown};
use crate::merge::align::permutation::Permutation;
use crate::merge::align::repair::reset_statistics;
use crate::merge::align::spec::{GroupKind, Spec};
use crate::models::network::{Conv, Network, Seen, Step};
use crate::setters::setters;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// Settings of [`merge_networks`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct PleasOptions {
    /// The share of all pairs of units that is kept apart.
    pub ratio: f64,
    /// How strongly a layer is held to the merged weights, relative to the mean square of its inputs.
    pub ridge: f64,
    /// Whether each network keeps its own outputs, one behind the other, as for tasks with classes of their own.
    pub separate_heads: bool,
    /// Whether units are matched by activations, and not by weights.
    pub by_activations: bool,
}

setters!(PleasOptions { ratio: f64, ridge: f64, separate_heads: bool, by_activations: bool });

impl Default for PleasOptions {
    /// Everything is merged, by weights, with one head and a ridge of 1e-3.
    fn default() -> PleasOptions {
        PleasOptions { ratio: 0.0, ridge: 1e-3, separate_heads: false, by_activations: false }
    }
}

/// A network that is partly two.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Partly {
    /// Its tensors.
    pub weights: BTreeMap<String, Tensor>,
    /// Its steps: those of the two, but for depthwise convolutions, which have more groups.
    pub network: Network,
    /// What was merged of each group of units, by its name.
    pub splits: BTreeMap<String, Split>,
    /// Its cost relative to one network's, by [`flops_factor`] over all layers.
    pub flops: f64,
}

/// Merges two networks of the same steps. `inputs` are those of both networks' tasks, without labels. `on` is told how many of these rows
/// are done of how many.
///
/// # Errors
/// When the networks and inputs do not fit, or the device fails; what `on` returns.
pub fn merge_networks(
    gpu: &Gpu,
    network: &Network,
    [a, b]: [&dyn Weights; 2],
    inputs: &Tensor,
    options: &PleasOptions,
    on: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Partly> {
    let is_ridge = options.ridge > 0.0 && options.ridge.is_finite();
    if !(0.0..=1.0).contains(&options.ratio) || !is_ridge {
        return Err(Error::config(format!(
            "pleas: a ratio of {} must be in [0, 1], and a ridge of {} above 0",
            options.ratio, options.ridge
        )));
    }
    let spec = Spec::network(a, network)?;
    let (permutation, agreement) = match options.by_activations {
        true => {
            let found = match_activations(gpu, network, &spec, [a, b], inputs, Similarity::InnerProduct, on)?;
            (found.permutation, Some(found.agreement))
        }
        false => (match_weights(gpu, &spec, a, b, &MatchOptions::default())?.permutation, None),
    };
    let moved = permutation.permuted(b);
    let mut job = Merger { gpu, network, a, b: &moved, spec: &spec, splits: BTreeMap::new(), options };
    job.split(agreement)?;
    let mut weights = job.merged()?;
    let network = job.widened();
    job.fit(&mut weights, inputs, on)?;
    let norms = network.batch_norms();
    if !norms.is_empty() {
        weights = reset_statistics(gpu, &weights, &norms, &mut |weights, norm| {
            shown(gpu, &network, weights, inputs, norm, false)
        })?;
    }
    let flops = job.flops()?;
    Ok(Partly { weights, network, splits: job.splits, flops })
}

/// Rows whose activations are held at a time.
const ROWS: usize = 256;

/// Numbers of Gram matrices that are held at a time: 256 MiB in f64.
const SUMS: usize = 32 << 20;

struct Merger<'a> {
    gpu: &'a Gpu,
    network: &'a Network,
    a: &'a dyn Weights,
    /// The second network, aligned to the first.
    b: &'a dyn Weights,
    spec: &'a Spec,
    splits: BTreeMap<String, Split>,
    options: &'a PleasOptions,
}

/// The sums of which a layer's least squares are made.
struct Normal {
    /// `Z^T Z`, with a last row and column for the bias if there is one.
    gram: Vec<f64>,
    /// `Z^T (Y - Z W0^T - b0)`
    cross: Vec<f64>,
    /// Inputs of the layer, with one for the bias.
    columns: usize,
    /// Outputs of the layer.
    rows: usize,
}

impl Merger<'_> {
    /// Chooses which pairs of each group are merged, by the costs of the matching that was made.
    fn split(&mut self, by_activations: Option<BTreeMap<String, Vec<f64>>>) -> Result<()> {
        let identity = Permutation::identity(self.spec, self.a)?;
        let mut agreements = Vec::new();
        for group in &self.spec.groups {
            if let Some(known) = by_activations.as_ref().and_then(|all| all.get(&group.name)) {
                agreements.push(known.clone());
                continue;
            }
            let costs = group_costs(self.gpu, [self.a, self.b], &identity, &group.name)?;
            let matrix = &costs.matrices[0].1;
            let n = (matrix.len() as f64).sqrt().round() as usize;
            agreements.push((0..n).map(|i| f64::from(matrix[i * (n + 1)])).collect::<Vec<f64>>());
        }
        let splits = Split::within(&agreements, self.options.ratio);
        self.splits = self.spec.groups.iter().map(|group| group.name.clone()).zip(splits).collect();
        Ok(())
    }

    /// The split of an axis of a tensor.
    fn split_of(&self, tensor: &str, axis: usize, size: usize) -> Split {
        for group in &self.spec.groups {
            let GroupKind::Units(axes) = &group.kind else { continue };
            let found = axes.iter().find(|own| own.tensor == tensor && own.axis == axis);
            if let Some(own) = found {
                return self.splits[&group.name].repeated(own.repeat);
            }
        }
        let is_head = |layer: &str| tensor.rsplit_once('.').is_some_and(|(name, _)| name == layer);
        let head = self.network.layers().last().is_some_and(|layer| is_head(layer));
        match self.options.separate_heads && head && axis == 0 {
            true => Split { merged: Vec::new(), apart: (0..size as u32).collect() },
            false => Split::whole(size),
        }
    }

    /// The tensors before they are fitted.
    fn merged(&self) -> Result<BTreeMap<String, Tensor>> {
        let one = |name: String| {
            let [a, b] = [self.a.read(self.gpu, &name)?, self.b.read(self.gpu, &name)?];
            if a.shape() != b.shape() {
                let message =
                    format!("`{name}` is {} in one model and {} in the other", a.shape(), b.shape());
                return Err(Error::config(message));
            }
            let shape = *a.shape();
            let out = self.split_of(&name, 0, shape.first().copied().unwrap_or(1));
            let is_depthwise = shape.len() > 2 && shape[1] == 1 && self.is_grouped(&name);
            let merged = match shape.len() {
                0 => a.add(&b).scale(0.5),
                1 => merge_bias(&a, &b, &out),
                _ if is_depthwise => {
                    let [a, b] = [&a, &b].map(|x| x.reshape([shape[0], x.count() / shape[0]]));
                    let merged = targets(&a.t(), &b.t(), &out).t().contiguous();
                    merged.reshape(&[&[out.width()], &shape[1..]].concat()[..])
                }
                _ => {
                    let inner = self.split_of(&name, 1, shape[1]);
                    let rest: usize = shape[2..].iter().product();
                    // The positions of a convolution's window move with their channel.
                    let inner = inner.repeated(rest);
                    let [a, b] = [&a, &b].map(|x| x.reshape([shape[0], shape[1] * rest]));
                    let merged = super::pleas::merge_layer(&a, &b, &out, &inner);
                    let sizes = [&[out.width(), inner.width() / rest.max(1)], &shape[2..]].concat();
                    merged.reshape(&sizes[..])
                }
            };
            let merged = merged.contiguous();
            merged.evaluate();
            Ok((name, merged))
        };
        no_grad(|| self.a.float_names().into_iter().map(one).collect())
    }

    /// Whether a tensor is the weight of a depthwise convolution.
    fn is_grouped(&self, tensor: &str) -> bool {
        let mut found = false;
        self.network.each(&mut |step| {
            if let Step::Conv(Conv { name, groups, .. }) = step {
                found |= *groups > 1 && tensor == format!("{name}.weight");
            }
        });
        found
    }

    /// The steps with as many groups in depthwise convolutions as they now have channels.
    fn widened(&self) -> Network {
        self.network.changed(&mut |step| {
            if let Step::Conv(conv) = step
                && conv.groups > 1
            {
                conv.groups = self.split_of(&format!("{}.weight", conv.name), 0, conv.groups).width();
            }
        })
    }

    /// Fits all layers with a full matrix to what both networks compute on the inputs.
    fn fit(
        &self,
        weights: &mut BTreeMap<String, Tensor>,
        inputs: &Tensor,
        on: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<()> {
        let rows = inputs.shape().first().copied().unwrap_or(0);
        let at_once = self.network.rows_at_once(self.gpu, self.a, inputs.shape(), true)?.min(ROWS);
        let groups = self.groups()?;
        for (g, group) in groups.iter().enumerate() {
            let mut sums: BTreeMap<String, Normal> = BTreeMap::new();
            for first in (0..rows).step_by(at_once) {
                let end = (first + at_once).min(rows);
                let x = inputs.slice(0, first..end);
                let [of_a, of_b] = [self.layers(self.a, &x, group)?, self.layers(self.b, &x, group)?];
                for (a, b) in of_a.iter().zip(&of_b) {
                    self.add(a, b, weights, &mut sums)?;
                }
                on(g * rows + end, groups.len() * rows)?;
            }
            for (layer, normal) in sums {
                self.solve(&layer, &normal, weights)?;
            }
        }
        Ok(())
    }

    /// The layers in groups whose sums fit into memory together. The networks run once for each group.
    fn groups(&self) -> Result<Vec<Vec<&str>>> {
        let (mut groups, mut size) = (vec![Vec::new()], 0);
        for layer in self.network.layers() {
            let [_, inner] = self.splits(layer)?;
            let own = inner.width() * inner.width();
            if size > 0 && size + own > SUMS {
                groups.push(Vec::new());
                size = 0;
            }
            size += own;
            groups.last_mut().expect("there is one").push(layer);
        }
        Ok(groups)
    }

    /// What each layer of a group with a full matrix gets and gives: its name, `[rows, inputs]` and `[rows, outputs]`.
    fn layers(
        &self,
        weights: &dyn Weights,
        x: &Tensor,
        group: &[&str],
    ) -> Result<Vec<(String, Tensor, Tensor)>> {
        let mut all = Vec::new();
        no_grad(|| {
            self.network.run(self.gpu, weights, x, &mut |seen| {
                if let Seen::Layer { step, name, input, output } = seen
                    && group.contains(&name)
                {
                    match step {
                        Step::Linear(_) => all.push((name.to_string(), rows_of(input), rows_of(output))),
                        Step::Conv(conv) if conv.groups == 1 => {
                            let size = weights.shape(&format!("{name}.weight")).unwrap_or_default();
                            if let [_, _, high, wide] = size[..] {
                                let patches = patches(input, [high, wide], conv);
                                all.push((name.to_string(), patches, rows_of(output)));
                            }
                        }
                        _ => {}
                    }
                }
                None
            })
        })
        .map(drop)?;
        Ok(all)
    }

    /// Splits of a layer's outputs and of its flat inputs.
    fn splits(&self, layer: &str) -> Result<[Split; 2]> {
        let name = format!("{layer}.weight");
        let shape = self.a.shape(&name)?;
        let rest: usize = shape[2..].iter().product();
        Ok([self.split_of(&name, 0, shape[0]), self.split_of(&name, 1, shape[1]).repeated(rest)])
    }

    fn add(
        &self,
        (layer, za, ya): &(String, Tensor, Tensor),
        (_, zb, yb): &(String, Tensor, Tensor),
        weights: &BTreeMap<String, Tensor>,
        sums: &mut BTreeMap<String, Normal>,
    ) -> Result<()> {
        let [out, inner] = self.splits(layer)?;
        let (z, y) = (targets(za, zb, &inner), targets(ya, yb, &out));
        let weight = &weights[&format!("{layer}.weight")];
        let flat = weight.reshape([out.width(), inner.width()]);
        let bias = weights.get(&format!("{layer}.bias"));
        let mut rest = y.sub(&z.matmul_f32(&flat.t()));
        let mut z = z;
        if let Some(bias) = bias {
            rest = rest.sub(bias);
            z = Tensor::concat(&[&z, &Tensor::ones(self.gpu, [z.shape()[0], 1])], 1);
        }
        let columns = z.shape()[1];
        let gram = z.t().matmul_f32(&z).to_vec::<f32>()?;
        let cross = z.t().matmul_f32(&rest).to_vec::<f32>()?;
        let normal = sums.entry(layer.clone()).or_insert_with(|| Normal {
            gram: vec![0.0; gram.len()],
            cross: vec![0.0; cross.len()],
            columns,
            rows: out.width(),
        });
        normal.gram.iter_mut().zip(gram).for_each(|(sum, x)| *sum += f64::from(x));
        normal.cross.iter_mut().zip(cross).for_each(|(sum, x)| *sum += f64::from(x));
        Ok(())
    }

    /// Solves a layer's least squares, for each kind of rows over the columns that they may read.
    fn solve(&self, layer: &str, normal: &Normal, weights: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let [out, inner] = self.splits(layer)?;
        let [n, rows] = [inner.width(), normal.rows];
        let [merged, apart] = [inner.merged.len(), inner.apart.len()];
        let (all, own) = (0..n, [merged..merged + apart, merged + apart..n]);
        let first = out.merged.len();
        let kinds = [
            (0..first, all.collect::<Vec<_>>()),
            (first..first + out.apart.len(), (0..merged).chain(own[0].clone()).collect()),
            (first + out.apart.len()..rows, (0..merged).chain(own[1].clone()).collect()),
        ];
        let mean = (0..n).map(|i| normal.gram[i * (normal.columns + 1)]).sum::<f64>() / n.max(1) as f64;
        let ridge = self.options.ridge * mean.max(f64::MIN_POSITIVE);
        let [name, bias_name] = ["weight", "bias"].map(|part| format!("{layer}.{part}"));
        let mut values = weights[&name].to_vec::<f32>()?;
        let mut bias = weights.get(&bias_name).map(Tensor::to_vec::<f32>).transpose()?;
        for (rows_of_kind, mut columns) in kinds {
            if rows_of_kind.is_empty() || columns.is_empty() {
                continue;
            }
            if bias.is_some() {
                columns.push(n);
            }
            let m = columns.len();
            let mut gram: Vec<f64> = columns
                .iter()
                .flat_map(|&i| columns.iter().map(move |&j| (i, j)))
                .map(|(i, j)| normal.gram[i * normal.columns + j])
                .collect();
            gram.iter_mut().step_by(m + 1).for_each(|diagonal| *diagonal += ridge);
            let right: Vec<f64> = columns
                .iter()
                .flat_map(|&i| rows_of_kind.clone().map(move |row| normal.cross[i * rows + row]))
                .collect();
            let step = solve_positive(&gram, m, &right, rows_of_kind.len()).ok_or_else(|| {
                Error::config(format!(
                    "pleas: the inputs of `{layer}` do not determine it; use a larger ridge"
                ))
            })?;
            for (c, &column) in columns.iter().enumerate() {
                for (r, row) in rows_of_kind.clone().enumerate() {
                    let change = step[c * rows_of_kind.len() + r] as f32;
                    match (&mut bias, column == n) {
                        (Some(bias), true) => bias[row] += change,
                        _ => values[row * n + column] += change,
                    }
                }
            }
        }
        let shape = *weights[&name].shape();
        weights.insert(name, Tensor::from_slice(self.gpu, &values, shape));
        if let Some(bias) = bias {
            weights.insert(bias_name, Tensor::from_slice(self.gpu, &bias, [bias.len()]));
        }
        Ok(())
    }

    /// The cost of all layers relative to one network's, by their numbers of weights.
    fn flops(&self) -> Result<f64> {
        let (mut own, mut all) = (0.0, 0.0);
        for layer in self.network.layers() {
            let size = self.a.shape(&format!("{layer}.weight"))?.iter().product::<usize>() as f64;
            let [out, inner] = self.splits(layer)?;
            own += size;
            all += size * flops_factor(&out, &inner);
        }
        Ok(all / own)
    }
}

/// The windows of a convolution as rows, `[rows of all images, channels * high * wide]`.
fn patches(x: &Tensor, [high, wide]: [usize; 2], conv: &Conv) -> Tensor {
    let x = x.pad(2, conv.padding, conv.padding).pad(3, conv.padding, conv.padding);
    let &[n, channels, height, width] = &x.shape()[..] else { return x };
    let [rows, columns] = [(height, high), (width, wide)].map(|(all, k)| (all - k) / conv.stride + 1);
    let mut parts = Vec::with_capacity(high * wide);
    for dy in 0..high {
        for dx in 0..wide {
            let last = |first: usize, count: usize| first + (count - 1) * conv.stride + 1;
            let part = x.slice_step(2, dy..last(dy, rows), conv.stride);
            parts.push(part.slice_step(3, dx..last(dx, columns), conv.stride).contiguous());
        }
    }
    let stacked = Tensor::stack(&parts.iter().collect::<Vec<_>>(), 2);
    let last = stacked.permute([0, 3, 4, 1, 2]);
    last.reshape([n * rows * columns, channels * high * wide])
}
