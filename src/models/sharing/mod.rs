//! What the depths of a model share: recipes from which a model makes the sites of its matrices. Kinds of your own are recipes
//! as much as the built-in ones.

mod made;
mod parts;
mod recipe;
mod recipes;
mod whole;

pub use made::Made;
pub use recipe::{Matrix, Recipe, Sharing, Sites, Stack};
pub(crate) use recipes::{PROJECTIONS, own_rank};

use crate::error::{Error, Result};
use crate::gpu::lock;
use parts::Parts;
use recipes::{Cycle, LowRankAttention, Masa, MasaGroups, Stages, Untied};
use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex};
pub(crate) use whole::{Hash, HashMapping, MOST_SHARED};

/// Makes a recipe of the words after its name.
pub type Parse = fn(words: &[&str]) -> Result<Sharing>;

impl Sharing {
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
        Sharing::new(Stages::Every(group))
    }

    /// Stages of these sizes, each of neighbouring depths that share their matrices (SWS). `stages 3 3 4 3 3`
    pub fn stages(sizes: &[usize]) -> Sharing {
        Sharing::new(Stages::Sizes(sizes.to_vec()))
    }

    /// A dictionary of `atoms` atoms for each projection of attention (MASA). Each depth has its own other matrices. `output`
    /// says whether the output projection comes from a dictionary too (QKVO), or is each depth's own (QKV). `dictionary 2 output
    /// true`
    pub fn dictionary(atoms: usize, output: bool) -> Sharing {
        Sharing::new(Masa { atoms, output, net: false })
    }

    /// [`Sharing::dictionary`] whose coefficients a small network makes of a vector for each depth, as in the paper's training.
    /// `dictionary 2 output true net`
    pub fn dictionary_net(atoms: usize, output: bool) -> Sharing {
        Sharing::new(Masa { atoms, output, net: true })
    }

    /// Dictionaries of q, k, v and o for each group of neighbouring depths, and for each depth a low-rank part of its own, half as
    /// large for k and v: what MASA makes of a pretrained model. `masa groups 1,29 atoms 1,23 rank 64`
    pub fn masa(groups: &[usize], atoms: &[usize], rank: usize) -> Sharing {
        Sharing::new(MasaGroups { groups: groups.to_vec(), atoms: atoms.to_vec(), rank })
    }

    /// Nothing is shared, but the attention matrices of each depth have this rank. `low-rank 16`
    pub fn low_rank(rank: usize) -> Sharing {
        Sharing::new(LowRankAttention { rank })
    }

    /// Every matrix of every depth and the tables read one store that has `1 / factor` as many numbers, each weight with a sign and the
    /// factor that gives it its usual deviation (STABLE-RPS). `hashed 4`, `hashed 4 roast`, `hashed 4 element`
    pub fn hashed(factor: f64) -> Sharing {
        Sharing::new(Hash { factor, mapping: HashMapping::Stable })
    }

    /// Different recipes for named matrices, and one for the rest. `q k v: dictionary 2 output true; up down: tied; none`
    pub fn parts(named: &[(&[&str], Sharing)], rest: Sharing) -> Sharing {
        let own = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        let named = named.iter().map(|(names, sharing)| (own(names), sharing.clone())).collect();
        Sharing::new(Parts { named, rest })
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
    /// use tiebeam::models::sharing::Sharing;
    ///
    /// assert_eq!(Sharing::named("cycle 2 rank 8")?, Sharing::cycle(2, 8));
    /// assert!(Sharing::named("circulant").is_err(), "nobody has registered it");
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] with the known names, if it has another; when its words cannot be read.
    pub fn named(text: &str) -> Result<Sharing> {
        if text.contains(';') {
            return parts_named(text);
        }
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
}

/// The names of the recipes above.
const BUILT_IN: [&str; 10] =
    ["none", "tied", "tied-lora", "cycle", "fold", "stages", "dictionary", "masa", "low-rank", "hashed"];

/// The parsers of all recipes by name.
static KNOWN: LazyLock<Mutex<BTreeMap<&'static str, Parse>>> = LazyLock::new(|| {
    let own: [(&str, Parse); 10] = [
        ("none", |words| values(words, [], |[]: [usize; 0]| Sharing::none())),
        ("tied", |words| values(words, [], |[]: [usize; 0]| Sharing::tied())),
        ("tied-lora", |words| match words {
            ["rank", rank, "scale", scale] => {
                let scale: f32 = value(scale)?;
                match scale.is_finite() {
                    true => Ok(Sharing::tied_lora(value(rank)?, scale)),
                    false => Err(Error::config(format!("a scale of {scale}; it is a number"))),
                }
            }
            ["rank", rank] => Ok(Sharing::tied_lora(value(rank)?, 1.0)),
            _ => Err(Error::config("write `tied-lora rank 8 scale 1`")),
        }),
        ("cycle", |words| values(words, ["", "rank"], |[blocks, rank]| Sharing::cycle(blocks, rank))),
        ("fold", |words| values(words, [""], |[group]| Sharing::fold(group))),
        ("dictionary", |words| match words {
            [atoms, "output", output] => Ok(Sharing::dictionary(value(atoms)?, value(output)?)),
            [atoms, "output", output, "net"] => Ok(Sharing::dictionary_net(value(atoms)?, value(output)?)),
            _ => Err(Error::config("write `dictionary 2 output true`, and `net` behind it for a network")),
        }),
        ("stages", |words| {
            Ok(Sharing::stages(&words.iter().map(|word| value(word)).collect::<Result<Vec<_>>>()?))
        }),
        ("masa", |words| match words {
            ["groups", groups, "atoms", atoms, "rank", rank] => {
                Ok(Sharing::masa(&listed(groups)?, &listed(atoms)?, value(rank)?))
            }
            _ => Err(Error::config("write `masa groups 1,29 atoms 1,23 rank 64`")),
        }),
        ("hashed", |words| {
            let [factor, mapping @ ..] = words else { return Err(Error::config("write `hashed 4`")) };
            let mapping = match mapping {
                [] => Some(HashMapping::Stable),
                [name] => {
                    HashMapping::ALL.into_iter().find(|(own, _)| own == name).map(|(_, mapping)| mapping)
                }
                _ => None,
            };
            let known = HashMapping::ALL.map(|(name, _)| name).join(", ");
            let mapping =
                mapping.ok_or_else(|| Error::config(format!("behind the factor stands one of {known}")))?;
            Ok(Sharing::new(Hash { factor: value(factor)?, mapping }))
        }),
        ("low-rank", |words| values(words, [""], |[rank]| Sharing::low_rank(rank))),
    ];
    Mutex::new(own.into())
});

fn value<T: std::str::FromStr>(word: &str) -> Result<T> {
    word.parse().map_err(|_| Error::config(format!("cannot read '{word}'")))
}

fn listed(words: &str) -> Result<Vec<usize>> {
    words.split(',').map(value).collect()
}

/// Reads `names: recipe; names: recipe; recipe`.
fn parts_named(text: &str) -> Result<Sharing> {
    let wrong = |what: String| Error::config(format!("sharing '{text}': {what}"));
    let all: Vec<&str> = text.split(';').map(str::trim).collect();
    let mut named = Vec::new();
    for part in &all[..all.len() - 1] {
        let (names, recipe) = part
            .split_once(':')
            .ok_or_else(|| wrong(format!("`{part}` names no matrices; write `q k: tied; none`")))?;
        let names: Vec<String> = names.split_whitespace().map(String::from).collect();
        if names.is_empty() {
            return Err(wrong(format!("`{part}` names no matrices; write `q k: tied; none`")));
        }
        named.push((names, Sharing::named(recipe.trim())?));
    }
    let rest = all[all.len() - 1];
    if rest.contains(':') {
        return Err(wrong(
            "the recipe of the remaining matrices stands last; write `; none` behind it".into(),
        ));
    }
    Ok(Sharing::new(Parts { named, rest: Sharing::named(rest)? }))
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
            Sharing::stages(&[3, 3, 4, 3, 3]),
            Sharing::dictionary_net(2, false),
            Sharing::masa(&[1, 29], &[1, 23], 64),
            Sharing::hashed(2.5),
            Sharing::named("hashed 4 roast").unwrap(),
            Sharing::parts(&[(&["q", "k"], Sharing::tied()), (&["up"], Sharing::fold(2))], Sharing::none()),
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
            "tied-lora rank 4 scale nan",
            "fold 2 3",
            "stages two",
            "masa groups 1 atoms 1",
            "hashed",
            "hashed 2 twice",
            "q: tied",
            "q tied; none",
            "q: tied; k: tied",
        ] {
            assert!(
                Sharing::named(wrong).unwrap_err().to_string().contains(&format!("'{wrong}'")),
                "{wrong}"
            );
        }
    }
}
