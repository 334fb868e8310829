//! Questions and answers for fine-tuning, a line of JSON each.

use super::data::{Data, Part};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::lm::{IGNORED, Lm, LmConfig};
use crate::ranks::{Ranks, share, spread};
use crate::rng::Rng;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use crate::text::{Message, Words};
use serde_json::Value;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use twox_hash::XxHash3_128;

/// Tokens of a text, and where the part begins that is learned.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Example {
    tokens: Vec<u32>,
    learned: usize,
}

impl Example {
    /// Number of tokens that are learned.
    fn targets(&self) -> usize {
        self.tokens.len() - self.learned
    }
}

/// Examples to learn from, and some that are held out. Only answers count in the loss.
pub struct Examples {
    train: Vec<Example>,
    held_out: Vec<Example>,
    seed: u64,
    /// The most tokens of a batch.
    context: usize,
    /// How many were longer than the context and lost their ends.
    cut: usize,
    /// The order of the epoch that was asked for last.
    order: Mutex<Option<(u64, Vec<usize>)>>,
}

/// Lengths of batches are multiples of this, so that there are few of them.
const STEP: usize = 32;
/// Examples that are measured at a time.
const ROWS: usize = 8;

impl Examples {
    /// Reads lines of JSON. A line is one of
    ///
    /// * `{"text": ..}`, all of which is learned,
    /// * `{"prompt": .., "completion": ..}`,
    /// * `{"instruction": .., "input": .., "output": ..}`, where `input` may be missing (Alpaca),
    /// * `{"messages": [{"role": .., "content": ..}, ..]}`, whose last message is the answer; earlier ones of the assistant are not learned.
    ///
    /// Where the model has a chat template, and not if `raw`, prompts and answers are written by it; else the answer follows the prompt
    /// as it is. Answers end with the model's end token. The last tenth is held out, or all of `validation`. Longer examples than
    /// `context` lose their ends.
    ///
    /// # Errors
    /// [`Error::Format`] with the number of the line that cannot be read, has none of these forms, no answer, or a prompt that leaves no
    /// place for one; [`Error::Io`] when a file cannot be read; [`Error::Config`] for fewer than two examples.
    pub fn of_jsonl(
        words: &Words,
        path: &Path,
        validation: Option<&Path>,
        (context, raw, seed): (usize, bool, u64),
    ) -> Result<Examples> {
        let form = Form { words, context, chats: words.chat().is_some() && !raw };
        let (mut train, mut cut) = form.read(path)?;
        let held_out = match validation {
            Some(path) => {
                let (held_out, more) = form.read(path)?;
                cut += more;
                held_out
            }
            None => train.split_off(train.len() - (train.len() / 10).max(1).min(train.len())),
        };
        if train.is_empty() || held_out.is_empty() {
            let (train, held_out) = (train.len(), held_out.len());
            return Err(Error::config(format!(
                "{}: {train} examples to train on and {held_out} held out; both parts need one",
                path.display()
            )));
        }
        Ok(Examples { train, held_out, seed, context, cut, order: Mutex::default() })
    }

    /// Numbers of examples to train on and held out.
    pub fn counts(&self) -> [usize; 2] {
        [self.train.len(), self.held_out.len()]
    }

    /// How many examples were longer than the context and lost their ends.
    pub fn cut(&self) -> usize {
        self.cut
    }

    /// The example at place `at` of all epochs, each of which has an order of its own.
    fn at(&self, at: u64) -> &Example {
        let (epoch, i) = (at / self.train.len() as u64, (at % self.train.len() as u64) as usize);
        let mut order = crate::gpu::lock(&self.order);
        if order.as_ref().is_none_or(|(known, _)| *known != epoch) {
            let mut all: Vec<usize> = (0..self.train.len()).collect();
            Rng::new(self.seed.wrapping_add(epoch)).shuffle(&mut all);
            *order = Some((epoch, all));
        }
        &self.train[order.as_ref().map_or(i, |(_, order)| order[i])]
    }
}

/// Tokens and targets of examples, padded to one length.
fn padded(gpu: &Gpu, all: &[&Example], context: usize) -> [Tensor; 2] {
    let longest = all.iter().map(|example| example.tokens.len() - 1).max().unwrap_or(1);
    let length = longest.next_multiple_of(STEP).min(context);
    let (mut tokens, mut targets) = (Vec::new(), Vec::new());
    for Example { tokens: own, learned } in all {
        let pad = length - (own.len() - 1);
        tokens.extend_from_slice(&own[..own.len() - 1]);
        tokens.extend(vec![0; pad]);
        targets.extend((1..own.len()).map(|i| if i < *learned { IGNORED } else { own[i] as i32 }));
        targets.extend(vec![IGNORED; pad]);
    }
    let shape = [all.len(), length];
    [Tensor::from_slice(gpu, &tokens, shape), Tensor::from_slice(gpu, &targets, shape)]
}

/// How a line becomes an example.
struct Form<'a> {
    words: &'a Words,
    context: usize,
    chats: bool,
}

/// What is wrong with a line of JSON, and where in it.
fn fault(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text);
    format!("{what} at column {}", error.column())
}

/// A line's prompt and answer.
enum Said {
    Text(String),
    Pair(String, String),
    Messages(Vec<Message>),
}

impl Form<'_> {
    /// The examples of a file, and how many of them were cut.
    fn read(&self, path: &Path) -> Result<(Vec<Example>, usize)> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
        let (mut all, mut cut) = (Vec::new(), 0);
        // Some editors write a mark at the start.
        for (i, line) in text
            .trim_start_matches('\u{feff}')
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
        {
            let wrong = |what: String| Error::format(path, format!("line {}: {what}", i + 1));
            let json: Value = serde_json::from_str(line).map_err(|error| wrong(fault(&error)))?;
            let said = said(&json).map_err(wrong)?;
            let mut example = self.example(&said).map_err(|error| wrong(error.to_string()))?;
            let most = self.context + 1;
            if example.learned >= most {
                return Err(wrong(format!(
                    "its prompt has {} tokens, which leaves no place for an answer in a context of {}",
                    example.learned, self.context
                )));
            }
            cut += usize::from(example.tokens.len() > most);
            example.tokens.truncate(most);
            if example.learned >= example.tokens.len() {
                return Err(wrong("it has no answer".into()));
            }
            all.push(example);
        }
        Ok((all, cut))
    }

    fn example(&self, said: &Said) -> Result<Example> {
        let words = self.words;
        let chat = words.chat().filter(|_| self.chats);
        let messages = match (said, chat) {
            (Said::Messages(messages), Some(_)) => messages.clone(),
            (Said::Pair(prompt, answer), Some(_)) => vec![Message::user(prompt), Message::assistant(answer)],
            (Said::Text(text), _) => {
                let tokens = [words.encode(text)?, self.end()].concat();
                return Ok(Example { tokens, learned: 1 });
            }
            (Said::Pair(prompt, answer), None) => return self.pair(prompt, answer),
            (Said::Messages(_), None) => {
                return Err(Error::config(
                    "`messages` need a model with a chat template; this one has none, or --raw was given",
                ));
            }
        };
        let chat = chat.ok_or_else(|| Error::config("the model has no chat template"))?;
        let (last, before) = messages.split_last().ok_or_else(|| Error::config("there are no messages"))?;
        let prompt = chat.render(before, true)?;
        let whole = chat.render(&messages, false)?;
        let before = words.encode_chat(&prompt)?;
        let learned = before.len();
        // The answer is what the template adds behind the prompt, if it does only that. It is cut into tokens by itself, since the
        // model answers behind the prompt's last token.
        let tokens = match whole.strip_prefix(&prompt) {
            Some(answer) => [before, words.parsed(answer)?].concat(),
            None => [before, words.encode_plain(&last.content)?, self.end()].concat(),
        };
        Ok(Example { tokens, learned })
    }

    fn pair(&self, prompt: &str, answer: &str) -> Result<Example> {
        let before = self.words.encode(prompt)?;
        let (learned, answer) = (before.len(), self.words.encode_plain(answer)?);
        if learned == 0 || answer.is_empty() {
            return Err(Error::config(EMPTY));
        }
        Ok(Example { tokens: [before, answer, self.end()].concat(), learned })
    }

    fn end(&self) -> Vec<u32> {
        self.words.ends().first().copied().into_iter().collect()
    }
}

const EMPTY: &str = "its prompt or its answer is empty";

/// Reads what a line says.
fn said(json: &Value) -> Result<Said, String> {
    let text = |key: &str| match &json[key] {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        other => Err(format!("`{key}` is {other}, and must be text")),
    };
    if !json["messages"].is_null() {
        let messages: Vec<Message> = serde_json::from_value(json["messages"].clone())
            .map_err(|error| format!("`messages`: {error}"))?;
        return match &messages[..] {
            [.., last] if last.role != "assistant" => {
                Err("the last of its messages must be the assistant's".into())
            }
            [] | [_] => Err("its `messages` need one before the answer".into()),
            [.., last] if last.content.trim().is_empty() => Err(EMPTY.into()),
            _ => Ok(Said::Messages(messages)),
        };
    }
    let filled = |prompt: String, answer: String| match prompt.is_empty() || answer.is_empty() {
        true => Err(EMPTY.to_string()),
        false => Ok(Said::Pair(prompt, answer)),
    };
    match (text("prompt")?, text("completion")?, text("instruction")?, text("output")?, text("text")?) {
        (Some(prompt), Some(answer), ..) => filled(prompt, answer),
        (_, _, Some(instruction), Some(answer), _) => {
            let input = text("input")?.filter(|input| !input.is_empty());
            let prompt = input.map_or(instruction.clone(), |input| format!("{instruction}\n{input}"));
            filled(prompt, answer)
        }
        (None, None, None, None, Some(text)) if text.is_empty() => Err("its text is empty".into()),
        (None, None, None, None, Some(text)) => Ok(Said::Text(text)),
        _ => Err("it has neither text, prompt and completion, instruction and output, nor messages".into()),
    }
}

impl Data for Examples {
    fn check(&self, model: &LmConfig) -> Result<()> {
        let all = || self.train.iter().chain(&self.held_out);
        let longest = all().map(|example| example.tokens.len() - 1).max().unwrap_or(0);
        let highest = all().flat_map(|example| &example.tokens).max().copied().unwrap_or(0);
        match longest.max(self.context) > model.context || highest as usize >= model.vocab {
            false => Ok(()),
            true => Err(Error::config(format!(
                "examples of up to {longest} tokens below {}, and the model has a context of {} and {} tokens",
                highest + 1,
                model.context,
                model.vocab
            ))),
        }
    }

    fn id(&self) -> u128 {
        let mut hasher = XxHash3_128::new();
        hasher.write(&self.seed.to_le_bytes());
        for part in [&self.train, &self.held_out] {
            hasher.write(&(part.len() as u64).to_le_bytes());
            for Example { tokens, learned } in part {
                hasher.write(&(*learned as u64).to_le_bytes());
                hasher.write(&(tokens.len() as u64).to_le_bytes());
                hasher.write(bytemuck::cast_slice(tokens));
            }
        }
        hasher.finish_128()
    }

    /// The next examples of the epoch, in its order.
    fn batch(
        &self,
        gpu: &Gpu,
        [batch, _]: [usize; 2],
        (parts, wanted): (usize, Range<usize>),
        step: u64,
        _: &mut Rng,
    ) -> Vec<Part> {
        let first = step * batch as u64;
        let chosen: Vec<&Example> = (0..batch as u64).map(|i| self.at(first + i)).collect();
        let targets = |all: &[&Example]| all.iter().map(|example| example.targets()).sum::<usize>();
        let part = |i| {
            let rows = &chosen[share(batch, i, parts)];
            let weight = (targets(rows) * parts) as f64 / targets(&chosen) as f64;
            let [tokens, targets] = padded(gpu, rows, self.context);
            Part { tokens, targets, weight: weight as f32 }
        };
        wanted.map(part).collect()
    }

    fn is_even(&self) -> bool {
        false
    }

    fn measure(
        &self,
        model: &Lm,
        limit: usize,
        ranks: &dyn Ranks,
        on: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<f64> {
        let (mut chunks, mut count) = (Vec::new(), 0);
        for chunk in self.held_out.chunks(ROWS) {
            let own: usize = chunk.iter().map(Example::targets).sum();
            chunks.push((chunk, own));
            count += own;
            if count >= limit {
                break;
            }
        }
        let losses = spread(ranks, chunks.len(), |i| {
            let (chunk, own) = chunks[i];
            let [tokens, targets] = padded(model.gpu(), &chunk.iter().collect::<Vec<_>>(), self.context);
            let loss = no_grad(|| model.loss(&tokens, &targets)).item()?;
            on((i * ROWS + chunk.len()).min(self.held_out.len()), self.held_out.len())?;
            Ok(f64::from(loss) * own as f64)
        })?;
        Ok(losses.iter().sum::<f64>() / count.max(1) as f64)
    }
}
