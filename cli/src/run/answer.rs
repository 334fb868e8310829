//! One answer: the prompt, then a token at a time, each printed as soon as it is complete.

use super::Runner;
use crate::context::unless_stopped;
use serde_json::{Value, json};
use std::fmt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tiebeam::decode::Sampler;
use tiebeam::models::lm::Session;
use tiebeam::{Result, files};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The model said so.
    Model,
    /// As many tokens as were asked for.
    Tokens,
    /// The context is full.
    Context,
    /// Ctrl-C.
    Stopped,
}

/// An answer and how long it took.
pub struct Answer {
    pub text: String,
    /// The tokens of the answer that the session has read.
    pub tokens: Vec<u32>,
    count: usize,
    end: End,
    prompt: usize,
    prompt_time: Duration,
    answer_time: Duration,
    /// From the start of the command, or from the question, to the first token.
    first: Duration,
    peak: u64,
}

impl Answer {
    /// Reads the prompt's tokens and answers a question that came at `since`. If the answer `continues` the prompt's text, its
    /// first blank is written.
    pub fn generate(
        runner: &Runner,
        session: &mut Session,
        prompt: &[u32],
        sampler: &mut Sampler,
        (continues, since): (bool, Instant),
    ) -> Result<Answer> {
        let started = Instant::now();
        let scores = read(runner, session, prompt)?;
        let prompt_time = started.elapsed();
        let mut stream = runner.words.stream();
        if continues {
            prompt.iter().try_for_each(|&token| stream.push(token).map(drop))?;
        }
        let (begun, before, most) = (Instant::now(), session.length(), runner.args.tokens as usize);
        let (mut text, mut first, mut end) = (String::new(), None, End::Context);
        let mut tokens = session.generate(scores, most, sampler, |token| {
            first.get_or_insert(since.elapsed());
            let over = match () {
                () if runner.words.ends().contains(&token) => Some(End::Model),
                () if runner.stop.load(Ordering::Relaxed) => Some(End::Stopped),
                () => None,
            };
            if let Some(over) = over {
                end = over;
                return Ok(false);
            }
            let piece = stream.push(token)?;
            runner.context.print(&piece);
            text += &piece;
            Ok(true)
        })?;
        let count = tokens.len();
        if end == End::Context && count == most {
            end = End::Tokens;
        }
        tokens.truncate(session.length() - before);
        let rest = stream.finish();
        runner.context.print(&rest);
        text += &rest;
        Ok(Answer {
            text,
            tokens,
            count,
            end,
            prompt: prompt.len(),
            prompt_time,
            answer_time: begun.elapsed(),
            first: first.unwrap_or_default(),
            peak: runner.gpu.memory_stats().peak,
        })
    }

    pub fn was_stopped(&self) -> bool {
        self.end == End::Stopped
    }

    fn rate(count: usize, time: Duration) -> f64 {
        count as f64 / time.as_secs_f64().max(1e-9)
    }

    /// The first token was known from the prompt's scores. The rate is that of the others.
    fn answer_rate(&self) -> f64 {
        Answer::rate(self.tokens.len(), self.answer_time)
    }

    /// The answer as a JSON line.
    pub fn line(&self) -> Value {
        let end = match self.end {
            End::Model => "model",
            End::Tokens => "tokens",
            End::Context => "context",
            End::Stopped => "stopped",
        };
        json!({
            "line": "answer", "text": self.text, "end": end, "prompt_tokens": self.prompt, "tokens": self.count,
            "prompt_tokens_per_second": Answer::rate(self.prompt, self.prompt_time),
            "tokens_per_second": self.answer_rate(), "seconds_to_first_token": self.first.as_secs_f64(),
            "peak_device_bytes": self.peak,
        })
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "prompt {} tokens, {:.1} a second; first token after {:.2} s; answer {} tokens, {:.1} a second; at most {} on \
             the device",
            self.prompt,
            Answer::rate(self.prompt, self.prompt_time),
            self.first.as_secs_f64(),
            self.count,
            self.answer_rate(),
            files::size(self.peak)
        )?;
        match self.end {
            End::Model => Ok(()),
            End::Tokens => write!(f, "; cut at --tokens"),
            End::Context => write!(f, "; cut where the context was full (--context)"),
            End::Stopped => write!(f, "; stopped"),
        }
    }
}

/// Reads the prompt, with a bar if it has several chunks.
fn read(runner: &Runner, session: &mut Session, prompt: &[u32]) -> Result<Vec<f32>> {
    let long = prompt.len() > runner.args.chunk as usize && runner.is_watched();
    let template = "prompt {bar:24} {pos}/{len} tokens, ETA {eta}";
    let bar = long.then(|| runner.context.bar(Some(prompt.len() as u64), template));
    let scores = session.push_watched(prompt, |done| {
        if let Some(bar) = &bar {
            bar.set_position(done as u64);
        }
        unless_stopped(&runner.stop, "the prompt was not read to its end")
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    scores
}
