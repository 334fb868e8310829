//! One store for all weights of a model (ROAST, STABLE-RPS, arXiv 2310.11611).

use super::recipe::{Matrix, Recipe, Sites, Stack};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::Init;
use crate::ops::product::site::Site;
use crate::rng::Rng;
use crate::share::{Draw, Hashed, Mapping, hashed::SEEDS};
use std::sync::Arc;

/// Every matrix at every depth and every table reads one store, which has `1 / factor` as many numbers.
pub struct Hash {
    pub factor: f64,
    pub mapping: HashMapping,
}

/// How the store is read, by the words that name it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum HashMapping {
    /// [`Mapping::Stable`]
    Stable,
    /// [`Mapping::Tile`] of 4 rows and 32 columns.
    Roast,
    /// [`Mapping::Element`]
    Element,
}

impl HashMapping {
    pub const ALL: [(&'static str, HashMapping); 3] =
        [("stable", HashMapping::Stable), ("roast", HashMapping::Roast), ("element", HashMapping::Element)];

    fn name(self) -> &'static str {
        HashMapping::ALL.iter().find(|(_, mapping)| *mapping == self).map_or("", |(name, _)| name)
    }

    fn mapping(self) -> Mapping {
        match self {
            HashMapping::Stable => Mapping::Stable,
            HashMapping::Roast => Mapping::Tile([4, 32]),
            HashMapping::Element => Mapping::Element,
        }
    }
}

/// Most weights that are read from one stored number. A file with settings of more is damaged, and nothing is made of it.
pub(crate) const MOST_SHARED: u32 = 1 << 10;

/// Standard deviation of the store's numbers at first. A weight's factor brings it to the deviation of an ordinary matrix.
const STD: f32 = 0.05;

impl Recipe for Hash {
    fn text(&self) -> String {
        format!("hashed {} {}", self.factor, self.mapping.name())
    }

    fn sites(&self, gpu: &Gpu, stack: &Stack, rng: &mut Rng) -> Result<Sites> {
        let draws = self.draws(stack)?;
        let omega = Init::Normal(STD).leaf(gpu, [draws.first().map_or(1, |draw| draw.stored)], rng);
        let mut sites = draws.into_iter().map(|draw| -> Arc<dyn Site> { Hashed::new(&omega, draw).shared() });
        let tables = sites.by_ref().take(stack.tables.len()).collect();
        let by_depth =
            (0..stack.depth).map(|_| sites.by_ref().take(stack.matrices.len()).collect()).collect();
        Ok(Sites { by_depth, made: Vec::new(), tables })
    }
}

impl Hash {
    /// What each table reads of the store, and then each matrix, depth by depth: one behind the other.
    pub fn draws(&self, stack: &Stack) -> Result<Vec<Draw>> {
        if !(1.0..=MOST_SHARED as f64).contains(&self.factor) {
            return Err(Error::config(format!("a factor of {}; use 1 to {MOST_SHARED}", self.factor)));
        }
        let elements = |matrix: &Matrix| matrix.size[0] * matrix.size[1];
        let sum = |all: &[Matrix]| all.iter().map(|matrix| elements(matrix) as u128).sum::<u128>();
        let all = stack.depth as u128 * sum(stack.matrices) + sum(stack.tables);
        if all >= 1 << 32 {
            return Err(Error::config(format!("{all} weights; 32 bits number them")));
        }
        let stored = (all as f64 / self.factor).ceil() as usize;
        let least = match self.mapping.mapping() {
            Mapping::Tile([rows, columns]) => rows * columns,
            _ => 1,
        };
        if stored < least {
            return Err(Error::config(format!("a store of {stored} numbers; {least} are read at a time")));
        }
        let blocks = (0..stack.depth).flat_map(|_| stack.matrices);
        let mut offset = 0;
        let draw = |(layer, matrix): (usize, &Matrix)| {
            let draw = Draw {
                stored,
                size: matrix.size,
                offset,
                layer,
                scale: matrix.std / STD,
                mapping: self.mapping.mapping(),
                seeds: SEEDS,
            };
            offset += elements(matrix);
            draw
        };
        Ok(stack.tables.iter().chain(blocks).enumerate().map(draw).collect())
    }
}
