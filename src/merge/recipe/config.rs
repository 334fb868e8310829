//! The configuration of a merge: method, models and parameters, read from mergekit's format.
//!
//! A parameter is looked up at the slice's source, then at the slice, then at the top. Its value is a number for all tensors, a
//! *gradient* (a list that is interpolated linearly from the first layer to the last), or a list of `{filter, value}`. Of such a
//! list, the first entry counts whose filter is part of the tensor's name. As in mergekit 0.1.5, tensors outside of the layers, such
//! as embeddings, the last norm and the head, have a gradient's first value.
//!
//! A model is a path, or a name `owner/name` that is in the cache of Hugging Face's hub; `model+adapter` is one with a LoRA adapter on
//! it. Two paths to the same files are the same model.

pub use super::choice::{TokenRow, TokenizerConfig, TokenizerSource};
use super::method::Method;
use super::node::Node;
pub use super::setting::{Parameters, Scalar, Setting};
use crate::error::{Error, Result};
use crate::merge::evaluate::{TaskFile, TaskKind};
use crate::models::adapter::Lora;
use crate::store::{FileDType, named, same_weights};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A model, or a range of its layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// The model's file or folder.
    pub model: PathBuf,
    /// The range of layers. `None` is all.
    pub layers: Option<Range<usize>>,
    /// Parameters of this model.
    pub parameters: Parameters,
}

/// Consecutive layers of the output, merged from as many layers of each source.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    /// The models.
    pub sources: Vec<Source>,
    /// Parameters of this slice.
    pub parameters: Parameters,
}

/// How models are aligned before they are merged.
#[derive(Clone, Debug, PartialEq)]
pub struct Align {
    /// A spec's name for [`Spec::named`](crate::merge::Spec::named): `llama`, `resnet`, `mlp`, `network` or the path of a permutation
    /// spec.
    pub spec: String,
    /// Whether units are matched by their activations on the tasks of `learn`, and not by their weights.
    pub by_activations: bool,
    /// The model that the others are aligned to. The default is the base, or the first model without one.
    pub target: Option<PathBuf>,
    /// Additional starts of the search. The best result is used.
    pub restarts: usize,
    /// Seed of the order of visits and of the starts.
    pub seed: u64,
}

/// A search for the weights of the models.
#[derive(Clone, Debug, PartialEq)]
pub struct Search {
    /// Least and largest weight.
    pub bounds: [f64; 2],
    /// Where the search starts, by default in the middle.
    pub start: Option<f64>,
    /// How many merges are scored at most.
    pub evaluations: usize,
    /// Seed of the points.
    pub seed: u64,
}

impl Search {
    /// The weight at which the search starts.
    pub fn first(&self) -> f64 {
        self.start.unwrap_or((self.bounds[0] + self.bounds[1]) / 2.0)
    }
}

/// What the inputs and the merged model are scored on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluate {
    /// The tasks, at least one.
    pub tasks: Vec<TaskFile>,
}

/// The configuration of a merge.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct MergeConfig {
    /// The method.
    pub method: Method,
    /// The model that the others were trained from.
    pub base: Option<PathBuf>,
    /// For models whose tensors have other names: what of a name becomes what, one after the other, sorted by what it is.
    pub names: BTreeMap<PathBuf, Vec<(String, String)>>,
    /// The sources of the output's layers. A configuration with `models:` has one slice of all layers.
    pub slices: Vec<Slice>,
    /// Parameters of all models.
    pub parameters: Parameters,
    /// Type of the output's floats. By default each tensor has its type in the base or first model.
    pub dtype: Option<FileDType>,
    /// Alignment before merging.
    pub align: Option<Align>,
    /// Evaluation after merging.
    pub evaluate: Option<Evaluate>,
    /// What coefficients, weights and activations are learned on.
    pub learn: Option<Evaluate>,
    /// Whether a merged network is repaired on the inputs of `learn`.
    pub repair: bool,
    /// A search for the weights of the models by what the merged model reaches on the tasks of `learn`.
    pub search: Option<Search>,
    /// The file of a [`Network`](crate::models::network::Network) that the weights belong to, where it is not known by their names.
    pub network: Option<PathBuf>,
    /// Whose tokens the output has, of models whose vocabularies differ.
    pub tokenizer: Option<TokenizerConfig>,
    /// Outermost keys that only define what aliases stand for, and are passed over.
    pub definitions: Vec<String>,
}

const KEYS: [&str; 15] = [
    "merge_method",
    "models",
    "slices",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "align",
    "evaluate",
    "network",
    "learn",
    "repair",
    "search",
    "tokenizer_source",
    "tokenizer",
];

/// Keys of mergekit that are not supported. They would change the result, so they are refused.
const ELSEWHERE: [&str; 3] = ["modules", "chat_template", "input_model_parameters"];

/// The models of a configuration.
struct Models<'a> {
    /// The folder that paths are relative to.
    folder: &'a Path,
    /// What of the names of a model's tensors becomes what.
    names: RefCell<BTreeMap<PathBuf, Vec<(String, String)>>>,
    /// The first path to each model, by the files that tell it from others.
    first: RefCell<BTreeMap<Vec<PathBuf>, PathBuf>>,
}

impl Models<'_> {
    /// The path of a model. If another path to the same files came before, it is that one.
    fn path(&self, node: &Node) -> Result<PathBuf> {
        let text = node.text()?;
        let whole = named(self.folder, text);
        // As mergekit has it, `model+adapter` is a model with an adapter on it.
        let path = match text.rsplit_once('+').filter(|_| !whole.exists()) {
            Some((model, adapter)) if Lora::is_at(&self.folder.join(adapter)) => {
                let model = named(self.folder, model);
                format!("{}+{}", model.display(), self.folder.join(adapter).display()).into()
            }
            _ => whole,
        };
        Ok(self.first.borrow_mut().entry(same_weights(&path)).or_insert(path).clone())
    }
}

impl MergeConfig {
    /// Reads a configuration from the text of a YAML file. Paths in it are relative to `folder`. Outermost keys that are unknown
    /// and define what aliases elsewhere stand for are passed over.
    ///
    /// # Errors
    /// As [`yaml::parse`](super::yaml::parse) and [`MergeConfig::from_value`].
    #[cfg(feature = "yaml")]
    pub fn from_yaml(text: &str, folder: &Path) -> Result<MergeConfig> {
        let super::yaml::Document { mut value, anchored } = super::yaml::document(text)?;
        let known = |key: &String| KEYS.contains(&key.as_str()) || ELSEWHERE.contains(&key.as_str());
        let definitions: Vec<String> = anchored.into_iter().filter(|key| !known(key)).collect();
        if let Some(map) = value.as_object_mut() {
            map.retain(|key, _| !definitions.contains(key));
        }
        Ok(MergeConfig { definitions, ..MergeConfig::from_value(&value, folder)? })
    }

    /// Reads a configuration from JSON values. Paths in it are relative to `folder`.
    ///
    /// # Errors
    /// For unknown keys, methods and parameters (the message lists similar ones), and when something is missing or does not fit
    /// the method.
    pub fn from_value(value: &Value, folder: &Path) -> Result<MergeConfig> {
        let root = Node { at: String::new(), value };
        let map = root.map()?;
        if let Some(key) = map.keys().find(|key| ELSEWHERE.contains(&key.as_str())) {
            return Err(root.wrong(format!("`{key}` of mergekit is not supported; take it out")));
        }
        root.only(&KEYS)?;
        let method = root.need("merge_method")?;
        let method = Method::parse(method.text()?).map_err(|message| method.wrong(message))?;
        let models = &Models { folder, names: RefCell::default(), first: RefCell::default() };
        let types = ["out_dtype", "dtype"].map(|key| root.get(key).map(|n| dtype(&n)).transpose());
        let [out, computed] = types;
        let mut config = MergeConfig {
            method,
            base: root.get("base_model").map(|node| models.path(&node)).transpose()?,
            slices: slices(&root, method, models)?,
            names: models.names.take(),
            parameters: parameters(&root, method, folder)?,
            dtype: out?.or(computed?),
            align: root.get("align").map(|node| align(&node, models)).transpose()?,
            evaluate: root.get("evaluate").map(|node| evaluate(&node, folder)).transpose()?,
            learn: root.get("learn").map(|node| evaluate(&node, folder)).transpose()?,
            repair: root.get("repair").map(|node| node.flag()).transpose()?.unwrap_or(false),
            search: root.get("search").map(|node| search(&node)).transpose()?,
            network: root.get("network").map(|node| Ok::<_, Error>(folder.join(node.text()?))).transpose()?,
            tokenizer: super::choice::read(value, &|at, value| models.path(&Node { at: at.into(), value }))?,
            definitions: Vec::new(),
        };
        config.check()?;
        config.start_search();
        Ok(config)
    }

    /// Gives every model the weight at which a search starts, if it has none of its own.
    fn start_search(&mut self) {
        let Some(search) = &self.search else { return };
        let all = self.parameters.get("weight").cloned();
        let start = all.unwrap_or(Setting::Same(Scalar::Number(search.first())));
        for source in self.slices.iter_mut().flat_map(|slice| &mut slice.sources) {
            source.parameters.entry("weight".into()).or_insert_with(|| start.clone());
        }
    }

    /// Whether what is written depends on data: it is learned, searched for or repaired on the tasks of `learn`.
    pub fn needs_data(&self) -> bool {
        self.method.is_learned() || self.search.is_some() || self.repair
    }

    /// Whether tensors are merged each by itself, so that ranks can share them.
    pub fn is_by_tensors(&self) -> bool {
        !self.needs_data() && self.method != Method::Rmm
    }

    /// What of the configuration needs the tasks of `learn`.
    fn asker(&self) -> Option<String> {
        match () {
            () if self.method.is_learned() => Some(format!("`{}`", self.method.name())),
            () if self.search.is_some() => Some("`search`".into()),
            () if self.repair => Some("`repair`".into()),
            () if self.by_activations() => Some("`matcher: activations`".into()),
            () => None,
        }
    }

    /// Whether models are aligned by their activations.
    pub fn by_activations(&self) -> bool {
        self.align.as_ref().is_some_and(|align| align.by_activations)
    }

    /// Checks what does not depend on the models' files.
    fn check(&self) -> Result<()> {
        let name = self.method.name();
        let wrong = |message: String| Err(Error::config(message));
        if self.method.needs_base() && self.base.is_none() {
            return wrong(format!(
                "base_model: `{name}` needs one: the model that the others were trained from"
            ));
        }
        if let Some(asker) = self.asker().filter(|_| self.learn.is_none()) {
            return wrong(format!(
                "learn: {asker} needs tasks to learn from, such as `learn: {{data: train.safetensors}}`; take other rows than those of \
                 `evaluate`"
            ));
        }
        let alone = matches!(self.method, Method::Fisher | Method::Signature | Method::Rmm);
        if self.tokenizer.is_some() && (alone || self.align.is_some() || self.needs_data()) {
            return wrong(
                "tokenizer: with `align`, with data that are learned from, and by `fisher`, `signature` and `rmm`, models need the same \
                 tokens; leave it out"
                    .into(),
            );
        }
        if self.search.is_some() && !self.method.parameters().contains(&"weight") {
            return wrong(format!("search: `{name}` has no weights to search for"));
        }
        if self.method.is_learned() && (self.search.is_some() || self.repair || self.slices.len() > 1) {
            return wrong(format!(
                "`{name}` is learned for whole models, and takes no `search`, `repair` or slices"
            ));
        }
        for (i, slice) in self.slices.iter().enumerate() {
            let models: Vec<&Source> = slice.sources.iter().filter(|s| !self.is_base_only(s)).collect();
            let (least, most) = self.method.models();
            if models.len() < least || models.len() > most {
                let want = if least == most { format!("{least}") } else { format!("at least {least}") };
                let base = if self.method.needs_base() { " beside the base" } else { "" };
                return wrong(format!(
                    "slices[{i}]: `{name}` merges {want} models{base}, not {}",
                    models.len()
                ));
            }
            let lengths: Vec<Option<usize>> =
                slice.sources.iter().map(|s| s.layers.as_ref().map(|l| l.len())).collect();
            if lengths.windows(2).any(|pair| pair[0] != pair[1]) {
                return wrong(format!("slices[{i}]: the sources' layer_range have different lengths"));
            }
        }
        let whole = self.slices.iter().filter(|s| s.sources[0].layers.is_none()).count();
        if whole > 0 && self.slices.len() > 1 {
            return wrong("slices: with more than one, every source needs a layer_range".into());
        }
        Ok(())
    }

    /// Whether a source is the base of a method that merges task vectors. Its own task vector is 0, so it is left out.
    pub fn is_base_only(&self, source: &Source) -> bool {
        self.method.has_task_vectors() && self.base.as_ref() == Some(&source.model)
    }

    /// Looks up a parameter of a source for a tensor at a depth in `[0, 1]`.
    pub fn parameter(
        &self,
        key: &str,
        slice: &Slice,
        source: Option<&Source>,
        name: &str,
        depth: f64,
    ) -> Option<Scalar> {
        let places = [source.map(|s| &s.parameters), Some(&slice.parameters), Some(&self.parameters)];
        places.into_iter().flatten().find_map(|all| all.get(key)?.at(name, depth))
    }
}

fn slices(root: &Node, method: Method, models: &Models) -> Result<Vec<Slice>> {
    let folder = models.folder;
    let source = |node: Node, ranged: bool| {
        let keys = ["model", "parameters", "names", "layer_range"];
        node.only(&keys[..3 + ranged as usize])?;
        let model = models.path(&node.need("model")?)?;
        let parameters = own_parameters(&node, method, folder)?;
        if let Some(table) = node.get("names") {
            let pairs = pairs(&table)?;
            let mut names = models.names.borrow_mut();
            // A diagonal has its model's names.
            for path in parameters.get("fisher").map_or(Vec::new(), texts) {
                names.insert(path.into(), pairs.clone());
            }
            names.insert(model.clone(), pairs);
        }
        let layers = node.get("layer_range").map(|n| n.range()).transpose()?;
        Ok(Source { model, layers, parameters })
    };
    match (root.get("models"), root.get("slices")) {
        (Some(listed), None) => {
            let sources = listed.list()?.into_iter().map(|n| source(n, false)).collect::<Result<Vec<_>>>()?;
            Ok(vec![Slice { sources, parameters: Parameters::new() }])
        }
        (None, Some(slices)) => {
            let slice = |node: Node| {
                node.only(&["sources", "parameters"])?;
                let sources = node.need("sources")?;
                let sources = sources.list()?.into_iter().map(|n| source(n, true)).collect::<Result<_>>()?;
                Ok(Slice { sources, parameters: parameters(&node, method, folder)? })
            };
            slices.list()?.into_iter().map(slice).collect()
        }
        _ => Err(root.wrong("needs either `models` or `slices`")),
    }
}

/// What of a model's names becomes what.
fn pairs(table: &Node) -> Result<Vec<(String, String)>> {
    let pair = |(from, to): (&String, &Value)| match to.as_str() {
        Some(to) => Ok((from.clone(), to.to_string())),
        None => Err(table.wrong(format!("`{from}` must become text"))),
    };
    table.map()?.iter().map(pair).collect()
}

/// The texts in a setting.
fn texts(setting: &Setting) -> Vec<&str> {
    match setting {
        Setting::Same(Scalar::Text(text)) => vec![text],
        Setting::Filters(all) => all.iter().flat_map(|(_, setting)| texts(setting)).collect(),
        _ => Vec::new(),
    }
}

/// Reads the parameters of one model.
fn own_parameters(node: &Node, method: Method, folder: &Path) -> Result<Parameters> {
    let all = parameters(node, method, folder)?;
    match all.keys().find(|key| !method.is_per_model(key)) {
        Some(key) => {
            let name = method.name();
            Err(node.wrong(format!("`{key}` of `{name}` is one for all models; move it to the top")))
        }
        None => Ok(all),
    }
}

/// Resolves paths in a setting, which are relative to the configuration's folder.
fn placed(setting: &mut Setting, folder: &Path) {
    match setting {
        Setting::Same(Scalar::Text(path)) => *path = folder.join(&*path).to_string_lossy().into_owned(),
        Setting::Filters(all) => all.iter_mut().for_each(|(_, setting)| placed(setting, folder)),
        _ => {}
    }
}

fn parameters(node: &Node, method: Method, folder: &Path) -> Result<Parameters> {
    let Some(node) = node.get("parameters") else { return Ok(Parameters::new()) };
    node.only(method.parameters())?;
    let one = |key: &String| {
        let mut setting = node.need(key)?.setting()?;
        if ["fisher", "clean", "pre"].contains(&key.as_str()) {
            placed(&mut setting, folder);
        }
        let is_list = key == "preference" && matches!(setting, Setting::Gradient(_));
        if method.is_global(key) && !matches!(setting, Setting::Same(_)) && !is_list {
            let name = method.name();
            return Err(node.wrong(format!("`{key}` of `{name}` is one value for the whole model")));
        }
        Ok((key.clone(), setting))
    };
    node.map()?.keys().map(one).collect()
}

fn dtype(node: &Node) -> Result<FileDType> {
    match node.text()? {
        "float32" | "f32" => Ok(FileDType::F32),
        "bfloat16" | "bf16" => Ok(FileDType::BF16),
        "float16" | "f16" => Ok(FileDType::F16),
        other => Err(node.wrong(format!("`{other}` is no type of output; use float32, bfloat16 or float16"))),
    }
}

fn align(node: &Node, models: &Models) -> Result<Align> {
    node.only(&["spec", "matcher", "target", "restarts", "seed"])?;
    let by_activations = match node.get("matcher") {
        None => false,
        Some(matcher) => match matcher.text()? {
            "weights" => false,
            "activations" => true,
            other => return Err(matcher.wrong(format!("`{other}` is neither weights nor activations"))),
        },
    };
    let spec = node.need("spec")?;
    let spec = match spec.text()? {
        word if ["llama", "resnet", "mlp", "network"].contains(&word.split(':').next().unwrap_or(word)) => {
            word.to_string()
        }
        path => models.folder.join(path).to_string_lossy().into_owned(),
    };
    let whole = |key| node.get(key).map(|n| n.whole()).transpose();
    Ok(Align {
        spec,
        by_activations,
        target: node.get("target").map(|n| models.path(&n)).transpose()?,
        restarts: whole("restarts")?.unwrap_or(0) as usize,
        seed: whole("seed")?.unwrap_or(0),
    })
}

fn search(node: &Node) -> Result<Search> {
    node.only(&["low", "high", "start", "evaluations", "seed"])?;
    let real = |key| node.get(key).map(|n| n.real()).transpose();
    let whole = |key| node.get(key).map(|n| n.whole()).transpose();
    let bounds = [real("low")?.unwrap_or(0.0), real("high")?.unwrap_or(1.0)];
    let evaluations = whole("evaluations")?.unwrap_or(100) as usize;
    if bounds[0] >= bounds[1] || evaluations == 0 {
        return Err(node.wrong(format!("{evaluations} evaluations from {} to {}", bounds[0], bounds[1])));
    }
    Ok(Search { bounds, start: real("start")?, evaluations, seed: whole("seed")?.unwrap_or(0) })
}

/// One task, or several under `tasks`.
fn evaluate(node: &Node, folder: &Path) -> Result<Evaluate> {
    Ok(Evaluate { tasks: tasks(node, folder)? })
}

fn tasks(node: &Node, folder: &Path) -> Result<Vec<TaskFile>> {
    match node.get("tasks") {
        Some(listed) => {
            node.only(&["tasks"])?;
            listed.list()?.iter().map(|one| task(one, folder)).collect()
        }
        None => Ok(vec![task(node, folder)?]),
    }
}

/// Labelled rows under `data`, or a text under `text`.
fn task(node: &Node, folder: &Path) -> Result<TaskFile> {
    const LABELLED: [&str; 5] = ["name", "data", "inputs", "labels", "outputs"];
    const TEXT: [&str; 4] = ["name", "text", "tokens", "context"];
    let whole = |key| node.get(key).map(|n| n.whole()).transpose();
    let file = match (node.get("data"), node.get("text")) {
        (Some(data), None) => {
            node.only(&LABELLED)?;
            let word =
                |key, default: &str| node.get(key).map_or(Ok(default.into()), |n| n.text().map(String::from));
            let kind = TaskKind::Labelled {
                inputs: word("inputs", "x")?,
                labels: word("labels", "y")?,
                outputs: node.get("outputs").map(|n| n.range()).transpose()?,
            };
            TaskFile::of(folder.join(data.text()?), kind)
        }
        (None, Some(text)) => {
            node.only(&TEXT)?;
            let limit = whole("tokens")?.unwrap_or(16384) as usize;
            let kind = TaskKind::Text { limit, context: whole("context")?.map(|n| n as usize) };
            TaskFile::of(folder.join(text.text()?), kind)
        }
        _ => {
            node.only(&[&LABELLED[..], &TEXT[1..]].concat())?;
            return Err(node.wrong("a task needs either `data`, a file of labelled rows, or `text`"));
        }
    };
    Ok(match node.get("name") {
        Some(name) => file.named(name.text()?),
        None => file,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_by_depth_and_name() {
        let gradient = Setting::Gradient(vec![0.0, 0.5, 0.3, 0.7, 1.0]);
        let number = |setting: &Setting, name: &str, depth: f64| match setting.at(name, depth) {
            Some(Scalar::Number(n)) => n,
            other => panic!("{other:?}"),
        };
        // The five numbers are at depths 0, 1/4, 1/2, 3/4 and 1.
        let at = |depth: f64| number(&gradient, "w", depth);
        assert_eq!([0.0, 0.125, 0.25, 0.75, 1.0].map(at), [0.0, 0.25, 0.5, 0.7, 1.0]);
        assert!((at(0.3) - 0.46).abs() < 1e-12);
        assert_eq!(number(&Setting::Gradient(vec![4.0]), "w", 0.7), 4.0);
        let filters = Setting::Filters(vec![
            (Some("attn".into()), gradient.clone()),
            (Some("*".into()), Setting::Same(Scalar::Number(9.0))),
        ]);
        assert_eq!(number(&filters, "l.attn.q", 0.125), 0.25);
        assert_eq!(number(&filters, "l.mlp.q", 0.125), 9.0);
        let none = Setting::Filters(vec![(Some("attn".into()), Setting::Gradient(vec![1.0]))]);
        assert_eq!(none.at("mlp", 0.0), None);
    }
}
