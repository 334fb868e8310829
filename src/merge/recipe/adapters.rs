//! Adapters that are merged with each other: whether they go together, and what is said about it.

use super::job::{Job, Model};
use super::method::Method;
use crate::error::{Error, Result};
use crate::merge::Weights;
use crate::models::adapter::{Base, SETTINGS};
use serde_json::Value;
use std::collections::BTreeMap;

/// Settings that say what the factors mean. Adapters that differ in one are not merged.
const MEANING: [&str; 12] = [
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "init_weights",
    "fan_in_fan_out",
    "mos_budget",
    "mos_shards",
    "mos_alpha",
];

impl Job {
    /// Adds what does not go together to the problems: adapters beside models, adapters of other bases or with other settings.
    pub(super) fn find_adapters(&mut self) -> Result<()> {
        let some: Vec<&Model> = self.models.iter().filter(|model| model.is_adapter).collect();
        let Some(first) = some.first() else { return Ok(()) };
        let mut problems = Vec::new();
        // One sentence in the place of one for each tensor.
        if some.len() == self.models.len()
            && let Some(other) =
                some.iter().find(|model| model.checkpoint.names() != first.checkpoint.names())
        {
            self.problems = vec![format!(
                "{} and {} are adapters of different layers, and are not merged with each other",
                first.path.display(),
                other.path.display()
            )];
            return Ok(());
        }
        if let Some(model) = self.models.iter().find(|model| !model.is_adapter) {
            let (adapter, model) = (first.path.display(), model.path.display());
            // Everything else that does not fit follows from this.
            self.problems = vec![format!(
                "{adapter} is an adapter and {model} a model; `{model}+{adapter}` is the model with the adapter on it"
            )];
            return Ok(());
        }
        if self.config.align.is_some() {
            problems.push("align: adapters are not aligned; align the models".into());
        }
        let mut bases = Vec::new();
        for model in &some {
            let path = model.path.display();
            let [own, lead] = [settings(model)?, settings(first)?];
            for key in MEANING {
                let [a, b] = [&own, &lead].map(|all| all.get(key).unwrap_or(&Value::Null));
                if a != b && !(is_nothing(a) && is_nothing(b)) {
                    let other = first.path.display();
                    problems.push(format!(
                        "`{key}` is {a} in {path} and {b} in {other}; their factors mean other things"
                    ));
                }
            }
            let folder = model.place();
            bases.push((path.to_string(), Base::of_adapter(&folder)?, named_base(&own)));
        }
        for (path, base, name) in &bases[1..] {
            let (lead, lead_base, lead_name) = &bases[0];
            let known = base.as_ref().zip(lead_base.as_ref());
            let differ = match known {
                Some((a, b)) => a.fingerprint != b.fingerprint,
                None => last(name) != last(lead_name),
            };
            if differ {
                let said = |base: &Option<Base>, name: &str| {
                    base.as_ref().map_or(name.to_string(), |b| b.name.clone())
                };
                problems.push(format!(
                    "{path} is an adapter of {}, and {lead} of {}",
                    said(base, name),
                    said(lead_base, lead_name)
                ));
            }
        }
        if self.config.method != Method::Passthrough && self.config.method != Method::Rmm && some.len() > 1 {
            self.notes.push(
                "adapters are merged factor by factor; the product of merged factors is not the merged product (to merge products, \
                 name `model+adapter` and `tiebeam extract` what comes out)"
                    .into(),
            );
        }
        self.problems.extend(problems);
        Ok(())
    }

    /// What the files of the output say of themselves: the format, and for adapters the base that theirs say.
    pub(super) fn file_notes(&self) -> BTreeMap<String, String> {
        let mut notes = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let lead = self.leader();
        if lead.is_adapter
            && let Ok(Some(base)) = Base::of_adapter(lead.place())
        {
            notes.extend(base.said());
        }
        notes
    }
}

/// The last part of a path or name.
fn last(name: &str) -> &str {
    name.trim_end_matches('/').rsplit('/').next().unwrap_or(name)
}

/// Whether a setting is off.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(all) => all.is_empty(),
        Value::Array(all) => all.is_empty(),
        _ => false,
    }
}

fn settings(model: &Model) -> Result<Value> {
    let path = model.place().join(SETTINGS);
    let text = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
    serde_json::from_slice(&text).map_err(|e| Error::format(&path, e.to_string()).because_of(e))
}

fn named_base(settings: &Value) -> String {
    settings["base_model_name_or_path"].as_str().unwrap_or("a model that it does not name").into()
}
