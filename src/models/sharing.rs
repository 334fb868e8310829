//! What the depths of a model share: recipes from which a model makes the sites of its matrices. Kinds of your own are recipes
//! as much as the built-in ones.

use crate::error::{Error, Result};
use crate::gpu::{Gpu, lock};
use crate::nn::Init;
use crate::ops::product::site::Site;
use crate::rng::Rng;
use crate::share::{Dictionary, Factored, LowRank, Tied};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex};

/// One of the matrices that every block of a model has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matrix {
    /// `q`, `k`, `v`, `o`, `up` or `down`.
    pub name: &'static str,
    /// `[out, in]`
    pub size: [usize; 2],
    /// Standard deviation of an ordinary matrix in its place.
    pub std: f32,
}

/// The weights that a recipe has made.
#[derive(Default)]
pub struct Sites {
    /// `by_depth[t][i]` is matrix `i` at depth `t`.
    pub by_depth: Vec<Vec<Arc<dyn Site>>>,
    /// Dictionaries of the first matrices, in their order. Training computes the weights of all depths in one pass from them.
    pub dictionaries: Vec<Dictionary>,
}

impl Sites {
    /// Checks what a recipe, which may come from anywhere, has made for these matrices.
    pub(super) fn fit(&self, depth: usize, matrices: &[Matrix]) -> Result<(), String> {
        let full = |sites: &Vec<Arc<dyn Site>>| sites.len() == matrices.len();
        if self.by_depth.len() != depth || !self.by_depth.iter().all(full) {
            return Err(format!("the recipe did not make {} sites for each depth", matrices.len()));
        }
        for (t, sites) in self.by_depth.iter().enumerate() {
            if let Some((site, matrix)) =
                sites.iter().zip(matrices).find(|(s, matrix)| s.size() != matrix.size)
            {
                let (size, Matrix { name, size: want, .. }) = (site.size(), matrix);
                return Err(format!(
                    "the recipe's `{name}` at depth {t} is {size:?}, and the model's {want:?}"
                ));
            }
        }
        let most = matrices.iter().filter(|matrix| ["q", "k", "v", "o"].contains(&matrix.name)).count();
        if self.dictionaries.len() > most || self.dictionaries.iter().any(|made| made.layers() != depth) {
            return Err(format!(
                "the recipe's dictionaries must be those of q, k, v and o, each of {depth} layers"
            ));
        }
        Ok(())
    }
}

/// A way to share matrices between depths.
pub trait Recipe: Send + Sync {
    /// Name and settings in words, such as `cycle 2 rank 8`: the name under which it is [registered](Sharing::register), and what
    /// its parser reads. Files keep it, and two recipes of the same text make leaves of the same names and shapes.
    fn text(&self) -> String;

    /// Makes the sites of every matrix at `depth` depths, with leaves that are drawn from `rng`.
    ///
    /// # Errors
    /// [`Error::Config`] when the settings do not fit the sizes.
    fn sites(&self, gpu: &Gpu, depth: usize, matrices: &[Matrix], rng: &mut Rng) -> Result<Sites>;
}

/// Makes a recipe of the words after its name.
pub type Parse = fn(words: &[&str]) -> Result<Sharing>;

/// A [`Recipe`], as models hold it. Two are equal if their texts are.
#[derive(Clone)]
pub struct Sharing(Arc<dyn Recipe>);

impl Sharing {
    /// A recipe of your own.
    pub fn new(recipe: impl Recipe + 'static) -> Sharing {
        Sharing(Arc::new(recipe))
    }

    /// Nothing is shared: an ordinary transformer. `none`
    pub fn none() -> Sharing {
        Sharing::new(Untied)
    }

    /// All matrices are the same at every depth. `tied`
    pub fn tied() -> Sharing {
        Sharing::new(Cycle { blocks: 1, rank: 0, lora: None })
    }

    /// All matrices are the same, and each depth adds a low-rank part `scale * B A` of its own, with `A [rank, in]`.
    /// `tied-lora rank 8 scale 1`
    pub fn tied_lora(rank: usize, scale: f32) -> Sharing {
        Sharing::new(Cycle { blocks: 1, rank, lora: Some(scale) })
    }

    /// The matrices of `blocks` blocks, used in turn: depth `t` uses those of block `t mod blocks`. `blocks` must divide the
    /// depth. With `rank` above 0, each depth has a low-rank part of its own. `cycle 2 rank 8`
    pub fn cycle(blocks: usize, rank: usize) -> Sharing {
        Sharing::new(Cycle { blocks, rank, lora: None })
    }

    /// Matrices that groups of `group` neighbouring depths share (FoldGPT): depth `t` uses those of group `t / group`. The last
    /// group may be smaller. `fold 2`
    pub fn fold(group: usize) -> Sharing {
        Sharing::new(Fold { group })
    }

    /// A dictionary of `atoms` atoms for each projection of attention (MASA). Each depth has its own other matrices. `output`
    /// says whether the output projection comes from a dictionary too (QKVO), or is each depth's own (QKV). `dictionary 2 output
    /// true`
    pub fn dictionary(atoms: usize, output: bool) -> Sharing {
        Sharing::new(Masa { atoms, output })
    }

    /// Nothing is shared, but the attention matrices of each depth have this rank. `low-rank 16`
    pub fn low_rank(rank: usize) -> Sharing {
        Sharing::new(LowRankAttention { rank })
    }

    /// Makes [`Sharing::named`] know recipes whose [text](Recipe::text) begins with the word `name`, for this process. A second
    /// registration of a name replaces the first.
    ///
    /// # Panics
    /// When the name is not one word, or that of a built-in recipe.
    #[track_caller]
    pub fn register(name: &'static str, parse: Parse) {
        let one = !name.is_empty() && !name.contains(char::is_whitespace);
        assert!(one && !BUILT_IN.contains(&name), "sharing: `{name}` is not a new word; choose another name");
        lock(&KNOWN).insert(name, parse);
    }

    /// Reads a recipe's text, of a file or a command line.
    ///
    /// ```
    /// use tiebeam::models::recursive::Sharing;
    ///
    /// assert_eq!(Sharing::named("cycle 2 rank 8")?, Sharing::cycle(2, 8));
    /// assert!(Sharing::named("circulant").is_err(), "nobody has registered it");
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] with the known names, if it has another; when its words cannot be read.
    pub fn named(text: &str) -> Result<Sharing> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let known = lock(&KNOWN);
        let parse = words.first().and_then(|name| known.get(name)).copied();
        let names: Vec<&str> = known.keys().copied().collect();
        drop(known);
        let Some(parse) = parse else {
            let names = names.join(", ");
            let message =
                format!("sharing '{text}': this program knows {names}; others must be registered first");
            return Err(Error::config(message));
        };
        parse(&words[1..]).map_err(|error| Error::config(format!("sharing '{text}': {error}")))
    }

    /// Name and settings in words.
    pub fn text(&self) -> String {
        self.0.text()
    }

    /// Makes the sites of every matrix at every depth.
    ///
    /// # Errors
    /// As [`Recipe::sites`].
    pub fn sites(&self, gpu: &Gpu, depth: usize, matrices: &[Matrix], rng: &mut Rng) -> Result<Sites> {
        self.0.sites(gpu, depth, matrices, rng)
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

/// The names of the recipes above.
const BUILT_IN: [&str; 7] = ["none", "tied", "tied-lora", "cycle", "fold", "dictionary", "low-rank"];

/// The parsers of all recipes by name.
static KNOWN: LazyLock<Mutex<BTreeMap<&'static str, Parse>>> = LazyLock::new(|| {
    let own: [(&str, Parse); 7] = [
        ("none", |words| values(words, [], |[]: [usize; 0]| Sharing::none())),
        ("tied", |words| values(words, [], |[]: [usize; 0]| Sharing::tied())),
        ("tied-lora", |words| match words {
            ["rank", rank, "scale", scale] => Ok(Sharing::tied_lora(value(rank)?, value(scale)?)),
            ["rank", rank] => Ok(Sharing::tied_lora(value(rank)?, 1.0)),
            _ => Err(Error::config("write `tied-lora rank 8 scale 1`")),
        }),
        ("cycle", |words| values(words, ["", "rank"], |[blocks, rank]| Sharing::cycle(blocks, rank))),
        ("fold", |words| values(words, [""], |[group]| Sharing::fold(group))),
        ("dictionary", |words| match words {
            [atoms, "output", output] => Ok(Sharing::dictionary(value(atoms)?, value(output)?)),
            _ => Err(Error::config("write `dictionary 2 output true`")),
        }),
        ("low-rank", |words| values(words, [""], |[rank]| Sharing::low_rank(rank))),
    ];
    Mutex::new(own.into())
});

fn value<T: std::str::FromStr>(word: &str) -> Result<T> {
    word.parse().map_err(|_| Error::config(format!("cannot read '{word}'")))
}

/// Reads numbers, each after its key; the key "" is not written.
fn values<const N: usize>(
    words: &[&str],
    keys: [&str; N],
    make: fn([usize; N]) -> Sharing,
) -> Result<Sharing> {
    let mut rest = words.iter();
    let mut all = [0; N];
    for (key, number) in keys.into_iter().zip(&mut all) {
        if !key.is_empty() && rest.next() != Some(&key) {
            return Err(Error::config(format!("`{key}` and a number must follow")));
        }
        *number = value(rest.next().ok_or_else(|| Error::config("a number must follow"))?)?;
    }
    match rest.next() {
        None => Ok(make(all)),
        Some(word) => Err(Error::config(format!("there is no setting '{word}'"))),
    }
}

/// Draws the matrices of one block.
fn drawn(gpu: &Gpu, matrices: &[Matrix], rng: &mut Rng) -> Vec<Tensor> {
    matrices.iter().map(|matrix| Init::Normal(matrix.std).leaf(gpu, matrix.size, rng)).collect()
}

fn tied(theta: &Tensor) -> Arc<dyn Site> {
    Tied::new(theta).shared()
}

/// Makes a site of `theta` with a low-rank part that is initially zero.
fn lora(gpu: &Gpu, theta: &Tensor, rank: usize, scale: f32, rng: &mut Rng) -> Arc<dyn Site> {
    let (out, inner) = (theta.shape()[0], theta.shape()[1]);
    let a = Init::Normal((1.0 / inner as f32).sqrt()).leaf(gpu, [rank, inner], rng);
    let b = Init::Zeros.leaf(gpu, [out, rank], rng);
    LowRank::new(theta, &a, &b, scale).shared()
}

struct Untied;

impl Recipe for Untied {
    fn text(&self) -> String {
        "none".into()
    }
    fn sites(&self, gpu: &Gpu, depth: usize, matrices: &[Matrix], rng: &mut Rng) -> Result<Sites> {
        let block = |_| drawn(gpu, matrices, rng).iter().map(tied).collect();
        Ok(Sites { by_depth: (0..depth).map(block).collect(), dictionaries: Vec::new() })
    }
}

/// Blocks used in turn, of which `tied` and `tied-lora` have one.
struct Cycle {
    blocks: usize,
    rank: usize,
    /// The factor of the low-rank parts of `tied-lora`, which is the only one that names it.
    lora: Option<f32>,
}

impl Recipe for Cycle {
    fn text(&self) -> String {
        match (self.lora, self.blocks, self.rank) {
            (Some(scale), _, rank) => format!("tied-lora rank {rank} scale {scale}"),
            (None, 1, 0) => "tied".into(),
            (None, blocks, rank) => format!("cycle {blocks} rank {rank}"),
        }
    }
    fn sites(&self, gpu: &Gpu, depth: usize, matrices: &[Matrix], rng: &mut Rng) -> Result<Sites> {
        if self.blocks == 0 || !depth.is_multiple_of(self.blocks) {
            let message = format!("{} blocks do not divide {depth} depths", self.blocks);
            return Err(Error::config(message));
        }
        let mut stored: Vec<Vec<Tensor>> = Vec::new();
        let block = |t: usize| {
            if t < self.blocks {
                stored.push(drawn(gpu, matrices, rng));
            }
            let site = |theta: &Tensor| match self.rank {
                0 => tied(theta),
                rank => lora(gpu, theta, rank, self.lora.unwrap_or(1.0), rng),
            };
            stored[t % self.blocks].iter().map(site).collect()
        };
        Ok(Sites { by_depth: (0..depth).map(block).collect(), dictionaries: Vec::new() })
    }
}

struct Fold {
    group: usize,
}

impl Recipe for Fold {
    fn text(&self) -> String {
        format!("fold {}", self.group)
    }
    fn sites(&self, gpu: &Gpu, depth: usize, matrices: &[Matrix], rng: &mut Rng) -> Result<Sites> {
        if self.group == 0 {
            return Err(Error::config("a group has at least one depth"));
        }
        let groups: Vec<_> = (0..depth.div_ceil(self.group)).map(|_| drawn(gpu, matrices, rng)).collect();
        let block = |t: usize| groups[t / self.group].iter().map(tied).collect();
        Ok(Sites { by_depth: (0..depth).map(block).collect(), dictionaries: Vec::new() })
    }
}

struct Masa {
    atoms: usize,
    output: bool,
}

impl Recipe for Masa {
    fn text(&self) -> String {
        format!("dictionary {} output {}", self.atoms, self.output)
    }
    fn sites(&self, gpu: &Gpu, depth: usize, matrices: &[Matrix], rng: &mut Rng) -> Result<Sites> {
        if self.atoms == 0 || self.atoms > depth {
            return Err(Error::config(format!("{} atoms for {depth} depths; use 1 to {depth}", self.atoms)));
        }
        // The matrices that the dictionaries replace are drawn too, so that the others are those of a model without.
        let mut made = Untied.sites(gpu, depth, matrices, rng)?;
        for (i, matrix) in matrices.iter().take(if self.output { 4 } else { 3 }).enumerate() {
            let dictionary = Dictionary::random(gpu, depth, self.atoms, matrix.size, matrix.std, rng);
            for (t, sites) in made.by_depth.iter_mut().enumerate() {
                sites[i] = dictionary.site(t);
            }
            made.dictionaries.push(dictionary);
        }
        Ok(made)
    }
}

struct LowRankAttention {
    rank: usize,
}

impl Recipe for LowRankAttention {
    fn text(&self) -> String {
        format!("low-rank {}", self.rank)
    }
    fn sites(&self, gpu: &Gpu, depth: usize, matrices: &[Matrix], rng: &mut Rng) -> Result<Sites> {
        if self.rank == 0 {
            return Err(Error::config("the rank must be at least 1"));
        }
        let mut block = |_| {
            let stored = drawn(gpu, matrices, rng);
            let site = |(i, theta): (usize, &Tensor)| match i {
                // Two factors with the initial variance of the matrix.
                0..4 => {
                    let ([out, inner], std) = (matrices[i].size, matrices[i].std);
                    let a = Init::Normal((1.0 / inner as f32).sqrt()).leaf(gpu, [self.rank, inner], rng);
                    let std = std * (inner as f32 / self.rank as f32).sqrt();
                    let b = Init::Normal(std).leaf(gpu, [out, self.rank], rng);
                    Factored::new(&a, &b).shared()
                }
                _ => tied(theta),
            };
            stored.iter().enumerate().map(site).collect()
        };
        Ok(Sites { by_depth: (0..depth).map(&mut block).collect(), dictionaries: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_back() {
        let all = [
            Sharing::none(),
            Sharing::tied(),
            Sharing::tied_lora(4, 0.5),
            Sharing::cycle(2, 0),
            Sharing::fold(3),
            Sharing::dictionary(2, true),
            Sharing::low_rank(16),
        ];
        for sharing in all {
            assert_eq!(Sharing::named(&sharing.text()).unwrap(), sharing);
        }
        assert_eq!(lock(&KNOWN).len(), BUILT_IN.len());
        assert!(lock(&KNOWN).keys().all(|name| BUILT_IN.contains(name)));
        for wrong in [
            "",
            "tied 3",
            "cycle",
            "cycle two rank 0",
            "cycle 2 rank",
            "dictionary 2",
            "tied-lora 4",
            "fold 2 3",
        ] {
            assert!(
                Sharing::named(wrong).unwrap_err().to_string().contains(&format!("'{wrong}'")),
                "{wrong}"
            );
        }
    }
}
