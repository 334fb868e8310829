//! An interatomic potential: a network with the species that it knows and the units that it learned in.

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

/// `E = sum_i (reference[z_i] + scale e_i)`, with `e_i` the network's scalar of atom i and one-hot species
/// going in.
///
/// Units are those of the frames that it was made from: eV and angstrom for extended XYZ.
#[derive(Clone)]
pub struct Potential {
    /// The network.
    pub net: Ponita,
    /// Atomic numbers, in the order of the network's input scalars.
    pub species: Vec<u8>,
    /// Energy of an atom of each species, in f64: energies are large and their differences small.
    pub reference: Vec<f64>,
    /// What the network's energies are multiplied by: the root mean square of the force components it was
    /// made from.
    pub scale: f64,
}

/// Frames made ready for a network, with what they should come to, in the network's units.
pub struct Batch {
    /// The atoms of all frames.
    pub graph: Graph,
    /// Their species.
    pub input: PonitaInput,
    /// `[graphs]`
    pub energies: Tensor,
    /// `[nodes, 3]`
    pub forces: Tensor,
}

/// A batch's loss, in the network's units.
#[non_exhaustive]
pub struct PotentialLoss {
    /// Its gradient is the loss's; its value is not.
    pub objective: Tensor,
    /// `[graphs]`: predicted less wanted energies.
    pub energy_errors: Tensor,
    /// `[nodes, 3]`: predicted less wanted forces.
    pub force_errors: Tensor,
}

impl Potential {
    /// A new network for the species, energies and forces of these frames. References are fitted to the
    /// energies by least squares. Inputs and outputs of `config` are set here.
    ///
    /// # Errors
    /// For frames without energy or forces, no frame at all, forces that are all zero; as
    /// [`PonitaConfig::check`].
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
        Ok(Potential { net: Ponita::new(gpu, config, grid, rng)?, species, reference, scale })
    }

    /// This potential by tables of its kernels, for dynamics: see [`Ponita::tabulate`]. Energies, forces and stress are then those
    /// of one smooth function close to this one.
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
        let own = json!({ "species": self.species, "reference": self.reference, "scale": self.scale });
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
        let config = &net.config;
        let fits = species.len() == config.in_scalars && reference.len() == species.len();
        if !fits || (config.in_vectors, config.out_scalars) != (0, 1) || net.grid.dimension() != 3 {
            return Err(wrong("the network's inputs and outputs are not a potential's"));
        }
        Ok(Potential { net, species, reference, scale })
    }

    /// Whether [`Potential::graph`] takes these atoms, as far as can be told without looking for neighbours.
    ///
    /// # Errors
    /// As [`Potential::graph`], but for positions that are not finite and more neighbours than memory.
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

    /// The atoms of some frames and who sees whom: all pairs of a frame where the network has no radius.
    /// Positions are moved into the cell and taken about each frame's centre, so that f32 keeps the digits that matter.
    ///
    /// # Errors
    /// For a species that the network was not made for, positions that are not finite, a cell without volume
    /// or without a radius to cut at, more neighbours than memory.
    pub fn graph(&self, frames: &[Atoms]) -> Result<(Graph, PonitaInput)> {
        let gpu = self.net.embed.gpu();
        let (mut positions, mut hot, mut sizes, mut cells) = (vec![], vec![], vec![], vec![]);
        for frame in frames {
            self.check(frame)?;
            for (i, z) in frame.species.iter().enumerate() {
                let at = self.species.iter().position(|s| s == z).ok_or_else(|| self.unknown(i, *z))?;
                hot.extend((0..self.species.len()).map(|s| (s == at) as u8 as f32));
            }
            let n = frame.positions.len();
            // Atoms that have wandered through many periods would keep few digits in f32.
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
        let hot = Tensor::from_slice(gpu, &hot, [graph.nodes(), self.species.len()]);
        Ok((graph, PonitaInput::scalars(&hot)))
    }

    fn unknown(&self, atom: usize, number: u8) -> Error {
        let known: Vec<&str> = self.species.iter().map(|&z| symbol(z)).collect();
        Error::config(format!(
            "potential: atom {atom} is {} (number {number}); this one was trained on {}",
            symbol(number),
            known.join(", ")
        ))
    }

    /// The sum of the atoms' reference energies.
    ///
    /// # Errors
    /// For a species that the network was not made for.
    pub fn reference_energy(&self, species: &[u8]) -> Result<f64> {
        let one = |(i, z): (usize, &u8)| {
            let at = self.species.iter().position(|s| s == z).ok_or_else(|| self.unknown(i, *z))?;
            Ok(self.reference[at])
        };
        species.iter().enumerate().map(one).sum()
    }

    /// Frames with their energies and forces in the network's units.
    ///
    /// # Errors
    /// As [`Potential::graph`]; for frames without energy or forces.
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

    /// What to call `backward` on for the gradient of `energy_weight mean (E - E*)^2 + mean (F - F*)^2`,
    /// energies of graphs and components of forces in the network's units. Forces reach the parameters by
    /// [`Ponita::force_product`] with `step` in units of the positions.
    ///
    /// # Errors
    /// The device's fault; for a potential by tables, see [`Potential::tabulate`].
    pub fn loss(&self, batch: &Batch, energy_weight: f32, step: f32) -> Result<PotentialLoss> {
        self.net.trainable("potential")?;
        let (graphs, nodes) = (batch.graph.graphs(), batch.graph.nodes());
        let graph = batch.graph.track();
        let forces = {
            // Gradients of weights are not asked for.
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

/// What a potential sees of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Atoms<'a> {
    /// Where the atoms are.
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

const KEY: &str = "potential";

fn lacks(frame: usize, what: &str) -> Error {
    Error::config(format!("potential: frame {frame} has no {what}; training needs energy and forces"))
}

/// The energy of an atom of each species: least squares of `energy = sum of references`, with a ridge that
/// decides where the frames do not.
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
