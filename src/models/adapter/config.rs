//! What an adapter is, and the settings of PEFT that say it.

use crate::error::{Error, Result};
use crate::models::llama::PATHS;
use crate::models::lm::LINEARS;
use crate::share::ShardConfig;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// The kinds of adapters.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum AdapterKind {
    /// `W + scale B A`, with `scale = alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA. arXiv 2106.09685, 2312.03732
    Lora {
        /// Rows of A.
        rank: usize,
        /// The factor before it is divided.
        alpha: f32,
        /// Whether it is divided by the square root of the rank.
        rslora: bool,
    },
    /// LoRA whose A and B are assembled from shards that all depths share. arXiv 2410.00938
    Mos(ShardConfig),
    /// A shard `[rank, out]` that is repeated along the inputs. arXiv 2409.15371
    Miss {
        /// Rows of the shard.
        rank: usize,
    },
    /// Blocks of `rank x rank` by which those of the weight are multiplied. arXiv 2409.15371
    Bone {
        /// The side of a block.
        rank: usize,
    },
}

/// A kind of adapter, and the layers that get one at every depth.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AdapterConfig {
    /// The kind.
    pub kind: AdapterKind,
    /// Names in [`LINEARS`].
    pub targets: Vec<&'static str>,
}

/// The layer of a name such as `q`, `q_proj` or `self_attn.q_proj`.
fn linear(name: &str) -> Option<&'static str> {
    let found = (0..LINEARS.len()).find(|&i| {
        let short = PATHS[i].rsplit('.').next();
        name == LINEARS[i] || Some(name) == short || PATHS[i] == name
    });
    found.map(|i| LINEARS[i])
}

/// The path of a layer's tensors in PEFT's files, without their own names.
pub(super) fn path(depth: usize, matrix: &str) -> String {
    format!("base_model.model.model.{}", short(depth, matrix))
}

/// The path in a model's own names.
pub(super) fn short(depth: usize, matrix: &str) -> String {
    let at = LINEARS.iter().position(|own| *own == matrix).unwrap_or_default();
    format!("layers.{depth}.{}", PATHS[at])
}

/// What PEFT's settings say.
pub(super) struct Said {
    pub config: AdapterConfig,
    /// All of them.
    pub all: Map<String, Value>,
    /// Layers that have an alpha of their own, by the ends of their paths.
    alphas: Vec<(String, f32)>,
}

/// The name of the settings in a folder.
pub const SETTINGS: &str = "adapter_config.json";

impl Said {
    /// Reads the settings of a folder.
    pub fn open(folder: &Path) -> Result<Said> {
        let path = folder.join(SETTINGS);
        let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, error))?;
        AdapterConfig::from_json(&text, &path)
    }

    /// By how much more than by the common alpha a layer's part is multiplied.
    ///
    /// # Errors
    /// The names by which it has two.
    pub fn factor(&self, depth: usize, matrix: &str) -> Result<f32, String> {
        self.factor_of(&path(depth, matrix))
    }

    /// The factor of the product of a layer's matrices of LoRA, by its path and its rank.
    ///
    /// # Errors
    /// As [`Said::factor`].
    pub fn scale(&self, path: &str, rank: usize) -> Result<f32, String> {
        let AdapterKind::Lora { alpha, rslora, .. } = self.config.kind else { return Ok(1.0) };
        let divisor = if rslora { (rank as f32).sqrt() } else { rank as f32 };
        Ok(self.factor_of(&format!(".{path}"))? * alpha / divisor)
    }

    fn factor_of(&self, path: &str) -> Result<f32, String> {
        let AdapterKind::Lora { alpha, .. } = self.config.kind else { return Ok(1.0) };
        let is_end = |key: &str| path.strip_suffix(key).is_some_and(|before| before.ends_with('.'));
        let own: Vec<_> = self.alphas.iter().filter(|(key, _)| is_end(key)).collect();
        match own[..] {
            [] => Ok(1.0),
            [(_, own)] => Ok(own / alpha),
            [(a, _), (b, _), ..] => Err(format!("`alpha_pattern` names {path} by '{a}' and by '{b}'")),
        }
    }
}

/// The depth, the layer and the tensor's own name of a tensor in PEFT's files.
pub(super) fn place(name: &str) -> Option<(usize, &'static str, &str)> {
    let rest = name.strip_prefix("base_model.model.")?;
    let rest = rest.strip_prefix("model.").unwrap_or(rest).strip_prefix("layers.")?;
    let (depth, rest) = rest.split_once('.')?;
    let at = PATHS.iter().position(|path| rest.strip_prefix(path).is_some_and(|end| end.starts_with('.')))?;
    Some((depth.parse().ok()?, LINEARS[at], &rest[PATHS[at].len() + 1..]))
}

impl AdapterConfig {
    /// An adapter of this kind on these layers: names in [`LINEARS`], or as PEFT writes them, `q_proj`.
    ///
    /// ```
    /// use tiebeam::models::adapter::{AdapterConfig, AdapterKind};
    /// let config = AdapterConfig::new(AdapterKind::Miss { rank: 16 }, &["q_proj", "v"])?;
    /// assert_eq!(config.targets, ["q", "v"]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for another name, no name, or a rank of 0.
    pub fn new(kind: AdapterKind, targets: &[&str]) -> Result<AdapterConfig> {
        let known = |name: &&str| {
            linear(name).ok_or_else(|| {
                Error::config(format!(
                    "adapter: `{name}` is no linear layer of a block; there are {}",
                    LINEARS.join(", ")
                ))
            })
        };
        let mut targets: Vec<&'static str> = targets.iter().map(known).collect::<Result<_>>()?;
        targets.sort_by_key(|name| LINEARS.iter().position(|own| own == name));
        targets.dedup();
        let config = AdapterConfig { kind, targets };
        if config.targets.is_empty() || config.rank() == 0 {
            return Err(Error::config("adapter: it needs a layer and a rank of 1 or more"));
        }
        match kind {
            AdapterKind::Lora { alpha, .. } | AdapterKind::Mos(ShardConfig { alpha, .. })
                if !(alpha.is_finite() && alpha > 0.0) =>
            {
                Err(Error::config(format!("adapter: alpha is {alpha}; it must be above 0")))
            }
            _ => Ok(config),
        }
    }

    /// The settings of an adapter's folder.
    ///
    /// # Errors
    /// [`Error::Io`] when they cannot be read; [`Error::Format`] for another kind of adapter, or what is not computed.
    pub fn open(folder: impl AsRef<Path>) -> Result<AdapterConfig> {
        Said::open(folder.as_ref()).map(|said| said.config)
    }

    /// The rank.
    pub fn rank(&self) -> usize {
        match self.kind {
            AdapterKind::Lora { rank, .. } | AdapterKind::Miss { rank } | AdapterKind::Bone { rank } => rank,
            AdapterKind::Mos(config) => config.rank,
        }
    }

    /// The text of `adapter_config.json`. A mixture of shards has the type `MOS`, which PEFT does not have. Layers that have a part at some
    /// depths only are named with these.
    pub(super) fn json(
        &self,
        base: &str,
        swapped: bool,
        depths: &dyn Fn(&str) -> Option<Vec<usize>>,
        ranks: &BTreeMap<String, usize>,
    ) -> Value {
        let at = |name: &str| LINEARS.iter().position(|own| *own == name).unwrap_or_default();
        let named = |name: &&str| match depths(name) {
            None => vec![PATHS[at(name)].rsplit('.').next().unwrap_or_default().to_string()],
            Some(some) => some.iter().map(|&depth| short(depth, name)).collect(),
        };
        let targets: Vec<String> = self.targets.iter().flat_map(named).collect();
        let mut all = json!({
            "base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": true, "bias": "none",
            "target_modules": targets, "r": self.rank(),
        });
        let own = match self.kind {
            AdapterKind::Lora { alpha, rslora, .. } => {
                json!({
                    "peft_type": "LORA", "lora_alpha": alpha, "lora_dropout": 0.0, "use_rslora": rslora,
                    "rank_pattern": ranks,
                })
            }
            AdapterKind::Miss { .. } => json!({"peft_type": "MISS", "init_weights": true}),
            AdapterKind::Bone { .. } => json!({"peft_type": "MISS", "init_weights": "bat"}),
            AdapterKind::Mos(ShardConfig { budget, shards, private, alpha, .. }) => json!({
                "peft_type": "MOS", "mos_budget": budget, "mos_shards": shards, "mos_private": private,
                "mos_alpha": alpha, "mos_rows": if swapped { "neighbours" } else { "halves" },
            }),
        };
        for (key, value) in own.as_object().into_iter().flatten() {
            all[key] = value.clone();
        }
        all
    }

    /// Reads the text of `adapter_config.json`.
    ///
    /// # Errors
    /// [`Error::Format`] for another kind of adapter, and for a setting that changes what is computed and is not known here.
    pub(super) fn from_json(text: &str, path: &Path) -> Result<Said> {
        let wrong = |message: String| Error::format(path, message);
        let json: Value = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        let all = json.as_object().ok_or_else(|| wrong("it is no object".into()))?.clone();
        let of = Settings { all: &all, path };
        let kind = all.get("peft_type").and_then(Value::as_str).unwrap_or("missing");
        let rank = of.size("r")?;
        let kind = match (kind, all.get("init_weights").unwrap_or(&Value::Null)) {
            ("LORA", _) => {
                of.check_lora()?;
                let alpha = of.number("lora_alpha")? as f32;
                if alpha == 0.0 {
                    return Err(wrong("`lora_alpha` is 0, so that the adapter does nothing".into()));
                }
                AdapterKind::Lora { rank, alpha, rslora: all.get("use_rslora") == Some(&Value::Bool(true)) }
            }
            ("MISS" | "BONE", Value::String(form)) if form == "bat" => AdapterKind::Bone { rank },
            ("MISS" | "BONE", Value::Null | Value::Bool(_)) => AdapterKind::Miss { rank },
            ("MISS" | "BONE", Value::String(form)) if form == "mini" => AdapterKind::Miss { rank },
            ("MOS", _) => {
                let config = ShardConfig::new(rank, of.size("mos_budget")?).shards(of.size("mos_shards")?);
                let config = config.private(of.whole("mos_private")?).alpha(of.number("mos_alpha")? as f32);
                AdapterKind::Mos(config)
            }
            (kind, form) => {
                return Err(wrong(format!(
                    "an adapter of the type '{kind}' (init_weights {form}); LORA, MISS and MOS are read"
                )));
            }
        };
        of.check_common()?;
        let names: Vec<&str> = match all.get("target_modules") {
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            // `all-linear` and patterns: what there is, the tensors say.
            _ => LINEARS.to_vec(),
        };
        let short = |name: &&str| linear(name.rsplit('.').next().unwrap_or_default());
        let targets: Vec<&'static str> = LINEARS
            .into_iter()
            .filter(|own| names.iter().filter_map(short).any(|name| name == *own))
            .collect();
        let config = match kind {
            AdapterKind::Mos(_) => {
                AdapterConfig::new(kind, &targets).map_err(|error| wrong(error.to_string()))?
            }
            _ => AdapterConfig { kind, targets },
        };
        let alphas = of.alphas()?;
        Ok(Said { config, alphas, all })
    }
}

struct Settings<'a> {
    all: &'a Map<String, Value>,
    path: &'a Path,
}

impl Settings<'_> {
    fn wrong(&self, message: String) -> Error {
        Error::format(self.path, message)
    }

    fn number(&self, key: &str) -> Result<f64> {
        let found = self.all.get(key).and_then(Value::as_f64).filter(|x| x.is_finite());
        found.ok_or_else(|| self.wrong(format!("there is no number `{key}`")))
    }

    fn whole(&self, key: &str) -> Result<usize> {
        let found = self.all.get(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        found.filter(|n| *n < 1 << 31).ok_or_else(|| self.wrong(format!("there is no whole number `{key}`")))
    }

    fn size(&self, key: &str) -> Result<usize> {
        let found = self.whole(key)?;
        if found == 0 { Err(self.wrong(format!("`{key}` is 0"))) } else { Ok(found) }
    }

    /// Refuses a setting that is neither off nor one of these.
    fn off(&self, key: &str, others: &[Value]) -> Result<()> {
        let nothing = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(all) => all.is_empty(),
            other => others.contains(other),
        };
        match self.all.get(key).filter(|value| !nothing(value)) {
            None => Ok(()),
            Some(value) => Err(self.wrong(format!("`{key}` is {value}, which is not computed"))),
        }
    }

    fn check_common(&self) -> Result<()> {
        self.off("bias", &["none".into()])?;
        ["modules_to_save", "fan_in_fan_out"].iter().try_for_each(|key| self.off(key, &[]))
    }

    /// The layers that have an alpha of their own.
    fn alphas(&self) -> Result<Vec<(String, f32)>> {
        let Some(Value::Object(all)) = self.all.get("alpha_pattern") else {
            return self.off("alpha_pattern", &[]).map(|()| Vec::new());
        };
        let plain = |key: &str| key.chars().all(|c| c.is_ascii_alphanumeric() || "._".contains(c));
        let one = |(key, value): (&String, &Value)| match value.as_f64().filter(|x| x.is_finite()) {
            Some(alpha) if plain(key) => Ok((key.clone(), alpha as f32)),
            Some(_) => Err(self.wrong(format!("`alpha_pattern` has '{key}'; names are read, not patterns"))),
            None => Err(self.wrong(format!("`alpha_pattern` has {value} for '{key}'"))),
        };
        all.iter().map(one).collect()
    }

    /// LoRA has many relatives that have its type and other weights. Some change the base's weights before they begin, so that the
    /// difference alone says nothing.
    fn check_lora(&self) -> Result<()> {
        let fine = [Value::Bool(true), "gaussian".into(), "eva".into(), "orthogonal".into()];
        self.off("init_lora_weights", &fine)?;
        let keys = [
            "use_dora",
            "lora_bias",
            "layer_replication",
            "use_qalora",
            "use_bdlora",
            "kasa_config",
            "velora_config",
            "monteclora_config",
            "arrow_config",
            "alora_invocation_tokens",
            "trainable_token_indices",
            "target_parameters",
            "loftq_config",
        ];
        keys.iter().try_for_each(|key| self.off(key, &[]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_those_of_peft() {
        let name = format!("{}.lora_A.weight", path(7, "down"));
        assert_eq!(name, "base_model.model.model.layers.7.mlp.down_proj.lora_A.weight");
        assert_eq!(place(&name), Some((7, "down", "lora_A.weight")));
        assert_eq!(place("base_model.model.lm_head.lora_A.weight"), None);
        assert_eq!(place("base_model.model.model.layers.x.mlp.down_proj.a"), None);
    }

    #[test]
    fn settings_that_change_the_computation_are_refused() {
        let read = |text: &str| AdapterConfig::from_json(text, Path::new("a.json")).map(|said| said.config);
        let plain = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]"#;
        let kind = AdapterKind::Lora { rank: 4, alpha: 8.0, rslora: false };
        assert_eq!(read(&format!("{plain}}}")).unwrap(), AdapterConfig { kind, targets: vec!["q"] });
        for wrong in [
            r#""use_dora": true"#,
            r#""bias": "all""#,
            r#""modules_to_save": ["lm_head"]"#,
            r#""init_lora_weights": "pissa""#,
            r#""loftq_config": {"bits": 4}"#,
        ] {
            let error = read(&format!("{plain}, {wrong}}}")).unwrap_err().to_string();
            assert!(error.contains("which is not computed"), "{error}");
        }
        for (pattern, want) in [(r#"{".*q_proj": 3}"#, "not patterns"), (r#"{"q": []}"#, "[] for 'q'")] {
            let error = read(&format!("{plain}, \"alpha_pattern\": {pattern}}}")).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        assert!(read(r#"{"peft_type": "IA3", "r": 1}"#).unwrap_err().to_string().contains("'IA3'"));
        assert!(
            read(r#"{"peft_type": "LORA", "r": 0, "lora_alpha": 1}"#)
                .unwrap_err()
                .to_string()
                .contains("`r` is 0")
        );
    }
}
