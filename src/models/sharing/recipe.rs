//! A way to share matrices between depths: what it is asked for, and what it makes.

use super::made::Made;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::ops::product::site::Site;
use crate::rng::Rng;
use std::fmt;
use std::sync::Arc;

/// One of the matrices that every block of a model has, or a table that the model has once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matrix {
    /// `q`, `k`, `v`, `o`, `gate`, `up`, `down`; `router` if there are experts, each of which has its own `gate`, `up` and `down`;
    /// of tables `embedding` and `head`.
    pub name: &'static str,
    /// `[out, in]`
    pub size: [usize; 2],
    /// Standard deviation of an ordinary matrix in its place.
    pub std: f32,
}

/// What a recipe makes weights for.
#[derive(Clone, Copy, Debug)]
pub struct Stack<'a> {
    /// The number of depths.
    pub depth: usize,
    /// The matrices of each depth.
    pub matrices: &'a [Matrix],
    /// The tables of token vectors and scores. A recipe need not make them.
    pub tables: &'a [Matrix],
    /// Whether these matrices were named for this recipe, as in `up down: low-rank 4; none`. A recipe that otherwise shares attention's only
    /// then shares these.
    pub named: bool,
}

/// The weights that a recipe has made.
#[derive(Default)]
pub struct Sites {
    /// `by_depth[t][i]` is matrix `i` at depth `t`.
    pub by_depth: Vec<Vec<Arc<dyn Site>>>,
    /// Weights that a pass computes for many depths at once, which stand in for those of the same places in `by_depth`.
    pub made: Vec<Made>,
    /// The tables, or none if they are to be ordinary ones.
    pub tables: Vec<Arc<dyn Site>>,
}

impl Sites {
    /// Checks what a recipe, which may come from anywhere, has made for this stack.
    pub(in crate::models) fn fit(&self, stack: &Stack) -> Result<(), String> {
        let Stack { depth, matrices, tables, .. } = *stack;
        let full = |sites: &Vec<Arc<dyn Site>>| sites.len() == matrices.len();
        if self.by_depth.len() != depth || !self.by_depth.iter().all(full) {
            return Err(format!("the recipe did not make {} sites for each depth", matrices.len()));
        }
        let wrong = |site: &Arc<dyn Site>, matrix: &Matrix, place: &dyn fmt::Display| {
            let (size, Matrix { name, size: want, .. }) = (site.size(), matrix);
            (size != *want)
                .then(|| format!("the recipe's `{name}`{place} is {size:?}, and the model's {want:?}"))
        };
        for (t, sites) in self.by_depth.iter().enumerate() {
            let place = format!(" at depth {t}");
            if let Some(message) = sites.iter().zip(matrices).find_map(|(s, m)| wrong(s, m, &place)) {
                return Err(message);
            }
        }
        if !self.tables.is_empty() && self.tables.len() != tables.len() {
            return Err(format!(
                "the recipe made {} tables, and the model has {}",
                self.tables.len(),
                tables.len()
            ));
        }
        if let Some(message) = self.tables.iter().zip(tables).find_map(|(s, m)| wrong(s, m, &"")) {
            return Err(message);
        }
        let fits = |made: &Made| {
            let alone = matrices.iter().filter(|matrix| matrix.name == made.matrix).count() == 1;
            alone && made.layers.end <= depth && made.layers.len() == made.dictionary.layers()
        };
        match self.made.iter().find(|made| !fits(made)) {
            None => Ok(()),
            Some(made) => Err(format!(
                "the recipe's dictionary of `{}` is for the depths {:?}, and has {} layers; each block has one such matrix",
                made.matrix,
                made.layers,
                made.dictionary.layers()
            )),
        }
    }
}

/// A way to share matrices between depths.
pub trait Recipe: Send + Sync {
    /// Name and settings in words, such as `cycle 2 rank 8`: the name under which it is [registered](Sharing::register), and what
    /// its parser reads. Files keep it, and two recipes of the same text make leaves of the same names and shapes.
    fn text(&self) -> String;

    /// Makes the sites of every matrix at every depth, with leaves that are drawn from `rng`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) when the settings do not fit the sizes.
    fn sites(&self, gpu: &Gpu, stack: &Stack, rng: &mut Rng) -> Result<Sites>;
}

/// A [`Recipe`], as models hold it. Two are equal if their texts are.
#[derive(Clone)]
pub struct Sharing(pub(super) Arc<dyn Recipe>);

impl Sharing {
    /// A recipe of your own.
    pub fn new(recipe: impl Recipe + 'static) -> Sharing {
        Sharing(Arc::new(recipe))
    }

    /// Name and settings in words.
    pub fn text(&self) -> String {
        self.0.text()
    }

    /// Makes the sites of every matrix at every depth.
    ///
    /// # Errors
    /// As [`Recipe::sites`].
    pub fn sites(&self, gpu: &Gpu, stack: &Stack, rng: &mut Rng) -> Result<Sites> {
        self.0.sites(gpu, stack, rng)
    }
}

impl fmt::Debug for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.text())
    }
}

impl PartialEq for Sharing {
    fn eq(&self, other: &Sharing) -> bool {
        self.text() == other.text()
    }
}
