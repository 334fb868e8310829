//! Networks trained with ponita-torch: their state dict holds the same parameters under other names.

use super::config::PonitaConfig;
use super::ponita::Ponita;
use crate::error::{Error, Result};
use crate::geometry::space::grid::Grid;
use crate::geometry::space::invariants::polynomial_size;
use crate::gpu::Gpu;
use crate::store::File;
use crate::tensor::Tensor;
use std::path::Path;

/// Returns the name that ponita-torch has for one of our parameters.
fn torch_name(name: &str) -> String {
    let (head, rest) = name.split_once('.').unwrap_or((name, ""));
    if head == "basis" || head == "fiber_basis" {
        let (kind, layer) = rest.split_at(1);
        let place = if layer == "1" { 1 } else { 3 };
        return format!("{head}_fn.{place}.{}", if kind == "w" { "weight" } else { "bias" });
    }
    if head == "embed" {
        return format!("x_embedder.{rest}");
    }
    if let Some(l) = head.strip_prefix("readout") {
        return format!("read_out_layers.{l}.{rest}");
    }
    let l = head.strip_prefix("layer").unwrap_or(head);
    let rest = match rest {
        "conv.kernel" | "conv.fiber_kernel" => format!("{rest}.weight"),
        _ => rest.replace("linear1", "linear_1").replace("linear2", "linear_2"),
    };
    format!("interaction_layers.{l}.{rest}")
}

impl Ponita {
    /// Loads a network from a state dict of ponita-torch (github.com/ebekkers/ponita-torch) that was saved as
    /// safetensors. Sizes are read off the tensors. `grid` is the network's `ori_grid`, which a state dict does not hold.
    /// Of the input and output channels, the last `in_vectors` and `out_vectors` are vectors. The state dict does not say
    /// either whether the network had a cutoff `radius` and whether it pools.
    ///
    /// In the plane, the second attribute of ponita-torch is not the signed distance that we use, so planar networks
    /// cannot be loaded.
    ///
    /// # Errors
    /// When the file cannot be read, a tensor is missing or has another shape than the sizes demand, more vectors are
    /// asked for than there are channels, or the grid has no orientations in space.
    pub fn from_torch(
        gpu: &Gpu,
        path: impl AsRef<Path>,
        grid: Grid,
        in_vectors: usize,
        out_vectors: usize,
        radius: Option<f32>,
        pool: bool,
    ) -> Result<Ponita> {
        let file = File::open(path)?;
        if grid.dimension() != 3 || !grid.is_oriented() {
            return Err(Error::config("from_torch: needs a grid of orientations in space"));
        }
        let size = |name: &str, axis: usize| -> Result<usize> {
            let shape = &file.info(name)?.shape;
            shape
                .get(axis)
                .copied()
                .ok_or_else(|| Error::format(file.path(), format!("`{name}` has shape {shape:?}")))
        };
        let layers =
            (0..).take_while(|l| file.contains(&format!("interaction_layers.{l}.norm.weight"))).count();
        let last = layers.saturating_sub(1);
        let (channels, features) = (size("x_embedder.weight", 0)?, size("basis_fn.1.weight", 1)?);
        let vectors = |all: usize, vectors: usize| {
            all.checked_sub(vectors)
                .ok_or_else(|| Error::config(format!("from_torch: {vectors} vectors of {all} channels")))
        };
        let degree = (1..=6).find(|&degree| polynomial_size(2, degree) == features);
        let config = PonitaConfig {
            in_scalars: vectors(size("x_embedder.weight", 1)?, in_vectors)?,
            in_vectors,
            out_scalars: vectors(size(&format!("read_out_layers.{last}.weight"), 0)?, out_vectors)?,
            out_vectors,
            channels,
            hidden: size("basis_fn.1.weight", 0)?,
            basis: size("basis_fn.3.weight", 0)?,
            layers,
            widening: size("interaction_layers.0.linear_1.weight", 0)? / channels.max(1),
            degree: degree.ok_or_else(|| {
                Error::format(
                    file.path(),
                    format!("{features} polynomial features are of no degree from 1 to 6"),
                )
            })?,
            radius,
            layer_scale: file.contains("interaction_layers.0.layer_scale").then_some(1.0),
            every_readout: layers > 1 && file.contains("read_out_layers.0.weight"),
            pool,
        };
        Ponita::build(config, grid, &mut |name, shape, _| {
            let theirs = torch_name(name);
            file.expect(&theirs, shape)?;
            Ok(Tensor::from_slice(gpu, &file.tensor_f32(&theirs)?, shape))
        })
    }
}
