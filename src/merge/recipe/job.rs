//! A merge as a list of output tensors: the inputs of each, what does not fit, and how much memory it takes.

use super::config::{Evaluate, MergeConfig, Scalar, Slice, Source};
use super::method::Arguments;
pub use super::model::Model;
use super::vocabulary::Chosen;
use crate::error::{Error, Result};
use crate::files::size;
use crate::gpu::Gpu;
use crate::merge::Weights;
use crate::merge::evaluate::Task;
use crate::models::adapter::WEIGHTS;
use crate::models::network::Network;
use crate::ops::order::narrow;
use crate::store::{FileDType, is_cached, sharded};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A tensor of a model that an output is merged from.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// Index into [`Job::models`].
    pub model: usize,
    /// The tensor's name there.
    pub name: String,
}

/// One tensor of the output.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its type in the file.
    pub dtype: FileDType,
    /// The base's tensor, if the configuration has a base.
    pub base: Option<Input>,
    /// The models' tensors.
    pub models: Vec<Input>,
    /// Further tensors: the Fisher diagonals of the models; for a signature the clean model's and the pretrained one's.
    pub others: Vec<Input>,
    /// The method's parameters. `None` for what is not merged, such as integers: the first input's values are copied.
    pub arguments: Option<Arguments>,
}

/// The default number of elements of a tensor that are merged at a time: 16 MiB in f32, within every adapter's limit on bindings.
pub const PART: usize = 1 << 22;

impl Output {
    /// Number of elements.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Size in the file, in bytes.
    pub fn bytes(&self) -> u64 {
        (self.count() * self.dtype.bits() / 8) as u64
    }

    /// All tensors that are read for this one.
    pub fn inputs(&self) -> impl Iterator<Item = &Input> {
        self.base.iter().chain(&self.models).chain(&self.others)
    }
}

/// A configuration with the models' files opened, and the list of outputs.
#[derive(Debug)]
pub struct Job {
    /// The configuration.
    pub config: MergeConfig,
    /// The models, each once.
    pub models: Vec<Model>,
    /// The output's tensors, sorted by name.
    pub outputs: Vec<Output>,
    /// Elements of a tensor that are merged at a time, by default [`PART`]. DARE's random draws depend on it.
    pub part: usize,
    /// What does not fit, one sentence each. A job can run only if there are none.
    pub problems: Vec<String>,
    /// What was chosen where the models' files leave a choice, and what is not merged, one sentence each.
    pub notes: Vec<String>,
    /// Notes about many tensors, each with `{}` for their names.
    pub(super) gathered: BTreeMap<String, BTreeSet<String>>,
    /// The output's vocabulary, if the configuration chooses one.
    pub(super) vocabulary: Option<Chosen>,
}

/// The position of a tensor in a model's depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Before,
    Layer(usize),
    After,
}

/// Parts of names of what prepares images and sound for a language model. Its layers are not those of the language model.
const OTHER_SENSES: [&str; 6] = ["vision", "visual", "image", "audio", "projector", "connector"];

impl Stage {
    /// Derives the position from the name. The first part that is a number is the layer. Without a number, embeddings of tokens
    /// and positions come before all layers, everything else after them.
    pub(super) fn of(name: &str) -> Stage {
        let mut parts = name.split('.');
        let other = |part: &str| OTHER_SENSES.iter().any(|word| part.contains(word));
        if name.split('.').any(other) {
            return Stage::Before;
        }
        if let Some(layer) = parts.find_map(|part| part.parse().ok()) {
            return Stage::Layer(layer);
        }
        let first = |part: &str| part.contains("embed") || part == "wte" || part == "wpe";
        if name.split('.').any(first) { Stage::Before } else { Stage::After }
    }
}

/// Number of layers of a model whose tensors have these names.
pub(super) fn layers_of(names: &[String]) -> usize {
    let layers = names.iter().filter_map(|n| match Stage::of(n) {
        Stage::Layer(layer) => Some(layer),
        _ => None,
    });
    layers.max().map_or(0, |most| most.saturating_add(1))
}

/// Returns `name` with its layer's number replaced.
fn with_layer(name: &str, layer: usize) -> String {
    let mut parts: Vec<String> = name.split('.').map(String::from).collect();
    if let Some(part) = parts.iter_mut().find(|part| part.parse::<usize>().is_ok()) {
        *part = layer.to_string();
    }
    parts.join(".")
}

impl Job {
    /// Opens the models and lists the output's tensors. Everything that does not fit is listed in [`Job::problems`].
    ///
    /// # Errors
    /// When a model cannot be opened, or a parameter is missing or out of range.
    pub fn open(config: MergeConfig) -> Result<Job> {
        Job::on(Vec::new(), config)
    }

    /// As [`Job::open`], with models that are open. They stand in the order in which the configuration first names them.
    pub(super) fn on(models: Vec<Model>, config: MergeConfig) -> Result<Job> {
        let mut job = Job {
            config,
            models,
            outputs: Vec::new(),
            part: PART,
            problems: Vec::new(),
            notes: Vec::new(),
            gathered: BTreeMap::new(),
            vocabulary: None,
        };
        for key in &job.config.definitions {
            job.notes.push(format!("the key `{key}` only defines what aliases stand for"));
        }
        let sources = job.config.slices.iter().flat_map(|s| s.sources.iter().map(|s| s.model.clone()));
        let paths: Vec<PathBuf> = job.config.base.iter().cloned().chain(sources).collect();
        for path in paths {
            job.model(&path)?;
        }
        job.find_vocabulary()?;
        let slices = job.config.slices.clone();
        let mut first = 0;
        for (i, slice) in slices.iter().enumerate() {
            first += job.add_slice(slice, first, [i == 0, i + 1 == slices.len()])?;
        }
        job.outputs.sort_by(|a, b| a.name.cmp(&b.name));
        job.look()?;
        job.check_learning()?;
        Ok(job)
    }

    /// Returns the index of a model, and opens it if it is new.
    fn model(&mut self, path: &Path) -> Result<usize> {
        if let Some(i) = self.models.iter().position(|m| m.path == path) {
            return Ok(i);
        }
        let model = Model::open(path, self.config.names.get(path).map_or(&[], |table| &table[..]))?;
        let place = path.display();
        if is_cached(&model.place()) {
            self.notes.push(format!("{place} is in the cache of Hugging Face's hub"));
        }
        self.notes.extend(model.checkpoint.notes().iter().map(|note| format!("{place}: {note}")));
        if let Some(named) = model.other_base() {
            self.notes.push(format!("{place}: the adapter says that it is of `{named}`"));
        }
        self.models.push(model);
        Ok(self.models.len() - 1)
    }

    /// The model that determines names and types: the base, or the first without one.
    pub fn leader(&self) -> &Model {
        &self.models[0]
    }

    /// Adds a slice whose layers begin at `first` in the output, and returns its number of layers. `ends` says whether it is the
    /// first and the last slice, to which the tensors before and after all layers belong.
    fn add_slice(&mut self, slice: &Slice, first: usize, ends: [bool; 2]) -> Result<usize> {
        let sources: Vec<&Source> = slice.sources.iter().filter(|s| !self.config.is_base_only(s)).collect();
        let lead = self.model(&sources[0].model)?;
        let mut names = self.models[lead].checkpoint.names();
        let there = layers_of(&names);
        if ends[1] {
            self.fit_head(lead, &sources, &mut names);
        }
        let range = sources[0].layers.clone().unwrap_or(0..there);
        if range.end > there {
            let path = self.models[lead].path.display();
            self.problems.push(format!("{path} has {there} layers; layer_range asks for {range:?}"));
            return Ok(range.len());
        }
        for name in names {
            let (stage, depth) = match Stage::of(&name) {
                Stage::Before if ends[0] => (Stage::Before, 0.0),
                // As in mergekit, what is outside of the layers has the first value of a gradient.
                Stage::After if ends[1] => (Stage::After, 0.0),
                Stage::Layer(layer) if range.contains(&layer) => {
                    let place = layer - range.start;
                    let depth = if range.len() > 1 { place as f64 / (range.len() - 1) as f64 } else { 1.0 };
                    (Stage::Layer(place), depth)
                }
                _ => continue,
            };
            let at = |source: &Source| match (stage, &source.layers) {
                (Stage::Layer(place), Some(layers)) => with_layer(&name, layers.start + place),
                _ => name.clone(),
            };
            let output = match stage {
                Stage::Layer(place) if slice.sources[0].layers.is_some() => with_layer(&name, first + place),
                _ => name.clone(),
            };
            self.add_output(slice, &sources, output, depth, &at)?;
        }
        Ok(range.len())
    }

    /// Adds one output. `at` returns the tensor's name in a source.
    fn add_output(
        &mut self,
        slice: &Slice,
        sources: &[&Source],
        name: String,
        depth: f64,
        at: &dyn Fn(&Source) -> String,
    ) -> Result<()> {
        let mut models = Vec::new();
        for source in sources {
            models.push(Input { model: self.model(&source.model)?, name: at(source) });
        }
        let base = match self.config.base.clone().filter(|_| self.has_base()) {
            Some(path) => {
                let listed = slice.sources.iter().find(|s| s.model == path);
                Some(Input { model: self.model(&path)?, name: at(listed.unwrap_or(sources[0])) })
            }
            None => None,
        };
        let get = |key: &str, model: Option<usize>| {
            self.config.parameter(key, slice, model.map(|i| sources[i]), &name, depth)
        };
        let arguments = self.config.method.arguments(models.len(), &get);
        let mut arguments = arguments.map_err(|e| Error::config(format!("{e} (for tensor `{name}`)")))?;
        let mut others = Vec::new();
        if self.config.method == super::method::Method::Signature {
            for key in ["clean", "pre"] {
                let path = self.config.parameter(key, slice, None, &name, depth);
                let Some(Scalar::Text(path)) = path else { continue };
                others.push(Input { model: self.model(Path::new(&path))?, name: models[0].name.clone() });
            }
            arguments.is_norm = self.is_norm(&models[0]);
        }
        // What is no float is copied, and needs no diagonal.
        let is_float = self.models[models[0].model].is_float(&models[0].name);
        if self.config.method == super::method::Method::Fisher && is_float {
            for (source, input) in sources.iter().zip(&models) {
                let path = self.config.parameter("fisher", slice, Some(source), &name, depth);
                let Some(Scalar::Text(path)) = path else {
                    let path = source.model.display();
                    return Err(Error::config(format!(
                        "{path}: `fisher` must be the file of its Fisher diagonal"
                    )));
                };
                others.push(Input { model: self.model(Path::new(&path))?, name: input.name.clone() });
            }
        }
        let dtype = FileDType::F32;
        let mut output = Output { name, shape: Vec::new(), dtype, base, models, others, arguments: None };
        if let Some(dtype) = self.fit(&mut output, &arguments)? {
            let is_merged = self.is_merged(&output, &arguments)?;
            if arguments.by_rows {
                arguments.row = output.shape.last().copied().unwrap_or(1);
            }
            // Masks and buffers keep the type in which they are right.
            if dtype.is_float() && (is_merged || self.passes_through(&arguments)) {
                output.dtype = self.config.dtype.unwrap_or(dtype);
            }
            if is_merged && output.dtype == FileDType::F64 {
                output.dtype = FileDType::F32;
            }
            output.arguments = is_merged.then_some(arguments);
            self.note_dtype(&output, dtype);
            self.outputs.push(output);
        }
        Ok(())
    }

    /// Whether a tensor belongs to a norm with running statistics.
    fn is_norm(&self, input: &Input) -> bool {
        let layer = input.name.rsplit_once('.').map_or("", |(layer, _)| layer);
        self.models[input.model].checkpoint.contains(&format!("{layer}.running_mean"))
    }

    /// Checks that the job can run.
    ///
    /// # Errors
    /// When there are problems, which the message lists, or nothing to merge.
    pub fn check(&self) -> Result<()> {
        match self.problems.len() {
            0 if self.outputs.is_empty() => Err(Error::config("the models have no tensors")),
            0 => Ok(()),
            n => {
                Err(Error::config(format!("the models do not fit ({n}):\n  {}", self.problems.join("\n  "))))
            }
        }
    }

    /// The tasks that the configuration evaluates on. Texts are read with the tokenizer of the leading model.
    ///
    /// # Errors
    /// As [`TaskFile::open`](crate::merge::evaluate::TaskFile::open).
    pub fn tasks(&self, gpu: &Gpu) -> Result<Vec<Task>> {
        self.opened(gpu, self.config.evaluate.as_ref())
    }

    /// Reads tasks. Texts are read with the tokenizer of the leading model.
    pub(super) fn opened(&self, gpu: &Gpu, tasks: Option<&Evaluate>) -> Result<Vec<Task>> {
        let all = tasks.iter().flat_map(|tasks| &tasks.tasks);
        all.map(|task| task.open(gpu, &self.leader().place())).collect()
    }

    /// The description of the network that the configuration names.
    ///
    /// # Errors
    /// As [`Network::read`].
    pub fn network(&self) -> Result<Option<Network>> {
        self.config.network.as_ref().map(Network::read).transpose()
    }

    /// The models as sources of tensors, in the order of [`Job::models`].
    pub fn sources(&self) -> Vec<&dyn Weights> {
        self.models.iter().map(|model| model as &dyn Weights).collect()
    }

    /// The ranges of elements that an output is merged in, one after the other.
    pub fn parts(&self, output: usize) -> Vec<Range<usize>> {
        let output = &self.outputs[output];
        // Rows that are cut one by one are not divided.
        let row = output.arguments.as_ref().map_or(1, |a| a.row.max(1));
        let (n, size) = (output.count(), (self.part / row * row).max(row));
        (0..n.div_ceil(size).max(1)).map(|i| i * size..((i + 1) * size).min(n)).collect()
    }

    /// Size of the output in bytes.
    pub fn bytes(&self) -> u64 {
        self.outputs.iter().map(Output::bytes).sum()
    }

    /// Passes over all tensors, including the one that writes.
    pub fn passes(&self) -> u64 {
        let merged = || self.outputs.iter().filter(|o| o.arguments.is_some());
        let elements = merged().map(|o| o.count() as u64).sum();
        let first = merged().find_map(|o| o.arguments.as_ref());
        1 + first.map_or(0, |a| self.config.method.passes(a, elements))
    }

    /// Bytes of memory that a run needs at most, without those of the driver. On the device these are the inputs of two parts and
    /// one part's temporaries, all counted twice because the pool may hold as much again. On the host, it is two of the output's
    /// tensors, and the elements near the limits of methods that trim a tensor by rank. Alignment adds whole tensors, but its cost
    /// matrices are not counted.
    pub fn memory(&self) -> u64 {
        let of = |o: &Output| {
            let part = 4 * o.count().min(self.part) as u64;
            let live = 3 * o.inputs().count() + self.config.method.temporaries(o.models.len()) + 3;
            let searched = narrow::bytes(o.count(), self.part, self.config.method.cuts() * o.models.len());
            2 * part * live as u64 + 2 * o.bytes() + searched
        };
        // A permuted tensor is held whole while its parts are read, with one more copy during permutation.
        let moved = match self.config.align {
            Some(_) => self
                .outputs
                .iter()
                .map(|o| 8 * o.count() as u64 * o.inputs().count() as u64)
                .max()
                .unwrap_or(0),
            None => 0,
        };
        // What is learned, searched for or repaired is held whole: the models, what is made of them, and gradients.
        let elements: u64 = self.outputs.iter().map(|o| o.count() as u64).sum();
        let whole = if self.config.needs_data() { 4 * elements * (self.models.len() as u64 + 4) } else { 0 };
        self.outputs.iter().map(of).max().unwrap_or(0) + moved + whole
    }

    /// Distributes the outputs, sorted by name, over files of up to `shard_bytes`. Returns each file's name and outputs.
    pub fn shards(&self, shard_bytes: u64) -> Vec<(String, Vec<usize>)> {
        match self.leader().is_adapter {
            true => vec![(WEIGHTS.to_string(), (0..self.outputs.len()).collect())],
            false => sharded(self.outputs.iter().map(Output::bytes), shard_bytes),
        }
    }

    /// Describes the job as text: models, output, every tensor, memory, problems.
    pub fn describe(&self, shard_bytes: u64) -> String {
        let mut text = String::new();
        let mut line = |words: String| text.write_str(&(words + "\n")).expect("a String takes everything");
        line(format!("method  {}", self.config.method.name()));
        for model in &self.models {
            let names = model.checkpoint.names();
            let bytes = |n: &String| model.checkpoint.bytes(n).map_or(0, <[u8]>::len);
            let bytes: usize = names.iter().map(bytes).sum();
            line(format!(
                "reads   {}: {} tensors, {}",
                model.path.display(),
                names.len(),
                size(bytes as u64)
            ));
        }
        let shards = self.shards(shard_bytes);
        let files = if shards.len() == 1 { "one file".into() } else { format!("{} files", shards.len()) };
        line(format!("writes  {} tensors, {}, {files}", self.outputs.len(), size(self.bytes())));
        line(format!("memory  {} at the most, on the device and the host together", size(self.memory())));
        line(format!("passes  {}", self.passes()));
        for o in &self.outputs {
            let what = if o.arguments.is_some() { "merged" } else { "copied from the first" };
            line(format!("  {} {} {:?} {what}", o.name, o.dtype, o.shape));
        }
        for note in &self.notes {
            line(format!("note    {note}"));
        }
        for problem in &self.problems {
            line(format!("problem {problem}"));
        }
        text
    }
}
