//! `tiebeam zoo`: trains models of one budget that share weights in different ways, and compares them.

mod table;
mod variants;

use crate::context::{Context, on_interrupt};
use crate::train::{How, corpus, watched};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tiebeam::error::ErrorKind;
use tiebeam::language::{Corpus, Data, Training};
use tiebeam::models::adapter::{Adapter, AdapterConfig};
use tiebeam::models::lm::{LINEARS, Lm, LmConfig};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::Module;
use tiebeam::optim::Exchange;
use tiebeam::ranks::{Alone, on_first};
use tiebeam::{Error, Gpu, Precision, Result, Rng, files};
use variants::{Kind, Variant, few};

const EXAMPLES: &str = "\
Examples:
  tiebeam zoo lm --text book.txt --out out/zoo
  tiebeam zoo lm --text book.txt --adapt other.txt --out out/zoo --seeds 1,2,3
  tiebeam zoo lm --text book.txt --out out/zoo --variants none,tied,masa-qkvo
  tiebeam zoo lm --text book.txt --out out/try --scale tiny --seeds 1
  tiebeam zoo lm --text book.txt --out out/large --scale gpu --precision f16

Every run is kept when it ends; the same command goes on with the missing ones, also in the middle of one.";

/// Train a zoo of models on one budget, and compare what they store with what they lose
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// The zoo: lm, language models
    #[arg(value_parser = ["lm"])]
    zoo: String,
    /// Text to train on, each byte a token; its last tenth is held out
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// Another text, to which adapters bring the plain model
    #[arg(long, value_name = "FILE", num_args = 1..)]
    adapt: Vec<PathBuf>,
    /// Folder for results, table and picture
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Sizes: tiny (seconds a run), cpu (a minute or two on two cores), gpu (12 layers of width 512)
    #[arg(long, default_value = "cpu", value_parser = ["tiny", "cpu", "gpu"])]
    scale: String,
    /// Seeds of the runs
    #[arg(long, value_delimiter = ',', default_value = "1,2,3")]
    seeds: Vec<u64>,
    /// Models to train [default: all]
    #[arg(long, value_delimiter = ',')]
    variants: Vec<String>,
    /// Steps of a run [default: by --scale]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Products and activations in f32, or in f16 or bf16 with f32 sums
    #[arg(long, default_value_t = Precision::F32)]
    precision: Precision,
}

/// The sizes of the plain model, windows of a step, steps, and held-out tokens that are measured.
fn scale(name: &str) -> (LmConfig, u32, u64, usize) {
    let of = |width, depth, context| {
        let config = LmConfig::small().width(width).hidden(4 * width).heads(width / 32).kv_heads(width / 32);
        config.depth(depth).context(context).sharing(Sharing::none())
    };
    match name {
        "tiny" => (of(64, 6, 32), 4, 20, 1 << 10),
        "gpu" => (of(512, 12, 256), 32, 4000, 1 << 20),
        _ => (of(96, 6, 64), 8, 500, 1 << 16),
    }
}

/// What all runs have in common.
struct Zoo<'a> {
    args: &'a Args,
    context: &'a Context,
    gpu: Gpu,
    plain: LmConfig,
    batch: u32,
    steps: u64,
    corpus: Corpus,
    other: Option<Corpus>,
    stop: Arc<AtomicBool>,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    let (zoo, all) = context.all_done(prepared(args, context))?;
    context.agree(zoo.said(&all))?;
    zoo.all(&all)
}

/// Everything that is checked before the first run.
fn prepared<'a>(args: &'a Args, context: &'a Context) -> Result<(Zoo<'a>, Vec<Variant>)> {
    let (plain, batch, steps, measured) = scale(&args.scale);
    let read = |paths: &[PathBuf]| -> Result<Corpus> {
        let corpus = corpus(paths, None, None)?.0;
        // All runs are measured on the same part, and no longer than it takes to tell them apart.
        let held_out = corpus.held_out();
        Corpus::of_parts(corpus.train().to_vec(), held_out[..held_out.len().min(measured)].to_vec(), 256)
    };
    let text = read(&args.text)?;
    text.check(&plain)?;
    let other = if args.adapt.is_empty() { None } else { Some(read(&args.adapt)?) };
    if let Some(other) = &other {
        other.check(&plain).map_err(|error| Error::config(format!("--adapt: {error}")))?;
    }
    let mut all = variants::all(&plain);
    if other.is_some() {
        all.extend(variants::adapted());
    }
    if let Some(name) = args.variants.iter().find(|name| !all.iter().any(|variant| variant.name == **name)) {
        let known = all.iter().map(|variant| variant.name.as_str()).collect::<Vec<_>>().join(", ");
        return Err(Error::config(format!("--variants: '{name}' is none of {known}; adapters need --adapt")));
    }
    all.retain(|variant| args.variants.is_empty() || args.variants.contains(&variant.name));
    std::fs::create_dir_all(&args.out).map_err(|error| Error::io(&args.out, error))?;
    let (gpu, stop) = (context.open()?, on_interrupt()?);
    context.note(gpu.adapter());
    let steps = args.steps.unwrap_or(steps);
    Ok((Zoo { args, context, gpu, plain, batch, steps, corpus: text, other, stop }, all))
}

fn lines(records: &[Value]) -> String {
    records.iter().map(|record| format!("{record}\n")).collect()
}

impl Zoo<'_> {
    /// What all ranks must have been told alike.
    fn said(&self, all: &[Variant]) -> [(&'static str, String); 8] {
        let names: Vec<&str> = all.iter().map(|variant| &variant.name[..]).collect();
        [
            ("--text", format!("{:032x}", self.corpus.id())),
            ("--adapt", self.other.as_ref().map_or_else(String::new, |other| format!("{:032x}", other.id()))),
            ("--scale", self.args.scale.clone()),
            ("--steps", self.steps.to_string()),
            ("--seeds", format!("{:?}", self.seeds())),
            ("--variants", names.join(",")),
            ("--precision", self.args.precision.to_string()),
            ("adapter", self.gpu.adapter().name.clone()),
        ]
    }

    fn seeds(&self) -> BTreeSet<u64> {
        self.args.seeds.iter().copied().collect()
    }

    /// Whether a line is of a run of this variant. Runs are compared with each other, so another budget or adapter does not count.
    fn is_of(&self, record: &Value, variant: &Variant) -> bool {
        record["variant"] == variant.name[..]
            && record["budget"] == self.budget(variant.is_adapted())
            && record["adapter"] == self.gpu.adapter().name[..]
    }

    /// The runs that are not among these lines, in the order of the seeds: variant, seed, and the seed's place.
    fn missing<'v>(&self, records: &[Value], variants: &'v [Variant]) -> Vec<(&'v Variant, u64, usize)> {
        let mut wanted = Vec::new();
        for (i, seed) in self.seeds().into_iter().enumerate() {
            let has =
                |variant: &&Variant| records.iter().any(|r| r["seed"] == seed && self.is_of(r, variant));
            wanted.extend(variants.iter().filter(|variant| !has(variant)).map(|variant| (variant, seed, i)));
        }
        wanted
    }

    /// What makes runs comparable, in their lines.
    fn budget(&self, adapted: bool) -> Value {
        let other = self.other.as_ref().filter(|_| adapted).map(|other| format!("{:032x}", other.id()));
        json!({
            "adapted_to": other,
            "scale": self.args.scale, "steps": self.steps, "batch": self.batch, "width": self.plain.width,
            "depth": self.plain.depth, "context": self.plain.context, "precision": self.args.precision.to_string(),
            "text": format!("{:032x}", self.corpus.id()),
        })
    }

    /// Does what is missing, seed by seed, and shows the results. Ranks share the runs.
    fn all(&self, variants: &[Variant]) -> Result<()> {
        let (context, file) = (self.context, self.args.out.join("results.jsonl"));
        let ranks = &*context.ranks;
        let mut records = on_first(ranks, || self.kept(&file))?.unwrap_or_default();
        let mut told = lines(&records).into_bytes();
        ranks.broadcast(&mut told)?;
        if !context.is_first() {
            records = table::parse(&file, &String::from_utf8_lossy(&told))?;
        }
        let wanted = self.missing(&records, variants);
        let kept = self.seeds().len() * variants.len() - wanted.len();
        context.note(format_args!("{} runs to do, {kept} kept in {}", wanted.len(), file.display()));
        let count = wanted.len();
        // Adapters begin from the plain model, so one rank does all of these of a seed.
        let owner =
            |i: usize, variant: &Variant, seed: usize| match variant.is_adapted() || variant.name == "none" {
                true => seed % ranks.size(),
                false => i % ranks.size(),
            };
        let own = wanted.into_iter().enumerate().filter(|(i, (v, _, at))| owner(*i, v, *at) == ranks.rank());
        let own: Vec<(usize, (&Variant, u64))> = own.map(|(i, (v, seed, _))| (i, (v, seed))).collect();
        if ranks.size() > 1 {
            context.note(format_args!("rank 0 of {} does {} of them", ranks.size(), own.len()));
        }
        let before = records.clone();
        match self.runs(&own, count, &file, &mut records) {
            // The others may have hours of work before they would hear of it. Their runs go on from their checkpoints.
            Err(error) if error.kind() != ErrorKind::Stopped => return Err(error),
            done => context.all_done(done)?,
        }
        // What all have done is read again by the first.
        let records = on_first(ranks, || match ranks.size() {
            1 => Ok(records),
            _ => self.gathered(&file, &before, variants),
        })?;
        let Some(records) = records else { return Ok(()) };
        let own = |record: &Value| variants.iter().any(|variant| self.is_of(record, variant));
        let own: Vec<Value> = records.into_iter().filter(own).collect();
        table::show(context, &self.args.out, variants, &own)
    }

    /// The lines of all ranks, in order. Those that are not of `before` are told.
    fn gathered(&self, file: &Path, before: &[Value], variants: &[Variant]) -> Result<Vec<Value>> {
        let mut records = self.kept(file)?;
        let lost = self.missing(&records, variants);
        if let Some((variant, seed, _)) = lost.first() {
            return Err(Error::config(format!(
                "--out: {} runs of other ranks are not in {}, such as {} with seed {seed}; name a folder that all ranks share",
                lost.len(),
                self.args.out.display(),
                variant.name
            )));
        }
        let place = |record: &Value| {
            let variant = variants.iter().position(|variant| record["variant"] == variant.name[..]);
            (record["seed"].as_u64(), variant)
        };
        records.sort_by_key(place);
        files::replace_with(file, lines(&records))?;
        let new = records.iter().filter(|record| !before.contains(record));
        new.into_iter().try_for_each(|record| self.context.record(record))?;
        Ok(records)
    }

    /// Does runs, each of which is kept when it ends.
    fn runs(
        &self,
        own: &[(usize, (&Variant, u64))],
        count: usize,
        file: &Path,
        records: &mut Vec<Value>,
    ) -> Result<()> {
        let ranks = &*self.context.ranks;
        let mut mine = Vec::new();
        for (i, (variant, seed)) in own {
            self.context.note(format_args!("{} of {count}: {}, seed {seed}", i + 1, variant.name));
            let record = self.one(variant, *seed)?;
            if ranks.size() == 1 {
                self.context.record(&record)?;
            }
            records.push(record.clone());
            mine.push(record);
            // The file is replaced after every run, so an interruption loses only the current run's last steps. Ranks have one each.
            match ranks.size() {
                1 => files::replace_with(file, lines(records))?,
                _ => files::replace_with(&self.of_rank(ranks.rank())?, lines(&mine))?,
            }
            self.clean(variant, *seed)?;
            self.gpu.trim();
        }
        Ok(())
    }

    /// The file of a rank's results, until rank 0 has put them to the others.
    fn of_rank(&self, rank: usize) -> Result<PathBuf> {
        let folder = self.args.out.join("unfinished");
        std::fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, error))?;
        Ok(folder.join(format!("rank-{rank}.jsonl")))
    }

    /// What is kept, with what ranks of this or an earlier call have left, which is put to it.
    fn kept(&self, file: &Path) -> Result<Vec<Value>> {
        let mut records = table::read(file)?;
        let folder = self.of_rank(0)?;
        let folder = folder.parent().unwrap_or(Path::new("."));
        let found = std::fs::read_dir(folder).and_then(|all| all.collect::<Result<Vec<_>, _>>());
        let mut left: Vec<PathBuf> =
            found.map_err(|error| Error::io(folder, error))?.into_iter().map(|entry| entry.path()).collect();
        left.retain(|path| path.extension().is_some_and(|end| end == "jsonl"));
        left.sort();
        for path in &left {
            // A call that was killed here may have put them to the others already.
            let new = table::read(path)?;
            records.extend(new.into_iter().filter(|record| !records.contains(record)).collect::<Vec<_>>());
        }
        if !left.is_empty() {
            files::replace_with(file, lines(&records))?;
            for path in left {
                std::fs::remove_file(&path).map_err(|error| Error::io(&path, error))?;
            }
        }
        Ok(records)
    }

    /// The options of a run.
    fn how(&self, steps: u64, seed: u64) -> How {
        How {
            steps,
            batch: self.batch,
            accumulate: 1,
            exchange: Exchange::Gradients,
            lr: None,
            warmup: None,
            weight_decay: None,
            precision: self.args.precision,
            seed,
            every: steps.div_ceil(4),
        }
    }

    /// Trains a model, or goes on with it. Returns its loss on held-out tokens, and seconds.
    fn train(&self, model: &Lm, corpus: &Corpus, name: &str, how: &How) -> Result<[f64; 2]> {
        let checkpoint = self.args.out.join("unfinished").join(format!("{name}.safetensors"));
        let folder = checkpoint.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        let mut training =
            Training::new(model, corpus, how.options(model.config.width)?)?.stop(self.stop.clone());
        // What was left by other settings is begun anew. Nothing of the model has changed then.
        match checkpoint.is_file().then(|| training.resume(&checkpoint)) {
            Some(Err(error)) if error.kind() == ErrorKind::Format => {
                self.context.note(format_args!("{error}; begun anew"));
            }
            Some(resumed) => resumed?,
            None => {}
        }
        if !watched(self.context, &mut training, Some(&checkpoint), &mut |_| Ok(()))? {
            return Err(Error::stopped("stopped; the same command goes on"));
        }
        let last = training.curve().last().map_or([f64::NAN; 2], |point| [point.validation, point.seconds]);
        Ok(last)
    }

    /// Removes the checkpoints of a run that is kept. The plain model is what adapters begin from.
    fn clean(&self, variant: &Variant, seed: u64) -> Result<()> {
        for name in [format!("{}-{seed}", variant.name), format!("{}-{seed}-stages", variant.name)] {
            let checkpoint = self.args.out.join("unfinished").join(format!("{name}.safetensors"));
            if variant.name != "none" && checkpoint.is_file() {
                std::fs::remove_file(&checkpoint).map_err(|error| Error::io(&checkpoint, error))?;
            }
        }
        Ok(())
    }

    fn one(&self, variant: &Variant, seed: u64) -> Result<Value> {
        let name = format!("{}-{seed}", variant.name);
        let new = |config: &LmConfig| Lm::try_new(&self.gpu, config.clone(), &mut Rng::new(seed));
        let (short, long) = (self.how(few(self.steps), seed), self.how(self.steps, seed));
        let (model, [validation, seconds]) = match &variant.kind {
            Kind::Model(config) => {
                let model = new(config)?;
                let found = self.train(&model, &self.corpus, &name, &long)?;
                (model, found)
            }
            Kind::Short(config) => {
                let model = new(config)?;
                let found = self.train(&model, &self.corpus, &name, &short)?;
                (model, found)
            }
            Kind::Expanded(config) => {
                let staged = new(config)?;
                let [_, before] = self.train(&staged, &self.corpus, &format!("{name}-stages"), &long)?;
                let model = staged.untied(&(0..config.depth).collect::<Vec<_>>())?;
                let [loss, seconds] = self.train(&model, &self.corpus, &name, &short)?;
                (model, [loss, before + seconds])
            }
            Kind::Adapted(kind) => return self.adapt(variant, kind.as_ref(), seed),
        };
        let [stored, used] = model.counts();
        Ok(self.record(
            variant,
            seed,
            json!({
                "stored": stored, "used": used, "validation": validation, "seconds": seconds,
                "sharing": model.config.sharing.text(),
            }),
        ))
    }

    /// Adapts the plain model of this seed to the other text.
    fn adapt(
        &self,
        variant: &Variant,
        kind: Option<&tiebeam::models::adapter::AdapterKind>,
        seed: u64,
    ) -> Result<Value> {
        let other = self.other.as_ref().ok_or_else(|| Error::config("adapters need --adapt"))?;
        let plain = Lm::try_new(&self.gpu, self.plain.clone(), &mut Rng::new(seed))?;
        self.train(&plain, &self.corpus, &format!("none-{seed}"), &self.how(self.steps, seed))?;
        let before = other.measure(&plain, usize::MAX, &Alone, &mut |_, _| Ok(()))?;
        let adapter = kind.map(|kind| {
            let targets: Vec<&str> = LINEARS.iter().copied().filter(|name| *name != "gate").collect();
            Adapter::new(&plain, AdapterConfig::new(*kind, &targets)?, &mut Rng::new(seed))
        });
        let adapter = adapter.transpose()?;
        let model = match &adapter {
            Some(adapter) => adapter.apply(&plain)?,
            None => plain,
        };
        let mut how = self.how(few(self.steps), seed);
        how.weight_decay = Some(0.0);
        // Adapters take higher rates than whole models.
        how.lr = adapter.as_ref().map(|_| 1.28 / model.config.width as f32);
        let [validation, seconds] = self.train(&model, other, &format!("{}-{seed}", variant.name), &how)?;
        let trained: usize = model.parameters().trainable().iter().map(|(_, leaf)| leaf.count()).sum();
        Ok(self.record(
            variant,
            seed,
            json!({
                "stored": trained, "used": model.counts()[1], "validation": validation, "before": before,
                "seconds": seconds, "adapted": true,
            }),
        ))
    }

    /// The line of a run.
    fn record(&self, variant: &Variant, seed: u64, mut own: Value) -> Value {
        let common = json!({
            "line": "run", "variant": variant.name, "seed": seed, "budget": self.budget(variant.is_adapted()),
            "adapter": self.gpu.adapter().name, "driver": self.gpu.adapter().driver,
            "version": env!("CARGO_PKG_VERSION"),
        });
        for (key, value) in common.as_object().into_iter().flatten() {
            own[key] = value.clone();
        }
        own
    }
}
