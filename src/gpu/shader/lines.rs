//! Converts a kernel to its line in the list of variants, and back.

use super::{Fragment, Name, Source};
use std::fmt::Write;

impl Source {
    /// Sets the lines that the pieces of a generated text have in the list of variants.
    pub(in crate::gpu) fn with_lines(self, pieces: Vec<String>) -> Source {
        Source { pieces, ..self }
    }

    /// Returns its lines in the list of variants, `shaders/variants.txt`: name, constants, fragments of slots and
    /// extensions, such as `softmax LANES=64u LOG=true piece=piece_4 row=row_4`. A generated text has a line for each
    /// of its pieces.
    pub fn lines(&self) -> Vec<String> {
        let generated = |(_, fragment): &(Name, Fragment)| matches!(fragment, Fragment::Text(..));
        if self.text.is_some() || self.slots.iter().any(generated) {
            return self.pieces.clone();
        }
        let mut line = self.name.to_string();
        for (name, value) in &self.constants {
            let _ = write!(line, " {name}={}", value.wgsl);
        }
        for (slot, fragment) in &self.slots {
            if let Fragment::File(name) = fragment {
                let _ = write!(line, " {slot}={name}");
            }
        }
        for (extension, ()) in &self.enables {
            let _ = write!(line, " enable={extension}");
        }
        vec![line]
    }

    /// Marks it as what a caller outside of the crate has changed, so that it runs with bounds checks.
    pub(crate) fn foreign(self) -> Source {
        Source { foreign: true, ..self }
    }

    /// Whether this is a kernel of a line that came from anywhere. It can be translated and not launched.
    pub(in crate::gpu) fn is_listed(&self) -> bool {
        let own = |(_, fragment): &(Name, Fragment)| matches!(fragment, Fragment::File(_));
        self.foreign && self.text.is_none() && self.slots.iter().all(own)
    }

    /// The name of a text from outside that would use cooperative matrices, whose strides nobody checks.
    pub(in crate::gpu) fn foreign_matrices(&self) -> Option<&str> {
        let uses = |text: &str| text.contains("coop");
        if let Some(text) = self.text.as_ref().filter(|_| self.foreign) {
            let slot =
                |(_, fragment): &(Name, Fragment)| matches!(fragment, Fragment::File(name) if uses(name));
            let chosen = self.enables.iter().any(|(name, ())| uses(name)) || self.slots.iter().any(slot);
            if chosen || uses(text) || self.constants.iter().any(|(_, value)| uses(&value.wgsl)) {
                return Some(&self.name);
            }
        }
        self.slots.iter().find_map(|(_, fragment)| match fragment {
            Fragment::Text(name, text) if uses(text) => Some(&**name),
            _ => None,
        })
    }

    /// Returns the kernel of a line of that list. `None` if the line has another form.
    pub fn from_line(line: &str) -> Option<Source> {
        let mut words = line.split_whitespace();
        // The line may come from anywhere, so the kernel is no less checked than a text.
        let mut source = Source { foreign: true, ..Source::file(words.next()?.to_string()) };
        for word in words {
            let (name, value) = word.split_once('=')?;
            let (name, value) = (name.to_string(), value.to_string());
            let number =
                value.starts_with(|c: char| c == '-' || c.is_ascii_digit()) || value.starts_with("i32(");
            source = match value.chars().next_back()? {
                _ if name == "enable" => source.enable(value),
                'u' if number => source.set(name, "u32", value),
                'i' | ')' if number => source.set(name, "i32", value),
                'f' if number => source.set(name, "f32", value),
                _ if value == "true" || value == "false" => source.set(name, "bool", value),
                // Names of slots are in lower case, names of aliases begin with a capital.
                _ if name.starts_with(|c: char| c.is_ascii_uppercase()) => source.set(name, "alias", value),
                _ => source.slot(name, value),
            };
        }
        Some(source)
    }
}
