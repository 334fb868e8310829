//! `tiebeam run`: generates text with a language model.

mod answer;
mod chat;
pub mod source;

use crate::context::{Context, on_interrupt};
use answer::Answer;
use source::Source;
use std::io::{IsTerminal, stderr, stdin};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tiebeam::decode::{Sampler, SamplerOptions};
use tiebeam::models::llama::Form;
use tiebeam::models::lm::{Lm, SessionOptions};
use tiebeam::text::{Message, Words};
use tiebeam::{DType, Error, Gpu, Result};

const EXAMPLES: &str = "\
Examples:
  tiebeam run model.gguf --prompt 'Why is the sky blue?'
  tiebeam run model.gguf --prompt 'Once upon a time' --raw --temperature 0.8 --top-p 0.95 --seed 7
  tiebeam run folder --file question.txt --tokens 512 --json
  tiebeam run out/lm --prompt 'In the beginning' --temperature 0.8
  tiebeam run model.gguf

Without --prompt and --file, the prompt is read from stdin; at a terminal, a model with a chat template chats.
The first run compiles kernels for this device, which takes seconds to a minute; later runs find them in the driver's cache.";

/// Generate text with a language model: a GGUF file, or a folder of safetensors with config.json and tokenizer
///
/// Llama 2 and 3, Mistral, Qwen2, SmolLM and what has their form, and what `train` and `convert` write. Packed weights stay packed on the device. `tiebeam inspect`
/// says whether a model is read, and why not.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// A GGUF file, a folder of Hugging Face's libraries, or one of `tiebeam train` or `convert`
    model: PathBuf,
    /// Folder of an adapter, of `tiebeam finetune` or PEFT, to put on the weights
    #[arg(long, value_name = "FOLDER")]
    adapter: Option<PathBuf>,
    /// Take an adapter of another base, such as the same model in another packing
    #[arg(long, requires = "adapter")]
    other_base: bool,
    /// Text to answer or, with --raw, to continue
    #[arg(short, long, conflicts_with = "file")]
    prompt: Option<String>,
    /// File of the prompt; `-` reads stdin
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// Continue the text as it is, without the model's chat template
    #[arg(long, conflicts_with = "system")]
    raw: bool,
    /// Instruction before the conversation, where the template has a place for it
    #[arg(long)]
    system: Option<String>,
    /// Divides the scores before a token is drawn; 0 always takes the likeliest
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Draw among the likeliest tokens whose probabilities add up to this
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Draw among so many of the likeliest tokens; 0 takes all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Start of the random numbers: equal seeds give equal answers on one device
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Most tokens of an answer
    #[arg(short = 'n', long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Most tokens of prompt and answer together, if the model has as many. Keys and values take memory for all of them
    #[arg(short, long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    context: u32,
    /// How keys and values are kept: f16, or f32, which takes twice the memory and does not round them
    #[arg(long, default_value = "f16", value_parser = ["f32", "f16"])]
    keys: String,
    /// Tokens of a prompt that are computed at a time
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=8192))]
    chunk: u32,
}

impl Args {
    /// Draws of the tokens that a tokenizer has.
    fn sampler(&self, vocab: usize) -> Result<Sampler> {
        let options = SamplerOptions::default().temperature(self.temperature).top_p(self.top_p);
        Sampler::new(options.top_k(self.top_k).seed(self.seed).vocab(vocab))
    }

    fn session(&self, model: &Lm) -> SessionOptions {
        let keys = if self.keys == "f16" { DType::F16 } else { DType::F32 };
        let context = model.config.context.min(self.context as usize);
        SessionOptions::default().context(context).chunk(self.chunk as usize).keys(keys)
    }

    /// The messages of a conversation that begins.
    fn opening(&self) -> Vec<Message> {
        self.system.iter().map(Message::system).collect()
    }

    /// The prompt that was given, if one was or stdin has it.
    fn text(&self, context: &Context) -> Result<Option<String>> {
        match (&self.prompt, &self.file) {
            (Some(prompt), _) => Ok(Some(prompt.clone())),
            (None, Some(file)) => context.read(file).map(|text| Some(self.without_end(text))),
            (None, None) if stdin().is_terminal() => Ok(None),
            (None, None) => context.read("-".as_ref()).map(|text| Some(self.without_end(text))),
        }
    }

    /// The end of the last line of a file or of `echo` belongs to no question. With --raw the text is kept as it is.
    fn without_end(&self, text: String) -> String {
        if self.raw {
            return text;
        }
        let line = text.strip_suffix('\n').unwrap_or(&text);
        line.strip_suffix('\r').unwrap_or(line).into()
    }
}

/// The tokenizer of a model of ours stands in its folder.
pub fn beside(model: &Path) -> PathBuf {
    let ours = model.extension().is_some_and(|end| end == "safetensors");
    model.parent().filter(|_| ours).map_or_else(
        || model.into(),
        |folder| {
            if folder.as_os_str().is_empty() { ".".into() } else { folder.into() }
        },
    )
}

/// What a run works with.
struct Runner<'a> {
    args: &'a Args,
    context: &'a Context,
    gpu: Gpu,
    words: Words,
    model: Lm,
    /// The model's own context.
    most: usize,
    /// When the command was started.
    begun: Instant,
    stop: Arc<AtomicBool>,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    let begun = Instant::now();
    let text = args.text(context)?;
    if text.as_ref().is_some_and(String::is_empty) {
        return Err(Error::config("the prompt is empty; give at least one word"));
    }
    // Everything that needs no device is read first, so that what is wrong is said at once.
    let source = Source::open(&args.model, context)?;
    let words = Words::open(&beside(&args.model))?;
    let mut sampler = args.sampler(words.table())?;
    let chats = !args.raw && words.chat().is_some();
    if text.is_none() && !chats {
        let message = if args.raw { "--raw continues a text" } else { "this model has no chat template" };
        return Err(Error::config(format!("{message}; give it one with --prompt or --file")));
    }
    if args.system.is_some() && !chats {
        return Err(Error::config("--system is for chats, and this model has no chat template"));
    }
    let gpu = context.open()?;
    let stop = on_interrupt()?;
    let most = source.config().context;
    let read = (most.min(args.context as usize), Form::Stored);
    let model = source.load(&gpu, read, context, &stop)?;
    let model = match &args.adapter {
        Some(folder) => source.adapted(&args.model, &model, folder, args.other_base)?,
        None => model,
    };
    let runner = Runner { args, context, gpu, words, model, most, begun, stop };
    match text {
        None => chat::talk(&runner, &mut sampler),
        Some(text) => runner.answer_once(&text, &mut sampler),
    }
}

impl Runner<'_> {
    /// The tokens of a prompt, and of the text that it continues, if it does.
    fn tokens(&self, text: &str) -> Result<(Vec<u32>, bool)> {
        match self.words.chat() {
            Some(template) if !self.args.raw => {
                let mut messages = self.args.opening();
                messages.push(Message::user(text));
                Ok((self.words.encode_chat(&template.render(&messages, true)?)?, false))
            }
            _ => Ok((self.words.encode(text)?, true)),
        }
    }

    fn answer_once(&self, text: &str, sampler: &mut Sampler) -> Result<()> {
        let (prompt, continues) = self.tokens(text)?;
        let options = self.args.session(&self.model);
        if prompt.len() >= options.context {
            return Err(Error::config(format!(
                "the prompt has {} tokens, which leaves no place for an answer in a context of {} (the model has {}); \
                 --context sets it",
                prompt.len(),
                options.context,
                self.most
            )));
        }
        let mut session = self.model.session_with(options)?;
        if continues {
            self.context.print(text);
        }
        let answer = Answer::generate(self, &mut session, &prompt, sampler, (continues, self.begun))?;
        self.context.print("\n");
        self.context.note(&answer);
        self.context.record(&answer.line())?;
        if answer.was_stopped() {
            self.context.whole();
            return Err(Error::stopped("stopped; the answer so far was printed"));
        }
        Ok(())
    }

    /// Shows how far a long prompt is, at a terminal.
    fn is_watched(&self) -> bool {
        stderr().is_terminal()
    }
}
