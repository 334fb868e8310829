//! Which tensors are rounded, and to how many bits.

use crate::error::{Error, Result};
use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

/// What a tensor is in a language model, by its name in folders of Hugging Face and in GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Part {
    /// A linear layer of a block, with its name in plans: `q`, `k`, `v`, `o`, `gate`, `up`, `down`, and `qkv` and `gate_up` where
    /// several are one.
    Linear(&'static str),
    /// The output head.
    Head,
    /// The table of token vectors.
    Embed,
    /// All else: norms, biases, and what is not known.
    Other,
}

/// The linear layers of a block: their names in plans, in folders and in GGUF files. The others than the first five are in the
/// MLP.
const LINEARS: [(&str, &str, &str); 9] = [
    ("q", "q_proj", "attn_q"),
    ("k", "k_proj", "attn_k"),
    ("v", "v_proj", "attn_v"),
    ("qkv", "qkv_proj", "attn_qkv"),
    ("o", "o_proj", "attn_output"),
    ("gate", "gate_proj", "ffn_gate"),
    ("up", "up_proj", "ffn_up"),
    ("gate_up", "gate_up_proj", "ffn_gate_up"),
    ("down", "down_proj", "ffn_down"),
];
const ATTENTION: [&str; 5] = ["q", "k", "v", "qkv", "o"];

impl Part {
    /// The part that a tensor of this name is.
    pub fn of(name: &str) -> Part {
        let Some(path) = name.strip_suffix(".weight") else { return Part::Other };
        let last = path.rsplit('.').next().unwrap_or(path);
        if let Some((linear, ..)) = LINEARS.iter().find(|(_, a, b)| *a == last || *b == last) {
            return Part::Linear(linear);
        }
        match last {
            "embed_tokens" | "token_embd" => Part::Embed,
            "lm_head" => Part::Head,
            "output" if path == last => Part::Head,
            _ => Part::Other,
        }
    }
}

impl PartialOrd for Part {
    fn partial_cmp(&self, other: &Part) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Part {
    /// Linear layers in the order of their use, then head, table and others.
    fn cmp(&self, other: &Part) -> Ordering {
        let rank = |part: &Part| match part {
            Part::Linear(name) => LINEARS.iter().position(|(linear, ..)| linear == name).unwrap_or(0),
            Part::Head => LINEARS.len(),
            Part::Embed => LINEARS.len() + 1,
            Part::Other => LINEARS.len() + 2,
        };
        rank(self).cmp(&rank(other))
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Part::Linear(name) => name,
            Part::Head => "head",
            Part::Embed => "embed",
            Part::Other => "other",
        })
    }
}

/// Columns that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    Columns(usize),
    Row,
}

/// What becomes of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    Keep,
    /// Bits, and the group if it is not the usual one.
    Round(u32, Option<Group>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Attention,
    Mlp,
    Part(Part),
    /// A tensor's name with `*` for anything.
    Glob(String),
}

/// Exceptions from how the tensors of a model are rounded: `NAME=BITS`, `NAME=BITS:GROUP`, `NAME=BITS:row` or `NAME=keep`, with
/// commas between. NAME is `attn`, `mlp`, `head`, `embed`, one linear layer (`q`, `k`, `v`, `o`, `gate`, `up`, `down`), or the name of
/// a tensor with `*` for anything. Later ones win.
///
/// ```
/// use tiebeam::quant::Plan;
///
/// let plan: Plan = "mlp=4:64, attn=8, model.layers.0.*=keep".parse()?;
/// assert_ne!(plan, Plan::default());
/// assert!("mlp=four".parse::<Plan>().is_err());
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    entries: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    text: String,
    target: Target,
    choice: Choice,
}

impl FromStr for Plan {
    type Err = Error;

    fn from_str(text: &str) -> Result<Plan> {
        let entries = text.split(',').map(|entry| Entry::parse(entry.trim())).collect::<Result<_>>()?;
        Ok(Plan { entries })
    }
}

impl Entry {
    fn parse(text: &str) -> Result<Entry> {
        let wrong = |message: &str| Error::config(format!("plan: '{text}': {message}"));
        let (name, value) = text.split_once('=').ok_or_else(|| {
            wrong("it has no =; an entry is NAME=BITS, NAME=BITS:GROUP, NAME=BITS:row or NAME=keep")
        })?;
        let (name, value) = (name.trim(), value.trim());
        let target = Target::parse(name).ok_or_else(|| {
            wrong(
                "its name is none of attn, mlp, head, embed, q, k, v, o, gate, up and down, and no name of a tensor with * in it",
            )
        })?;
        if value == "keep" {
            return Ok(Entry { text: text.into(), target, choice: Choice::Keep });
        }
        let (bits, group) = value.split_once(':').map_or((value, None), |(bits, group)| (bits, Some(group)));
        let bits = bits.trim().parse().map_err(|_| wrong("its bits are none of 4, 5, 8 and `keep`"))?;
        let group = match group.map(str::trim) {
            None => None,
            Some("row") => Some(Group::Row),
            Some(group) => Some(Group::Columns(
                group
                    .parse()
                    .ok()
                    .filter(|&columns| columns > 0)
                    .ok_or_else(|| wrong("its group is neither a number of columns nor `row`"))?,
            )),
        };
        Ok(Entry { text: text.into(), target, choice: Choice::Round(bits, group) })
    }
}

impl Target {
    fn parse(name: &str) -> Option<Target> {
        Some(match name {
            "attn" => Target::Attention,
            "mlp" => Target::Mlp,
            "head" => Target::Part(Part::Head),
            "embed" => Target::Part(Part::Embed),
            _ if name.contains(['*', '.']) => Target::Glob(name.into()),
            _ => Target::Part(Part::Linear(LINEARS.iter().find(|(linear, ..)| *linear == name)?.0)),
        })
    }

    fn matches(&self, name: &str, part: Part) -> bool {
        match (self, part) {
            (Target::Attention, Part::Linear(linear)) => ATTENTION.contains(&linear),
            (Target::Mlp, Part::Linear(linear)) => !ATTENTION.contains(&linear),
            (Target::Attention | Target::Mlp, _) => false,
            (Target::Part(wanted), _) => *wanted == part,
            (Target::Glob(glob), _) => is_like(glob, name),
        }
    }
}

/// Whether a name is a pattern in which `*` stands for anything.
fn is_like(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut last = None;
    // Each part but the last is taken where it comes first, which leaves most for the others.
    for part in parts {
        if let Some(part) = last.replace(part) {
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
    }
    last.map_or(rest.is_empty(), |last| rest.ends_with(last))
}

impl Plan {
    /// The choice of the last entry that names a tensor.
    pub(super) fn choice(&self, name: &str, part: Part) -> Option<Choice> {
        let of = |entry: &&Entry| entry.target.matches(name, part);
        self.entries.iter().rev().find(of).map(|entry| entry.choice)
    }

    /// Refuses entries that name none of the tensors.
    pub(super) fn check(&self, tensors: &[(&str, Part)]) -> Result<()> {
        let idle =
            self.entries.iter().find(|entry| !tensors.iter().any(|(n, p)| entry.target.matches(n, *p)));
        let Some(entry) = idle else { return Ok(()) };
        let mut parts: Vec<Part> = tensors.iter().map(|(_, part)| *part).collect();
        parts.sort_unstable();
        parts.dedup();
        let parts: Vec<_> = parts.into_iter().filter(|p| *p != Part::Other).map(|p| p.to_string()).collect();
        let names: Vec<_> = tensors.iter().take(3).map(|(name, _)| format!("`{name}`")).collect();
        Err(Error::config(format!(
            "plan: '{}' names no tensor that could be rounded; there are {} (of {} tensors, such as {})",
            entry.text,
            parts.join(", "),
            tensors.len(),
            names.join(", ")
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> Plan {
        text.parse().expect(text)
    }

    #[test]
    fn names_are_parts() {
        for (name, part) in [
            ("model.layers.3.self_attn.q_proj.weight", Part::Linear("q")),
            ("blk.3.attn_output.weight", Part::Linear("o")),
            ("blk.3.ffn_gate.weight", Part::Linear("gate")),
            ("model.layers.0.mlp.gate_up_proj.weight", Part::Linear("gate_up")),
            ("lm_head.weight", Part::Head),
            ("output.weight", Part::Head),
            ("encoder.output.weight", Part::Other),
            ("token_embd.weight", Part::Embed),
            ("model.embed_tokens.weight", Part::Embed),
            ("model.norm.weight", Part::Other),
            ("model.layers.0.self_attn.q_proj.bias", Part::Other),
        ] {
            assert_eq!(Part::of(name), part, "{name}");
        }
    }

    #[test]
    fn later_entries_win() {
        let plan = plan("mlp=4:64, attn=8 , *.layers.1.*=keep,down=8:row");
        let choice = |name: &str| plan.choice(name, Part::of(name));
        assert_eq!(
            choice("model.layers.0.mlp.up_proj.weight"),
            Some(Choice::Round(4, Some(Group::Columns(64))))
        );
        assert_eq!(choice("model.layers.0.self_attn.v_proj.weight"), Some(Choice::Round(8, None)));
        assert_eq!(choice("model.layers.1.self_attn.v_proj.weight"), Some(Choice::Keep));
        assert_eq!(choice("model.layers.1.mlp.down_proj.weight"), Some(Choice::Round(8, Some(Group::Row))));
        assert_eq!(choice("lm_head.weight"), None);
    }

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, name, is) in [
            ("*", "", true),
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a*b*c", "aXbYbZc", true),
            ("a*b*c", "ac", false),
            ("*b*", "abc", true),
            ("*.1.*", "x.11.y", false),
            ("ab*ba", "aba", false),
        ] {
            assert_eq!(is_like(pattern, name), is, "{pattern} {name}");
        }
    }

    #[test]
    fn wrong_entries_are_named() {
        for (text, what) in [
            ("", "'': it has no ="),
            ("mlp", "'mlp': it has no ="),
            ("mpl=4", "'mpl=4': its name is none of attn"),
            ("mlp=four", "'mlp=four': its bits are none of 4, 5, 8 and `keep`"),
            ("mlp=4294967296", "'mlp=4294967296': its bits are none"),
            ("mlp=4:", "'mlp=4:': its group"),
            ("mlp=4:0", "'mlp=4:0': its group"),
            ("attn=8,mlp=4:col", "'mlp=4:col': its group"),
        ] {
            let error = text.parse::<Plan>().unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        let tensors = [("blk.0.attn_q.weight", Part::Linear("q")), ("token_embd.weight", Part::Embed)];
        let error = plan("q=4,head=8").check(&tensors).unwrap_err().to_string();
        assert!(
            error.contains("'head=8' names no tensor") && error.contains("there are q, embed"),
            "{error}"
        );
    }
}
