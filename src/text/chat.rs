//! Conversations, and the templates that write them as the text that a model was trained on.

use super::functions;
use crate::error::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant` in most templates.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    /// What the model is told before the conversation.
    pub fn system(content: impl Into<String>) -> Message {
        Message::new("system", content)
    }

    /// What the user says.
    pub fn user(content: impl Into<String>) -> Message {
        Message::new("user", content)
    }

    /// What the model answers.
    pub fn assistant(content: impl Into<String>) -> Message {
        Message::new("assistant", content)
    }
}

/// Writes a conversation as text, by the Jinja template that came with the model.
///
/// Templates see what transformers offers them: `messages`, `add_generation_prompt`, `tools` and `documents` (none), the texts of
/// control tokens such as `bos_token`, the functions `raise_exception` and `strftime_now` (in UTC), the filter `tojson` with
/// Python's spacing, and Python's methods of strings, lists and dictionaries.
pub struct ChatTemplate {
    environment: Environment<'static>,
    marks: BTreeMap<String, String>,
    source: String,
}

/// The template's name in messages.
const NAME: &str = "chat template";
/// Most steps of a template, so that one that does not end is an error within a second.
const STEPS: u64 = 10_000_000;

impl ChatTemplate {
    /// Parses a template. `marks` are texts of control tokens by name, such as `bos_token`.
    pub(super) fn new(source: &str, marks: BTreeMap<String, String>) -> Result<ChatTemplate, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| sentence(&error))?);
        environment.set_fuel(Some(STEPS));
        functions::add(&mut environment);
        environment
            .add_template_owned(NAME, without_generation(source))
            .map_err(|error| format!("its chat template does not parse: {}", sentence(&error)))?;
        Ok(ChatTemplate { environment, marks, source: source.into() })
    }

    /// The template itself.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// Texts of control tokens by name.
    pub(super) fn marks(&self) -> &BTreeMap<String, String> {
        &self.marks
    }

    /// Returns the conversation as text. With `add_generation_prompt` the text ends where the model is to answer.
    ///
    /// # Errors
    /// [`Error::Config`] when the template refuses the messages, such as two of the user in a row, or cannot be run.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut all: BTreeMap<String, Value> =
            self.marks.iter().map(|(name, text)| (name.clone(), Value::from(&text[..]))).collect();
        all.insert("messages".into(), Value::from(Serde(messages)));
        all.insert("add_generation_prompt".into(), Value::from(add_generation_prompt));
        all.extend(["tools", "documents"].map(|name| (name.into(), Value::from(()))));
        let template = self.environment.get_template(NAME);
        let text = template.and_then(|template| template.render(Value::from(all)));
        text.map_err(|error| Error::config(refusal(&error)))
    }
}

fn refusal(error: &minijinja::Error) -> String {
    match functions::raised(error) {
        Some(message) => format!("the model's chat template refuses these messages: {message}"),
        None => format!("the model's chat template cannot be run: {}", sentence(error)),
    }
}

/// The error with its line, and what caused it.
fn sentence(error: &minijinja::Error) -> String {
    let what = match error.detail() {
        Some(detail) if error.kind() == ErrorKind::SyntaxError => detail.to_string(),
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    error.line().map_or(what.clone(), |line| format!("{what} in line {line}"))
}

/// Takes out the tags `generation` and `endgeneration`, which mark the answers for a training and write nothing.
fn without_generation(source: &str) -> String {
    let (mut out, mut rest, mut raw) = (String::with_capacity(source.len()), source, false);
    while let Some((before, tag, after)) = first_tag(rest) {
        out.push_str(before);
        let name = tag.trim_matches(['-', '+']).trim();
        out.push_str(&match name {
            "generation" if !raw => tag.replace(name, "if true"),
            "endgeneration" if !raw => tag.replace(name, "endif"),
            _ => tag.to_string(),
        });
        raw = name == "raw" || raw && name != "endraw";
        rest = after;
    }
    out + rest
}

/// Cuts a template at its first tag, which begins behind `{%` and ends before `%}`.
fn first_tag(source: &str) -> Option<(&str, &str, &str)> {
    let begin = source.find("{%")? + 2;
    let end = begin + source[begin..].find("%}")?;
    Some((&source[..begin], &source[begin..end], &source[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> Result<ChatTemplate, String> {
        ChatTemplate::new(source, BTreeMap::from([("bos_token".into(), "<s>".into())]))
    }

    fn rendered(source: &str) -> Result<String, String> {
        let messages = [Message::user(" hi "), Message::assistant("ho")];
        template(source)?.render(&messages, true).map_err(|error| error.to_string())
    }

    #[test]
    fn templates_have_what_transformers_offers() {
        let says = |source: &str, text: &str| assert_eq!(rendered(source).as_deref(), Ok(text), "{source}");
        says("{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ tools is defined }}", "<s>TrueTrue");
        says(
            "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m['content'].strip() }}\n  {% endif %}\n{% endfor %}",
            "hi\n",
        );
        says(
            "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content | trim }}{% endfor %}",
            "hi",
        );
        says("{{ {'b': [1, none], 'a': '<é>'} | tojson }}", r#"{"b": [1, null], "a": "<é>"}"#);
        says("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}");
        says("{%- set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}", "2");
        says(
            "{{ messages[0].get('name', 'none') }}{{ messages[1:] | length }}{{ 'a,b'.split(',')[-1] }}",
            "none1b",
        );
        says("a{%- generation -%} b {%- endgeneration %}", "ab");
        says(
            "{{ tools is iterable }}{{ 'a' is iterable }}{{ 'a' is sequence }}{{ 1 is sequence }}",
            "FalseTrueTrueFalse",
        );
        says("{{ 'a,b,c'.rsplit(',', 1)[0] }}{{ 'ab'.removeprefix('a').removesuffix('x') }}", "a,bb");
        says("{% raw %}{% generation %}{% endraw %}", "{% generation %}");
        says("{{ strftime_now('%%') }}{{ messages[0].tool_calls is defined }}", "%False");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let says = |source: &str, what: &str| {
            let error = rendered(source).expect_err(source);
            assert!(error.contains(what), "{error}");
        };
        says("{% if %}", "does not parse");
        says("{% for m in messages %}", "does not parse");
        says(
            "{{ raise_exception('Roles must alternate.') }}",
            "refuses these messages: Roles must alternate.",
        );
        says("{{ nothing.at.all }}", "cannot be run");
        says("{{ messages[0].content.unheard_of() }}", "cannot be run");
        says("{{ messages | tojson(sort_keys=true) }}", "cannot be run");
        says(
            "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "cannot be run",
        );
        says("{{ strftime_now('%Q') }}", "%Q");
    }
}
