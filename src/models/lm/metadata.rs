//! The settings of a language model as pairs of words: in the metadata of its file, and in files that people write.

use super::config::{ExpertsConfig, LINEARS, LmConfig, MlpKind, NormKind, Positions};
use super::scaling::RopeScaling;
use crate::error::{Error, Result};
use crate::models::sharing::Sharing;
use crate::ops::sequence::rope::Pairing;
use crate::store::nearest;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

/// The version of the settings in a file. Files of version 1 are those of `Recursive`, whose settings had no version.
pub(super) const VERSION: u32 = 2;

/// What stands before the name of a setting in a file's metadata, which holds other things too.
const PREFIX: &str = "lm.";

/// The names of all settings.
const KEYS: [&str; 23] = [
    "vocab",
    "width",
    "heads",
    "kv_heads",
    "head_width",
    "hidden",
    "depth",
    "ends",
    "context",
    "norm",
    "eps",
    "shared_norms",
    "positions",
    "rope_base",
    "rope_scaling",
    "pairing",
    "window",
    "window_from",
    "mlp",
    "experts",
    "biases",
    "tied_head",
    "sharing",
];

const NORMS: [(&str, NormKind); 2] = [("rms", NormKind::Rms), ("layer", NormKind::Layer)];
const POSITIONS: [(&str, Positions); 3] =
    [("rotary", Positions::Rotary), ("learned", Positions::Learned), ("none", Positions::None)];
const MLPS: [(&str, MlpKind); 2] = [("swiglu", MlpKind::SwiGlu), ("gelu", MlpKind::Gelu)];
const PAIRINGS: [(&str, Pairing); 2] = [("halves", Pairing::Halves), ("neighbours", Pairing::Neighbours)];

/// The word of a kind.
fn word<K: PartialEq + Copy>(kinds: &[(&'static str, K)], kind: K) -> String {
    kinds.iter().find(|(_, own)| *own == kind).map_or("", |(word, _)| word).into()
}

/// Settings by name, from a place that errors name.
struct Pairs<'a> {
    pairs: &'a BTreeMap<String, String>,
    place: &'a str,
}

impl Pairs<'_> {
    fn wrong(&self, message: impl Display) -> Error {
        Error::config(format!("{}: {message}", self.place))
    }

    /// A setting, or what `read` makes of its text.
    fn or<T>(&self, key: &str, otherwise: T, read: impl FnOnce(&str) -> Result<T, String>) -> Result<T> {
        match self.pairs.get(key) {
            None => Ok(otherwise),
            Some(text) => read(text).map_err(|what| self.wrong(format!("`{key}` is '{text}', and {what}"))),
        }
    }

    fn size(&self, key: &str, otherwise: Option<usize>) -> Result<usize> {
        let found = self.or(key, otherwise, |text| number(text).map(Some))?;
        found.ok_or_else(|| self.wrong(format!("`{key}` is missing, a whole number")))
    }

    fn some(&self, key: &str) -> Result<Option<usize>> {
        self.or(key, None, |text| number(text).map(Some))
    }

    fn kind<K: Copy>(&self, key: &str, kinds: &[(&'static str, K)], otherwise: K) -> Result<K> {
        self.or(key, otherwise, |text| {
            let known = kinds.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
            let found = kinds.iter().find(|(word, _)| *word == text);
            found.map(|(_, kind)| *kind).ok_or_else(|| format!("must be one of {known}"))
        })
    }
}

fn number<T: FromStr>(text: &str) -> Result<T, String> {
    text.trim().parse().map_err(|_| "cannot be read as a number".into())
}

fn flag(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "must be true or false".into())
}

/// The hidden width of an MLP, if nothing says it: four times the width, or two thirds of that with a gate, which has a third matrix.
fn usual_hidden(width: usize, mlp: MlpKind) -> usize {
    match mlp {
        MlpKind::Gelu => 4 * width,
        MlpKind::SwiGlu => (8 * width / 3).next_multiple_of(32),
    }
}

fn ends(text: &str) -> Result<[usize; 2], String> {
    let all: Result<Vec<usize>, String> = text.split_whitespace().map(number).collect();
    all?.try_into().map_err(|_| "must be two numbers, of first and of last blocks".into())
}

fn biases(text: &str) -> Result<[bool; 7], String> {
    let named: Vec<&str> = text.split_whitespace().collect();
    if let Some(name) = named.iter().find(|name| !LINEARS.contains(name)) {
        return Err(format!("`{name}` is none of {}", LINEARS.join(", ")));
    }
    Ok(LINEARS.map(|name| named.contains(&name)))
}

fn experts(text: &str) -> Result<Option<ExpertsConfig>, String> {
    let how = "must be such as `8 top 2 capacity 1.25 balance 0.01`";
    let words: Vec<&str> = text.split_whitespace().collect();
    let [count, rest @ ..] = &words[..] else { return Err(how.into()) };
    let mut all = ExpertsConfig { count: number(count)?, top: 1, capacity: 1.25, balance: 0.01 };
    for pair in rest.chunks(2) {
        match pair {
            ["top", top] => all.top = number(top)?,
            ["capacity", capacity] => all.capacity = number(capacity)?,
            ["balance", balance] => all.balance = number(balance)?,
            _ => return Err(how.into()),
        }
    }
    Ok(Some(all))
}

impl RopeScaling {
    /// Name and numbers in words.
    fn text(self) -> String {
        match self {
            RopeScaling::None => "none".into(),
            RopeScaling::Linear { factor } => format!("linear {factor}"),
            RopeScaling::Llama3 { factor, low, high, original } => {
                format!("llama3 {factor} {low} {high} {original}")
            }
            RopeScaling::Yarn { factor, original, fast, slow, attention } => {
                format!("yarn {factor} {original} {fast} {slow} {attention}")
            }
        }
    }

    /// Reads what [`RopeScaling::text`] wrote.
    fn named(text: &str) -> Result<RopeScaling, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [name, numbers @ ..] = &words[..] else { return Err("is empty".into()) };
        let numbers: Result<Vec<f64>, String> = numbers.iter().map(|word| number(word)).collect();
        match (*name, &numbers?[..]) {
            ("none", []) => Ok(RopeScaling::None),
            ("linear", &[factor]) => Ok(RopeScaling::Linear { factor }),
            ("llama3", &[factor, low, high, original]) => {
                Ok(RopeScaling::Llama3 { factor, low, high, original })
            }
            ("yarn", &[factor, original, fast, slow, attention]) => {
                Ok(RopeScaling::Yarn { factor, original, fast, slow, attention })
            }
            _ => Err("must be none, linear, llama3 or yarn with its numbers".into()),
        }
    }
}

impl LmConfig {
    /// Name and text of every setting, as [`LmConfig::from_settings`] reads them.
    pub fn settings(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        let mut put = |key: &str, value: &dyn Display| all.insert(key.to_string(), value.to_string());
        put("vocab", &self.vocab);
        put("width", &self.width);
        put("heads", &self.heads);
        put("kv_heads", &self.kv_heads);
        if let Some(width) = self.head_width {
            put("head_width", &width);
        }
        put("hidden", &self.hidden);
        put("depth", &self.depth);
        put("ends", &format_args!("{} {}", self.ends[0], self.ends[1]));
        put("context", &self.context);
        put("norm", &word(&NORMS, self.norm));
        put("eps", &self.eps);
        put("shared_norms", &self.shared_norms);
        put("positions", &word(&POSITIONS, self.positions));
        put("rope_base", &self.rope_base);
        put("rope_scaling", &self.rope_scaling.text());
        put("pairing", &word(&PAIRINGS, self.pairing));
        if let Some(window) = self.window {
            put("window", &window);
            put("window_from", &self.window_from);
        }
        put("mlp", &word(&MLPS, self.mlp));
        if let Some(ExpertsConfig { count, top, capacity, balance }) = self.experts {
            put("experts", &format_args!("{count} top {top} capacity {capacity} balance {balance}"));
        }
        let biased = LINEARS.iter().zip(self.biases).filter(|(_, has)| *has).map(|(name, _)| *name);
        put("biases", &biased.collect::<Vec<_>>().join(" "));
        put("tied_head", &self.tied_head);
        put("sharing", &self.sharing.text());
        all
    }

    /// Reads settings by name. `vocab`, `width`, `heads`, `depth` and `context` must be there; of the others, `kv_heads` is `heads`,
    /// `hidden` follows from the width, and the rest is that of a small Llama of which nothing is shared. `place` says in errors where
    /// they are from.
    ///
    /// ```
    /// use tiebeam::models::lm::LmConfig;
    /// let settings = [("vocab", "256"), ("width", "96"), ("heads", "3"), ("depth", "4"), ("context", "64"), ("sharing", "tied")];
    /// let settings = settings.map(|(name, text)| (name.to_string(), text.to_string())).into();
    /// let config = LmConfig::from_settings(&settings, "lm.toml")?;
    /// assert_eq!((config.kv_heads, config.hidden), (3, 256));
    /// assert_eq!(LmConfig::from_settings(&config.settings(), "again")?, config);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown name, a missing one, text that cannot be read, and sizes that make no model. A sharing kind from
    /// outside must be [registered](Sharing::register).
    pub fn from_settings(settings: &BTreeMap<String, String>, place: &str) -> Result<LmConfig> {
        let of = Pairs { pairs: settings, place };
        if let Some(key) = settings.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let near = nearest(key, KEYS.into_iter());
            return Err(of.wrong(format!("there is no setting `{key}`; the nearest are {near}")));
        }
        let plain = LmConfig::default();
        let (width, heads) = (of.size("width", None)?, of.size("heads", None)?);
        let mlp = of.kind("mlp", &MLPS, plain.mlp)?;
        let config = LmConfig {
            vocab: of.size("vocab", None)?,
            width,
            heads,
            kv_heads: of.size("kv_heads", Some(heads))?,
            head_width: of.some("head_width")?,
            hidden: of.size("hidden", Some(usual_hidden(width.min(1 << 31), mlp)))?,
            depth: of.size("depth", None)?,
            ends: of.or("ends", plain.ends, ends)?,
            context: of.size("context", None)?,
            norm: of.kind("norm", &NORMS, plain.norm)?,
            eps: of.or("eps", plain.eps, number)?,
            shared_norms: of.or("shared_norms", plain.shared_norms, flag)?,
            positions: of.kind("positions", &POSITIONS, plain.positions)?,
            rope_base: of.or("rope_base", plain.rope_base, number)?,
            rope_scaling: of.or("rope_scaling", plain.rope_scaling, RopeScaling::named)?,
            pairing: of.kind("pairing", &PAIRINGS, plain.pairing)?,
            window: of.some("window")?,
            window_from: of.size("window_from", Some(0))?,
            mlp,
            experts: of.or("experts", None, experts)?,
            biases: of.or("biases", plain.biases, biases)?,
            tied_head: of.or("tied_head", plain.tied_head, flag)?,
            sharing: of
                .or("sharing", plain.sharing, |text| Sharing::named(text).map_err(|e| e.to_string()))?,
        };
        config.check(place)?;
        Ok(config)
    }

    /// The settings and their version for the metadata of a model's file.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let own = self.settings().into_iter().map(|(key, value)| (format!("{PREFIX}{key}"), value));
        own.chain([(format!("{PREFIX}version"), VERSION.to_string())]).collect()
    }

    /// Whether a file with this metadata is a language model of this library.
    pub fn is_in(metadata: &BTreeMap<String, String>) -> bool {
        metadata.contains_key("lm.version") || LmConfig::is_first_version(metadata)
    }

    /// Models of the first version had RMS norms, learned positions and GELU, and their settings had no prefix.
    fn is_first_version(metadata: &BTreeMap<String, String>) -> bool {
        let keys = ["vocab", "width", "heads", "hidden", "context", "depth", "sharing"];
        keys.iter().all(|key| metadata.contains_key(*key))
    }

    /// Reads what [`LmConfig::metadata`] wrote, of this version or an earlier one.
    ///
    /// # Errors
    /// [`Error::Config`] for a file without settings or of a newer version, and as [`LmConfig::from_settings`].
    pub fn from_metadata(metadata: &BTreeMap<String, String>, place: &str) -> Result<LmConfig> {
        let wrong = |message: String| Err(Error::config(format!("{place}: {message}")));
        match metadata.get("lm.version").map(|text| (text, text.parse::<u32>())) {
            Some((_, Ok(VERSION))) => {
                let own = metadata.iter().filter_map(|(key, value)| Some((key.strip_prefix(PREFIX)?, value)));
                let own = own.filter(|(key, _)| *key != "version");
                let own = own.map(|(key, value)| (key.to_string(), value.clone())).collect();
                LmConfig::from_settings(&own, place)
            }
            None if LmConfig::is_first_version(metadata) => {
                let own = KEYS.iter().filter_map(|key| Some((key.to_string(), metadata.get(*key)?.clone())));
                let form = [("positions", "learned"), ("mlp", "gelu"), ("norm", "rms")];
                let form = form.map(|(key, value)| (key.to_string(), value.to_string()));
                LmConfig::from_settings(&own.chain(form).collect(), place)
            }
            None => wrong("there is no language model in its metadata; a file of Lm::save has one".into()),
            Some((version, _)) => wrong(format!(
                "a language model of version {version}, and this program reads versions up to {VERSION}; use a newer one"
            )),
        }
    }
}
