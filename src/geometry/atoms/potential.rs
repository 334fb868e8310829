//! An interatomic potential: a network, the species that it knows, and the units of its training data.

use super::elements::symbol;
use super::xyz::Frame;
use crate::error::{Error, Result};
use crate::geometry::network::ponita::{Ponita, PonitaInput};
use crate::geometry::space::graph::Graph;
use crate::geometry::space::grid::Grid;
use crate::geometry::space::neighbours::Clouds;
use crate::geometry::{Cell, PonitaConfig};
use crate::gpu::Gpu;
use crate::linalg::solve_positive;
use crate::rng::Rng;
use crate::store::File;
use crate::tensor::Tensor;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::path::Path;

/// `E = sum_i (reference[z_i] + scale e_i)`, where `e_i` is the network's output scalar of atom i. The network's inputs
/// are one-hot species.
///
/// Units are those of the frames from which it was made: eV and angstrom for extended XYZ.
#[derive(Clone)]
pub struct Potential {
    /// The network.
    pub net: Ponita,
    /// Atomic numbers, in the order of the network's input scalars.
    pub species: Vec<u8>,
    /// The energy of one atom of each species. In f64, because energies are large and their differences small.
    pub reference: Vec<f64>,
    /// The factor of the network's energies: the root mean square of the force components from which the potential was
    /// made.
    pub scale: f64,
    /// The shortest distance of two atoms, or of an atom and a periodic image, in the frames from which the potential was made. It
    /// knows nothing of atoms that are nearer. `None` if no frame had two, and in files of older versions.
    pub nearest: Option<f64>,
}

/// Frames as inputs of a network, with their energies and forces as targets in the network's units.
pub struct Batch {
    /// The atoms of all frames.
    pub graph: Graph,
    /// The species of the atoms.
    pub input: PonitaInput,
    /// `[graphs]`: target energies.
    pub energies: Tensor,
    /// `[nodes, 3]`: target forces.
    pub forces: Tensor,
}

/// A batch's loss, in the network's units.
#[non_exhaustive]
pub struct PotentialLoss {
    /// A scalar with the gradient of the loss. Its value is not that of the loss.
    pub objective: Tensor,
    /// `[graphs]`: predicted minus target energies.
    pub energy_errors: Tensor,
    /// `[nodes, 3]`: predicted minus target forces.
    pub force_errors: Tensor,
}

impl Potential {
    /// Makes a new network for the species, energies and forces of these frames. Reference energies are fitted by least
    /// squares. The numbers of inputs and outputs in `config` are overwritten.
    ///
    /// # Errors
    /// When a frame has no energy or no forces, two atoms of a frame are at one point, there is no frame, or all forces are zero; as
    /// [`PonitaConfig::check`] and [`Graph::nearest`].
    pub fn new(
        gpu: &Gpu,
        frames: &[Frame],
        config: PonitaConfig,
        grid: Grid,
        rng: &mut Rng,
    ) -> Result<Potential> {
        let mut species: Vec<u8> = frames.iter().flat_map(|f| f.species.iter().copied()).collect();
        species.sort_unstable();
        species.dedup();
        let reference = references(frames, &species)?;
        let (mut square, mut count) = (0.0, 0usize);
        for (i, frame) in frames.iter().enumerate() {
            let forces = frame.forces.as_ref().ok_or_else(|| lacks(i, "forces"))?;
            square += forces.iter().flatten().map(|f| f * f).sum::<f64>();
            count += 3 * forces.len();
        }
        let scale = (square / count.max(1) as f64).sqrt();
        if !(scale.is_finite() && scale > 0.0) {
            return Err(Error::config(format!(
                "potential: the forces have a root mean square of {scale}; give others"
            )));
        }
        let config = PonitaConfig {
            in_scalars: species.len(),
            in_vectors: 0,
            out_scalars: 1,
            out_vectors: 0,
            pool: true,
            ..config
        };
        let nearest = nearest(gpu, frames)?;
        Ok(Potential { net: Ponita::new(gpu, config, grid, rng)?, species, reference, scale, nearest })
    }

    /// Returns this potential with tables of its kernels, for dynamics: see [`Ponita::tabulate`]. Energies, forces and
    /// stress are then those of one smooth function close to this potential.
    ///
    /// # Errors
    /// As [`Ponita::tabulate`].
    pub fn tabulate(&self, points: usize) -> Result<Potential> {
        Ok(Potential { net: self.net.tabulate(points)?, ..self.clone() })
    }

    /// Writes network, species and units to a safetensors file.
    ///
    /// # Errors
    /// As [`Ponita::save`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut own = json!({ "species": self.species, "reference": self.reference, "scale": self.scale });
        if let Some(nearest) = self.nearest {
            own["nearest"] = nearest.into();
        }
        self.net.save_with(path, [(KEY.to_string(), own.to_string())])
    }

    /// Reads a file that [`Potential::save`] wrote.
    ///
    /// # Errors
    /// As [`Ponita::load`]; when species or units are missing or do not fit the network.
    pub fn load(gpu: &Gpu, path: impl AsRef<Path>) -> Result<Potential> {
        let path = path.as_ref();
        let net = Ponita::load(gpu, path)?;
        let file = File::open(path)?;
        let wrong = |message: &str| Error::format(path, format!("no potential: {message}"));
        let text = file.metadata().get(KEY).ok_or_else(|| wrong("the metadata has no `potential`"))?;
        let all: Value = serde_json::from_str(text).map_err(|e| wrong(&format!("`potential`: {e}")))?;
        let list = |name: &str| all[name].as_array().ok_or_else(|| wrong(&format!("`{name}` is no list")));
        let number = |v: &Value| v.as_f64().filter(|x| x.is_finite());
        let species: Option<Vec<u8>> =
            list("species")?.iter().map(|v| v.as_u64().and_then(|n| u8::try_from(n).ok())).collect();
        let reference: Option<Vec<f64>> = list("reference")?.iter().map(number).collect();
        let species = species.ok_or_else(|| wrong("`species` are no atomic numbers"))?;
        let reference = reference.ok_or_else(|| wrong("`reference` has other things than numbers"))?;
        let scale =
            number(&all["scale"]).filter(|s| *s > 0.0).ok_or_else(|| wrong("`scale` is not above 0"))?;
        // Files of older versions have none.
        let nearest = number(&all["nearest"]).filter(|d| *d > 0.0);
        let config = &net.config;
        let fits = species.len() == config.in_scalars && reference.len() == species.len();
        if !fits || (config.in_vectors, config.out_scalars) != (0, 1) || net.grid.dimension() != 3 {
            return Err(wrong("the network's inputs and outputs are not a potential's"));
        }
        Ok(Potential { net, species, reference, scale, nearest })
    }

    /// Checks whether [`Potential::graph`] accepts these atoms, as far as that can be told without looking for
    /// neighbours.
    ///
    /// # Errors
    /// As [`Potential::graph`], except for positions that are not finite and for neighbours that exceed the memory.
    pub fn check(&self, atoms: &Atoms) -> Result<()> {
        let (p, s) = (atoms.positions.len(), atoms.species.len());
        if p != s {
            return Err(Error::config(format!("potential: {p} positions for {s} species")));
        }
        self.reference_energy(atoms.species)?;
        let Some(cell) = atoms.cell else { return Ok(()) };
        if self.net.config.radius.is_none() && cell.periodic != [false; 3] {
            return Err(Error::config(
                "potential: this network has no radius, so that a periodic cell has no end; train one with a radius",
            ));
        }
        cell.wrapped(&[]).map(drop)
    }

    /// Makes a graph of the atoms of some frames, and the network's input. If the network has no radius, all pairs of a frame
    /// are joined. Positions are moved into the cell and centred per frame, so that f32 keeps the digits that matter.
    ///
    /// # Errors
    /// When the network does not know a species, a position is not finite, a cell has no volume or is periodic while the
    /// network has no radius, or the neighbours exceed the memory.
    pub fn graph(&self, frames: &[Atoms]) -> Result<(Graph, PonitaInput)> {
        let Joined { graph, input, .. } = self.joined(frames)?;
        Ok((graph, input))
    }

    /// [`Potential::graph`], with the positions that the graph has.
    pub(super) fn joined(&self, frames: &[Atoms]) -> Result<Joined> {
        let gpu = self.net.embed.gpu();
        let (mut positions, mut species, mut sizes, mut cells) = (vec![], vec![], vec![], vec![]);
        for frame in frames {
            self.check(frame)?;
            species.extend(frame.species);
            let n = frame.positions.len();
            // Atoms that have moved through many periods would keep few digits in f32, so they are moved into the cell first.
            let near = match frame.cell {
                Some(cell) => Cow::Owned(cell.wrapped(frame.positions)?),
                None => Cow::Borrowed(frame.positions),
            };
            let mean = |k: usize| near.iter().map(|x| x[k]).sum::<f64>() / n.max(1) as f64;
            let centre = [mean(0), mean(1), mean(2)];
            positions.extend(near.iter().flat_map(|x| (0..3).map(move |k| (x[k] - centre[k]) as f32)));
            sizes.push(n);
            cells.push(frame.cell.filter(|cell| cell.periodic != [false; 3]));
        }
        let graph = match self.net.config.radius {
            Some(radius) => {
                let clouds = Clouds { positions: &positions, dimension: 3, sizes: &sizes, cells: &cells };
                Graph::radius(gpu, &clouds, radius, true)?
            }
            None => Graph::full(gpu, &positions, 3, &sizes, true)?,
        };
        Ok(Joined { input: self.input(&species)?, graph, positions })
    }

    /// Returns the network's input for atoms of these species, one-hot.
    pub(super) fn input(&self, species: &[u8]) -> Result<PonitaInput> {
        let width = self.species.len();
        let mut hot = vec![0.0f32; species.len() * width];
        for (i, z) in species.iter().enumerate() {
            let at = self.species.iter().position(|s| s == z).ok_or_else(|| self.unknown(i, *z))?;
            hot[i * width + at] = 1.0;
        }
        let hot = Tensor::from_slice(self.net.embed.gpu(), &hot, [species.len(), width]);
        Ok(PonitaInput::scalars(&hot))
    }

    fn unknown(&self, atom: usize, number: u8) -> Error {
        let known: Vec<&str> = self.species.iter().map(|&z| symbol(z)).collect();
        Error::config(format!(
            "potential: atom {atom} is {} (number {number}); this one was trained on {}",
            symbol(number),
            known.join(", ")
        ))
    }

    /// Returns the sum of the atoms' reference energies.
    ///
    /// # Errors
    /// When the network was not made for a species.
    pub fn reference_energy(&self, species: &[u8]) -> Result<f64> {
        let one = |(i, z): (usize, &u8)| {
            let at = self.species.iter().position(|s| s == z).ok_or_else(|| self.unknown(i, *z))?;
            Ok(self.reference[at])
        };
        species.iter().enumerate().map(one).sum()
    }

    /// Makes a batch of frames, with their energies and forces in the network's units.
    ///
    /// # Errors
    /// As [`Potential::graph`]; when a frame has no energy or no forces.
    pub fn batch(&self, frames: &[&Frame]) -> Result<Batch> {
        let atoms: Vec<Atoms> = frames.iter().map(|f| Atoms::of(f)).collect();
        let (graph, input) = self.graph(&atoms)?;
        let (mut energies, mut forces) = (vec![], vec![]);
        for (i, frame) in frames.iter().enumerate() {
            let energy = frame.energy.ok_or_else(|| lacks(i, "energy"))?;
            energies.push(((energy - self.reference_energy(&frame.species)?) / self.scale) as f32);
            let all = frame.forces.as_ref().ok_or_else(|| lacks(i, "forces"))?;
            forces.extend(all.iter().flatten().map(|f| (f / self.scale) as f32));
        }
        let gpu = graph.gpu().clone();
        if forces.len() != 3 * graph.nodes() {
            let (f, n) = (forces.len() / 3, graph.nodes());
            return Err(Error::config(format!("potential: {f} forces for {n} atoms")));
        }
        Ok(Batch {
            energies: Tensor::from_slice(&gpu, &energies, [frames.len()]),
            forces: Tensor::from_slice(&gpu, &forces, [graph.nodes(), 3]),
            graph,
            input,
        })
    }

    /// Returns a scalar on which `backward` gives the gradient of `energy_weight mean (E - E*)^2 + mean (F - F*)^2`, over
    /// the energies of graphs and the components of forces, in the network's units. Forces reach the parameters through
    /// [`Ponita::force_product`], with `step` in units of the positions.
    ///
    /// # Errors
    /// When the device fails, or the potential uses tables (see [`Potential::tabulate`]).
    pub fn loss(&self, batch: &Batch, energy_weight: f32, step: f32) -> Result<PotentialLoss> {
        self.net.trainable("potential")?;
        let (graphs, nodes) = (batch.graph.graphs(), batch.graph.nodes());
        let graph = batch.graph.track();
        let forces = {
            // Weights need no gradients here.
            let fixed = self.net.mapped(&Tensor::detach);
            let gradient = fixed.node_energies(&graph, &batch.input).sum_all().backward()?;
            let zeros = || Tensor::zeros(graph.gpu(), [nodes, 3]);
            gradient.get(graph.positions()).map_or_else(zeros, Tensor::neg)
        };
        let energies = batch.graph.pool(&self.net.node_energies(&batch.graph, &batch.input));
        let force_errors = forces.sub(&batch.forces).detach();
        let energy_errors = energies.sub(&batch.energies);
        let u = force_errors.scale(2.0 / (3 * nodes.max(1)) as f32);
        let energy_loss = energy_errors.square().sum_all().scale(energy_weight / graphs.max(1) as f32);
        let objective = self.net.force_product(&batch.graph, &batch.input, &u, step).add(&energy_loss);
        Ok(PotentialLoss { objective, energy_errors: energy_errors.detach(), force_errors })
    }
}

/// The part of a frame that a potential uses.
#[derive(Clone, Copy, Debug)]
pub struct Atoms<'a> {
    /// Positions of the atoms.
    pub positions: &'a [[f64; 3]],
    /// Atomic numbers.
    pub species: &'a [u8],
    /// The periodic cell, if there is one.
    pub cell: Option<Cell>,
}

impl<'a> Atoms<'a> {
    /// The atoms of a frame.
    pub fn of(frame: &'a Frame) -> Atoms<'a> {
        Atoms { positions: &frame.positions, species: &frame.species, cell: frame.cell }
    }
}

/// Frames as one graph.
pub(super) struct Joined {
    pub graph: Graph,
    pub input: PonitaInput,
    /// `[nodes, 3]`: the positions in the graph, moved into the cell and centred.
    pub positions: Vec<f32>,
}

const KEY: &str = "potential";

/// Atoms nearer than this, in angstrom, are at one point: no two nuclei have ever been, and f32 cannot tell the direction.
pub(super) const ONE_POINT: f64 = 1e-3;

/// How many atoms are searched for neighbours at once.
const AT_ONCE: usize = 8192;

/// Returns the shortest distance of two atoms in these frames.
fn nearest(gpu: &Gpu, frames: &[Frame]) -> Result<Option<f64>> {
    let (mut least, mut first) = (f64::INFINITY, 0);
    while first < frames.len() {
        let (mut atoms, mut end) = (0, first);
        while end < frames.len() && (end == first || atoms + frames[end].len() <= AT_ONCE) {
            atoms += frames[end].len();
            end += 1;
        }
        let part = &frames[first..end];
        let (mut positions, mut cells) = (Vec::with_capacity(3 * atoms), vec![]);
        for frame in part {
            let near = match frame.cell {
                Some(cell) => Cow::Owned(cell.wrapped(&frame.positions)?),
                None => Cow::Borrowed(&frame.positions),
            };
            let origin = near.first().copied().unwrap_or_default();
            positions.extend(near.iter().flat_map(|x| (0..3).map(move |k| (x[k] - origin[k]) as f32)));
            cells.push(frame.cell.filter(|cell| cell.periodic != [false; 3]));
        }
        let sizes: Vec<usize> = part.iter().map(|f| f.positions.len()).collect();
        let clouds = Clouds { positions: &positions, dimension: 3, sizes: &sizes, cells: &cells };
        let graph = Graph::nearest(gpu, &clouds, 1, false)?;
        for (g, found) in graph.shortest(&positions).into_iter().enumerate() {
            let Some((distance, nodes)) = found else { continue };
            if distance < ONE_POINT {
                let before: usize = sizes[..g].iter().sum();
                let [a, b] = nodes.map(|node| node as usize - before);
                return Err(Error::config(format!(
                    "potential: frame {}: atoms {a} and {b} are at one point; take the frame out",
                    first + g
                )));
            }
            least = least.min(distance);
        }
        first = end;
    }
    Ok(Some(least).filter(|d| d.is_finite()))
}

fn lacks(frame: usize, what: &str) -> Error {
    Error::config(format!("potential: frame {frame} has no {what}; training needs energy and forces"))
}

/// Fits the energy of one atom of each species: least squares of `energy = sum of references`. A ridge decides what the
/// frames leave open.
fn references(frames: &[Frame], species: &[u8]) -> Result<Vec<f64>> {
    let n = species.len();
    if n == 0 {
        return Err(Error::config("potential: no atoms to learn from; give frames with atoms"));
    }
    let (mut gram, mut right) = (vec![0.0; n * n], vec![0.0; n]);
    for (i, frame) in frames.iter().enumerate() {
        let energy = frame.energy.ok_or_else(|| lacks(i, "energy"))?;
        let counts: Vec<f64> =
            species.iter().map(|z| frame.species.iter().filter(|s| *s == z).count() as f64).collect();
        for a in 0..n {
            right[a] += counts[a] * energy;
            (0..n).for_each(|b| gram[a * n + b] += counts[a] * counts[b]);
        }
    }
    let ridge = 1e-9 * (0..n).map(|a| gram[a * n + a]).sum::<f64>();
    (0..n).for_each(|a| gram[a * n + a] += ridge);
    solve_positive(&gram, n, &right, 1).filter(|x| x.iter().all(|x| x.is_finite())).ok_or_else(|| {
        Error::config("potential: the energies cannot be fitted; look for values that are not finite")
    })
}
