//! The network: lift to orientations, ConvNeXt blocks around the separable convolution, readout of scalars and vectors.

use super::config::PonitaConfig;
use super::conv::{Basis, Conv, Field, FieldConfig, Route, linear};
use crate::error::{Error, Result};
use crate::geometry::space::graph::Graph;
use crate::geometry::space::grid::Grid;
use crate::gpu::Gpu;
use crate::nn::{Activation, Init, Module, Parameters, Visit, VisitMut, module};
use crate::precision::{Precision, autocast};
use crate::rng::Rng;
use crate::store::{File, save_tensors};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

/// One block: `h + s linear2(gelu(linear1(layer_norm(conv(h)))))`. Source of the structure: Liu et al. 2022, "A ConvNet
/// for the 2020s".
#[derive(Clone)]
pub struct PonitaLayer {
    /// The convolution.
    pub conv: Conv,
    /// Gain and bias of the norm, `[channels]`.
    pub norm: [Tensor; 2],
    /// Weight `[widening * channels, channels]` and bias.
    pub linear1: [Tensor; 2],
    /// Weight `[channels, widening * channels]` and bias.
    pub linear2: [Tensor; 2],
    /// `s [channels]`
    pub scale: Option<Tensor>,
    /// Weight `[outputs, channels]` and bias of the readout, if this block has one.
    pub readout: Option<[Tensor; 2]>,
}

impl PonitaLayer {
    /// `h [N, O, C] -> [N, O, C]`
    ///
    /// # Panics
    /// When the shapes do not fit the field.
    #[track_caller]
    pub fn forward(&self, field: &Field, h: &Tensor) -> Tensor {
        let [gain, bias] = &self.norm;
        let y = self.conv.normed(field, h, [gain, bias]);
        // The scale is multiplied into the small matrix, so that the residual can be added by the kernel of its product.
        let [w2, b2] = match &self.scale {
            Some(s) => [self.linear2[0].mul(&s.unsqueeze(1)), self.linear2[1].mul(s)],
            None => self.linear2.clone(),
        };
        let [w1, b1] = &self.linear1;
        if field.is_fused() {
            return y.mlp([w1, b1, &w2, &b2], Some(h));
        }
        let z = linear(&y, w1, Some(b1), Activation::Gelu, None);
        linear(&z, &w2, Some(&b2), Activation::None, Some(h))
    }
}

/// Makes a parameter of this name, shape and fan-in.
pub(in crate::geometry) type Make<'a> = dyn FnMut(&str, &[usize], usize) -> Result<Tensor> + 'a;

/// The inputs of a network besides the graph.
#[derive(Clone, Debug)]
pub struct PonitaInput {
    /// `[nodes, in_scalars]`
    pub scalars: Option<Tensor>,
    /// `[nodes, in_vectors, D]`
    pub vectors: Option<Tensor>,
}

impl PonitaInput {
    /// Scalars alone, `[nodes, in_scalars]`.
    pub fn scalars(scalars: &Tensor) -> PonitaInput {
        PonitaInput { scalars: Some(scalars.clone()), vectors: None }
    }
}

/// The outputs of a network, per node or, if it pools, per graph.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PonitaOutput {
    /// `[nodes or graphs, out_scalars]`
    pub scalars: Tensor,
    /// `[nodes or graphs, out_vectors, D]`
    pub vectors: Tensor,
}

/// A network on positions and orientations. Source: Bekkers et al. 2024, arXiv 2310.02970.
///
/// Exactly equivariant (to f32 rounding) under translations, permutations and the motions that permute its [`Grid`].
/// Under other rotations and reflections it is approximately equivariant, with an error that falls with the number of
/// orientations. It cannot tell mirror images apart.
///
/// ```
/// use tiebeam::geometry::{Graph, Grid, Ponita, PonitaConfig, PonitaInput};
/// use tiebeam::{Gpu, Rng, Tensor};
///
/// let gpu = Gpu::open()?;
/// let config = PonitaConfig::default().channels(8).hidden(8).basis(8).layers(2);
/// let net = Ponita::new(&gpu, config, Grid::icosahedron(), &mut Rng::new(1))?;
/// let positions = [0.0f32, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0];
/// let graph = Graph::full(&gpu, &positions, 3, &[3], true)?;
/// let input = PonitaInput::scalars(&Tensor::ones(&gpu, [3, 1]));
/// let energy = net.forward(&graph, &input).scalars.item()?;
/// assert!(energy.is_finite());
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Ponita {
    /// Sizes and choices.
    pub config: PonitaConfig,
    /// The orientations.
    pub grid: Grid,
    /// The basis of the spatial kernels.
    pub basis: Basis,
    /// The basis of the fiber kernels, if there are orientations.
    pub fiber_basis: Option<Basis>,
    /// `[channels, in_scalars + in_vectors]`
    pub embed: Tensor,
    /// The blocks.
    pub layers: Vec<PonitaLayer>,
    /// How the convolutions are computed.
    pub route: Route,
}

impl Ponita {
    /// Makes a network. Weights and biases are uniform in `+-1/sqrt(fan in)`, norms start as the identity, biases of
    /// convolutions at 0, and scales at the configured value. Calibrate it on a first batch: see [`Ponita::calibrate`].
    ///
    /// # Errors
    /// As [`PonitaConfig::check`].
    pub fn new(gpu: &Gpu, config: PonitaConfig, grid: Grid, rng: &mut Rng) -> Result<Ponita> {
        let scale = config.layer_scale.unwrap_or(1.0);
        let mut make = |name: &str, shape: &[usize], fan: usize| {
            let of = |value: f32| Ok(Tensor::from_slice(gpu, &vec![value; shape.iter().product()], shape));
            match name.rsplit('.').next() {
                Some("layer_scale") => of(scale),
                _ if name.ends_with("norm.weight") => of(1.0),
                _ if fan == 0 => of(0.0),
                _ => Ok(Init::Uniform(1.0 / (fan as f32).sqrt()).leaf(gpu, shape, rng)),
            }
        };
        Ponita::build(config, grid, &mut make)
    }

    /// Builds a network from named tensors. `make` gets the name, shape and fan-in of each.
    pub(in crate::geometry) fn build(config: PonitaConfig, grid: Grid, make: &mut Make) -> Result<Ponita> {
        config.check(grid.is_oriented())?;
        let mut all = BTreeMap::new();
        for (name, shape, fan) in config.parameters(grid.is_oriented()) {
            let tensor = make(&name, &shape, fan)?.requires_grad();
            all.insert(name, tensor);
        }
        let oriented = grid.is_oriented();
        let mut take =
            |name: String| all.remove(&name).ok_or_else(|| Error::config(format!("ponita: no `{name}`")));
        let basis = |name: &str, take: &mut dyn FnMut(String) -> Result<Tensor>| {
            let mut part = |part: &str| take(format!("{name}.{part}"));
            Ok::<Basis, Error>(Basis { w1: part("w1")?, b1: part("b1")?, w2: part("w2")?, b2: part("b2")? })
        };
        let spatial = basis("basis", &mut take)?;
        let fiber_basis = oriented.then(|| basis("fiber_basis", &mut take)).transpose()?;
        let embed = take("embed.weight".into())?;
        let mut layers = Vec::with_capacity(config.layers);
        for l in 0..config.layers {
            let mut part = |name: &str| take(format!("layer{l}.{name}"));
            let conv = Conv {
                kernel: part("conv.kernel")?,
                fiber_kernel: oriented.then(|| part("conv.fiber_kernel")).transpose()?,
                bias: part("conv.bias")?,
                tables: None,
            };
            let mut pair = |name: &str| {
                Ok::<_, Error>([part(&format!("{name}.weight"))?, part(&format!("{name}.bias"))?])
            };
            let (norm, linear1, linear2) = (pair("norm")?, pair("linear1")?, pair("linear2")?);
            let scale = config.layer_scale.is_some().then(|| part("layer_scale")).transpose()?;
            let read = config.every_readout || l + 1 == config.layers;
            let mut out = |name: &str| take(format!("readout{l}.{name}"));
            let readout = read.then(|| Ok::<_, Error>([out("weight")?, out("bias")?])).transpose()?;
            layers.push(PonitaLayer { conv, norm, linear1, linear2, scale, readout });
        }
        Ok(Ponita { config, grid, basis: spatial, fiber_basis, embed, layers, route: Route::default() })
    }

    /// Returns the same network with `f` applied to every parameter.
    pub(in crate::geometry) fn mapped(&self, f: &dyn Fn(&Tensor) -> Tensor) -> Ponita {
        let basis = |b: &Basis| Basis { w1: f(&b.w1), b1: f(&b.b1), w2: f(&b.w2), b2: f(&b.b2) };
        let pair = |p: &[Tensor; 2]| [f(&p[0]), f(&p[1])];
        let layer = |l: &PonitaLayer| PonitaLayer {
            conv: Conv {
                kernel: f(&l.conv.kernel),
                fiber_kernel: l.conv.fiber_kernel.as_ref().map(f),
                bias: f(&l.conv.bias),
                tables: l.conv.tables.clone(),
            },
            norm: pair(&l.norm),
            linear1: pair(&l.linear1),
            linear2: pair(&l.linear2),
            scale: l.scale.as_ref().map(f),
            readout: l.readout.as_ref().map(pair),
        };
        Ponita {
            config: self.config.clone(),
            grid: self.grid.clone(),
            basis: basis(&self.basis),
            fiber_basis: self.fiber_basis.as_ref().map(basis),
            embed: f(&self.embed),
            layers: self.layers.iter().map(layer).collect(),
            route: self.route,
        }
    }

    /// Computes what all layers share on a graph.
    ///
    /// # Panics
    /// When the graph's dimension is not the grid's.
    #[track_caller]
    pub fn field(&self, graph: &Graph) -> Field {
        let PonitaConfig { degree, radius, .. } = self.config;
        let config = FieldConfig { degree, radius, layers: self.layers.len(), route: self.route };
        // Invariants are in f32, whatever the scope, and so are the bases that are computed from them once.
        let fiber = self.fiber_basis.as_ref();
        autocast(Precision::F32, || Field::new(graph, &self.grid, &self.basis, fiber, config))
    }

    /// Embeds scalars, the same on every orientation, and vectors as `v . o_a`: `[nodes, O, channels]`.
    ///
    /// # Panics
    /// When the inputs do not fit the graph and the configuration.
    #[track_caller]
    pub fn lift(&self, graph: &Graph, input: &PonitaInput) -> Tensor {
        let (nodes, count) = (graph.nodes(), self.grid.len());
        let mut parts = Vec::new();
        let (scalars, vectors) = (self.config.in_scalars, self.config.in_vectors);
        for (name, x, shape) in [
            ("scalars", &input.scalars, vec![nodes, scalars]),
            ("vectors", &input.vectors, vec![nodes, vectors, self.grid.dimension()]),
        ] {
            let Some(x) = x else {
                assert!(shape[1] == 0, "ponita: {name} {shape:?} are needed");
                continue;
            };
            assert!(x.shape()[..] == shape, "ponita: {name} {}, needed {shape:?}", x.shape());
            if shape[1] > 0 {
                parts.push(match name {
                    "scalars" => x.unsqueeze(1).expand([nodes, count, scalars]),
                    // Directions are in f32, whatever the scope.
                    _ => autocast(Precision::F32, || {
                        x.matmul(&self.grid.tensor(graph.gpu()).t()).transpose(1, 2)
                    }),
                });
            }
        }
        let x = Tensor::concat(&parts.iter().collect::<Vec<_>>(), 2);
        linear(&x, &self.embed, None, Activation::None, None)
    }

    /// Returns the features after the lift and after each block, `[nodes, O, channels]` each.
    ///
    /// # Panics
    /// As [`Ponita::forward`].
    #[track_caller]
    pub fn hidden(&self, graph: &Graph, input: &PonitaInput) -> Vec<Tensor> {
        let field = self.field(graph);
        let mut all = vec![self.lift(graph, input)];
        for layer in &self.layers {
            all.push(layer.forward(&field, &all[all.len() - 1]));
        }
        all
    }

    /// Returns the mean of the blocks' readouts, `[nodes, O, out_scalars + out_vectors]`, from the features of
    /// [`Ponita::hidden`].
    ///
    /// # Panics
    /// When `hidden` does not have one array for the lift and one for each block.
    #[track_caller]
    pub fn readout(&self, hidden: &[Tensor]) -> Tensor {
        assert!(
            hidden.len() == self.layers.len() + 1,
            "ponita: {} features for {} blocks",
            hidden.len(),
            self.layers.len()
        );
        let read = |(layer, h): (&PonitaLayer, &Tensor)| {
            layer.readout.as_ref().map(|[w, b]| linear(h, w, Some(b), Activation::None, None))
        };
        let all: Vec<Tensor> = self.layers.iter().zip(&hidden[1..]).filter_map(read).collect();
        let sum = all[1..].iter().fold(all[0].clone(), |sum, r| sum.add(r));
        if all.len() == 1 { sum } else { sum.scale(1.0 / all.len() as f32) }
    }

    /// Returns the scalars and vectors of each node, before any pooling.
    ///
    /// # Panics
    /// As [`Ponita::forward`].
    #[track_caller]
    pub fn per_node(&self, graph: &Graph, input: &PonitaInput) -> PonitaOutput {
        let read = self.readout(&self.hidden(graph, input));
        let (s, v) = (self.config.out_scalars, self.config.out_vectors);
        let (nodes, count, dimension) = (graph.nodes(), self.grid.len(), self.grid.dimension());
        let scalars = read.slice(2, 0..s).mean(1);
        let vectors = match v {
            0 => Tensor::zeros(graph.gpu(), [nodes, 0, dimension]),
            _ => {
                let r = read.slice(2, s..s + v).transpose(1, 2);
                let sum = autocast(Precision::F32, || r.matmul(&self.grid.tensor(graph.gpu())));
                sum.scale(1.0 / count as f32)
            }
        };
        PonitaOutput { scalars, vectors }
    }

    /// Returns the network's outputs: `scalar = mean over a of r_a`, `vector = 1/O sum_a r_a o_a`, summed over the nodes
    /// of each graph if the configuration pools.
    ///
    /// # Panics
    /// When inputs do not fit: scalars must be `[nodes, in_scalars]`, vectors `[nodes, in_vectors, D]`, and positions of
    /// the grid's dimension.
    #[track_caller]
    pub fn forward(&self, graph: &Graph, input: &PonitaInput) -> PonitaOutput {
        let each = self.per_node(graph, input);
        if !self.config.pool {
            return each;
        }
        PonitaOutput { scalars: graph.pool(&each.scalars), vectors: graph.pool(&each.vectors) }
    }

    /// Scales the kernels of every layer, first to last, so that each convolution preserves the standard deviation of its
    /// input on this batch. Call it once, on a first batch of training data, before making an optimizer, because the
    /// kernels become new leaves.
    ///
    /// # Errors
    /// As [`Conv::calibrate`]. Nothing changes then.
    ///
    /// # Panics
    /// As [`Ponita::forward`].
    #[track_caller]
    pub fn calibrate(&mut self, graph: &Graph, input: &PonitaInput) -> Result<()> {
        let layers = crate::no_grad(|| {
            let (field, mut h) = (self.field(graph), self.lift(graph, input));
            let mut layers = self.layers.clone();
            for layer in &mut layers {
                layer.conv.calibrate(&field, &h)?;
                h = layer.forward(&field, &h);
            }
            Ok::<_, Error>(layers)
        })?;
        self.layers = layers;
        Ok(())
    }

    /// Writes parameters and grid to a safetensors file with the configuration in its metadata.
    ///
    /// # Errors
    /// When the file cannot be written. An older file is then unchanged.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_with(path, [])
    }

    /// [`Ponita::save`] with additional metadata.
    pub(in crate::geometry) fn save_with(
        &self,
        path: impl AsRef<Path>,
        more: impl IntoIterator<Item = (String, String)>,
    ) -> Result<()> {
        let all = Parameters::of(self);
        let grid = self.grid.tensor(self.embed.gpu());
        let tensors = all.named().iter().map(|(n, t)| (n.as_str(), t)).chain([(GRID, &grid)]);
        let metadata = more.into_iter().chain([(CONFIG.to_string(), self.config.to_json())]).collect();
        save_tensors(path, tensors, &metadata)
    }

    /// Reads a file that [`Ponita::save`] wrote.
    ///
    /// # Errors
    /// When the file cannot be read or does not hold a network: a setting, the grid or a tensor is missing, a tensor has
    /// another shape or is not finite, or a tensor does not belong to the network.
    pub fn load(gpu: &Gpu, path: impl AsRef<Path>) -> Result<Ponita> {
        let file = File::open(path)?;
        let wrong = |message: String| Error::format(file.path(), message);
        let text = file.metadata().get(CONFIG);
        let text = text.ok_or_else(|| wrong(format!("no network: the metadata has no `{CONFIG}`")))?;
        let config = PonitaConfig::from_json(text).map_err(|e| wrong(e.to_string()))?;
        let dimension = file.info(GRID)?.shape.last().copied().unwrap_or(0);
        let grid = Grid::from_vectors(&file.tensor_f32(GRID)?, dimension)
            .ok_or_else(|| wrong(format!("`{GRID}` has no unit vectors in 2 or 3 dimensions")))?;
        let net = Ponita::build(config, grid, &mut |name, shape, _| {
            file.expect(name, shape)?;
            let data = file.tensor_f32(name)?;
            if data.iter().any(|x| !x.is_finite()) {
                return Err(wrong(format!("tensor `{name}` has elements that are not finite")));
            }
            Ok(Tensor::from_slice(gpu, &data, shape))
        })
        .map_err(|e| if let Error::Config { message, .. } = e { wrong(message) } else { e })?;
        let known = Parameters::of(&net);
        let known = |name: &str| name == GRID || known.named().iter().any(|(n, _)| n == name);
        match file.names().find(|name| !known(name)) {
            Some(name) => Err(wrong(format!("tensor `{name}` is none of this network's"))),
            None => Ok(net),
        }
    }
}

const CONFIG: &str = "config";
const GRID: &str = "grid";

module!(Basis { w1, b1, w2, b2 });

module!(Conv { kernel, fiber_kernel, bias, tables: _ });

impl Module for Ponita {
    fn visit(&self, visit: &mut Visit) {
        visit.field("embed.weight", &self.embed);
        visit.field("basis", &self.basis);
        visit.field("fiber_basis", &self.fiber_basis);
        for (l, layer) in self.layers.iter().enumerate() {
            visit.field(&format!("layer{l}"), layer);
        }
        for (l, layer) in self.layers.iter().enumerate() {
            if let Some(readout) = &layer.readout {
                affine(visit, &format!("readout{l}"), readout);
            }
        }
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.embed);
        visit.field(&mut self.basis);
        visit.field(&mut self.fiber_basis);
        visit.field(&mut self.layers);
    }
}

/// Everything but the readouts, which are named by the network.
impl Module for PonitaLayer {
    fn visit(&self, visit: &mut Visit) {
        visit.field("conv", &self.conv);
        for (name, both) in [("norm", &self.norm), ("linear1", &self.linear1), ("linear2", &self.linear2)] {
            affine(visit, name, both);
        }
        visit.field("layer_scale", &self.scale);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.conv);
        visit.field(&mut self.norm);
        visit.field(&mut self.linear1);
        visit.field(&mut self.linear2);
        visit.field(&mut self.scale);
        visit.field(&mut self.readout);
    }
}

fn affine(visit: &mut Visit, name: &str, [weight, bias]: &[Tensor; 2]) {
    visit.field(&format!("{name}.weight"), weight);
    visit.field(&format!("{name}.bias"), bias);
}
