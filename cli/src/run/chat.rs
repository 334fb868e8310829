//! A conversation at a terminal.

use super::Runner;
use super::answer::Answer;
use std::io::{BufRead, Write, stderr, stdin};
use std::sync::atomic::Ordering;
use std::time::Instant;
use tiebeam::decode::Sampler;
use tiebeam::models::lm::Session;
use tiebeam::text::Message;
use tiebeam::{Error, Result};

const HELP: &str = "\
/clear forgets the conversation, /bye or Ctrl-D ends it, Ctrl-C stops an answer and ends at the prompt";

/// What has been said, and the tokens that the session has read.
struct Talk<'a> {
    runner: &'a Runner<'a>,
    session: Session<'a>,
    messages: Vec<Message>,
    read: Vec<u32>,
}

/// Talks until the user ends it.
pub fn talk(runner: &Runner, sampler: &mut Sampler) -> Result<()> {
    let session = runner.model.session_with(runner.args.session(&runner.model))?;
    let mut talk = Talk { runner, session, messages: runner.args.opening(), read: Vec::new() };
    runner.context.note(HELP);
    loop {
        // While nothing is computed a signal ends the program at once, as a second one does.
        runner.stop.store(true, Ordering::SeqCst);
        let Some(line) = question()? else { return Ok(()) };
        runner.stop.store(false, Ordering::SeqCst);
        match line.trim() {
            "" => {}
            "/bye" => return Ok(()),
            "/clear" => talk.clear(),
            command if command.starts_with('/') => runner.context.note(HELP),
            text => {
                let before = talk.messages.len();
                if let Err(error) = talk.answer(text, sampler) {
                    // What went wrong is said, and the conversation goes on before the question.
                    runner.context.error(&error);
                    talk.messages.truncate(before);
                    talk.forget_tokens();
                }
            }
        }
    }
}

/// Reads a line, `None` at the end of stdin.
fn question() -> Result<Option<String>> {
    let mut err = stderr();
    let _ = err.write_all(b"> ").and_then(|()| err.flush());
    let mut line = String::new();
    let read =
        stdin().lock().read_line(&mut line).map_err(|e| Error::io(std::path::Path::new("stdin"), e))?;
    if read == 0 {
        let _ = err.write_all(b"\n");
    }
    Ok((read > 0).then_some(line))
}

impl Talk<'_> {
    fn clear(&mut self) {
        self.messages = self.runner.args.opening();
        self.forget_tokens();
    }

    fn forget_tokens(&mut self) {
        self.session.clear();
        self.read.clear();
    }

    /// Answers a message. Tokens that the session has read already are not computed again.
    fn answer(&mut self, text: &str, sampler: &mut Sampler) -> Result<()> {
        let (runner, since) = (self.runner, Instant::now());
        self.messages.push(Message::user(text));
        let template = runner.words.chat().ok_or_else(|| Error::config("the model has no chat template"))?;
        let all = runner.words.encode_chat(&template.render(&self.messages, true)?)?;
        let room = runner.args.session(&runner.model).context;
        if all.len() >= room {
            return Err(Error::config(format!(
                "the conversation has {} tokens and the context {room}; /clear forgets it, --context gives more room",
                all.len()
            )));
        }
        // The last token is always computed, because its scores are wanted.
        let same = self.read.iter().zip(&all[..all.len() - 1]).take_while(|(a, b)| a == b).count();
        if !self.session.truncate(same) {
            self.read.clear();
        }
        self.read.truncate(self.session.length());
        let new = &all[self.read.len()..];
        let answer = Answer::generate(runner, &mut self.session, new, sampler, (false, since))?;
        self.read.extend(new);
        self.read.extend(&answer.tokens);
        runner.context.print("\n");
        runner.context.note(&answer);
        runner.context.record(&answer.line())?;
        self.messages.push(Message::assistant(answer.text));
        Ok(())
    }
}
