//! Describes, as data, what may be permuted in a model without changing what it computes.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One axis of a tensor that follows a group's permutation. In a file: `["fc1.weight", 1]`, or `["fc1.weight", 1, 16]` with
/// `repeat`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "AxisFile", into = "AxisFile")]
pub struct Axis {
    /// The tensor's name.
    pub tensor: String,
    /// Which axis, from 0.
    pub axis: usize,
    /// Consecutive indices that move as one. A dense layer behind a flattened `[channels, height, width]` has `height * width`.
    pub repeat: usize,
}

impl Axis {
    /// An axis whose indices move one by one.
    pub fn new(tensor: impl Into<String>, axis: usize) -> Axis {
        Axis { tensor: tensor.into(), axis, repeat: 1 }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "an axis is [tensor, axis] or [tensor, axis, repeat]")]
enum AxisFile {
    One(String, usize),
    Block(String, usize, usize),
}

impl From<AxisFile> for Axis {
    fn from(file: AxisFile) -> Axis {
        match file {
            AxisFile::One(tensor, axis) => Axis { tensor, axis, repeat: 1 },
            AxisFile::Block(tensor, axis, repeat) => Axis { tensor, axis, repeat },
        }
    }
}

impl From<Axis> for AxisFile {
    fn from(Axis { tensor, axis, repeat }: Axis) -> AxisFile {
        if repeat == 1 { AxisFile::One(tensor, axis) } else { AxisFile::Block(tensor, axis, repeat) }
    }
}

/// Attention heads, which are permuted on two levels: the heads, and the elements inside each head.
///
/// A key and value head moves together with the set of query heads that read it. The query heads of a set may also change places.
/// Elements of queries and keys have one order in all heads of a set, and so have elements of values and of the output's columns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads. Their number divides `heads`.
    pub kv_heads: usize,
    /// Whether elements of queries and keys must keep their places inside a head. They must with rotary embedding, which gives each
    /// its own frequency, and with per-head norms, which give each its own gain.
    #[serde(default)]
    pub rotary: bool,
    /// Rows that make queries, `heads * head_dim` long.
    pub q: Vec<Axis>,
    /// Rows that make keys, `kv_heads * head_dim` long.
    pub k: Vec<Axis>,
    /// Rows that make values, `kv_heads * head_dim` long.
    pub v: Vec<Axis>,
    /// Columns that read the heads' results, `heads * head_dim` long.
    pub o: Vec<Axis>,
}

impl Heads {
    /// The four lists with their names, in the order `q k v o`.
    pub fn parts(&self) -> [(&'static str, &[Axis]); 4] {
        [("q", &self.q), ("k", &self.k), ("v", &self.v), ("o", &self.o)]
    }
}

/// Axes that move together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "GroupFile", into = "GroupFile")]
pub struct Group {
    /// Its name, under which its permutation is stored. Heads have four: `name.q`, `name.k`, `name.v` and `name.o`.
    pub name: String,
    /// The axes that move.
    pub kind: GroupKind,
}

/// The axes of a [`Group`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupKind {
    /// One permutation of units: neurons, channels, or elements of a residual stream.
    Units(Vec<Axis>),
    /// Attention heads.
    Heads(Heads),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupFile {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    axes: Option<Vec<Axis>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    heads: Option<Heads>,
}

impl TryFrom<GroupFile> for Group {
    type Error = String;

    fn try_from(GroupFile { name, axes, heads }: GroupFile) -> Result<Group, String> {
        match (axes, heads) {
            (Some(axes), None) => Ok(Group { name, kind: GroupKind::Units(axes) }),
            (None, Some(heads)) => Ok(Group { name, kind: GroupKind::Heads(heads) }),
            _ => Err(format!("group `{name}` needs either `axes` or `heads`")),
        }
    }
}

impl From<Group> for GroupFile {
    fn from(Group { name, kind }: Group) -> GroupFile {
        match kind {
            GroupKind::Units(axes) => GroupFile { name, axes: Some(axes), heads: None },
            GroupKind::Heads(heads) => GroupFile { name, axes: None, heads: Some(heads) },
        }
    }
}

/// Which axes of which tensors may be permuted, and which move together.
///
/// Every tensor of a model must be in a group or named by `fixed` or `ignored`, since a permuted model with a forgotten tensor
/// would compute something else. As a file:
///
/// ```json
/// {"groups": [
///    {"name": "P0", "axes": [["fc0.weight", 0], ["fc0.bias", 0], ["fc1.weight", 1]]},
///    {"name": "attn", "heads": {"heads": 8, "kv_heads": 2, "rotary": true, "q": [["q.weight", 0]],
///     "k": [["k.weight", 0]], "v": [["v.weight", 0]], "o": [["o.weight", 1]]}}],
///  "statistics": ["*.running_mean", "*.running_var"],
///  "fixed": ["fc1.bias"],
///  "ignored": ["*.num_batches_tracked"]}
/// ```
///
/// In the three lists, `*` matches any characters, or none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The groups. Matching can visit them in this order or in random ones.
    pub groups: Vec<Group>,
    /// Tensors that are permuted with their group but not compared, such as running statistics.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub statistics: Vec<String>,
    /// Tensors that are compared but not permuted, such as the output layer's bias.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fixed: Vec<String>,
    /// Tensors that are neither permuted nor compared, such as counters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored: Vec<String>,
}

impl Spec {
    /// Reads a spec from JSON.
    ///
    /// # Errors
    /// When the text is not JSON, or has unknown or missing fields. The message names line and column.
    pub fn from_json(text: &str) -> Result<Spec> {
        serde_json::from_str(text).map_err(|e| Error::config(format!("no valid permutation spec: {e}")))
    }

    /// Returns the spec as JSON, one line per group.
    pub fn to_json(&self) -> String {
        let groups: Vec<String> = self.groups.iter().map(|group| format!("  {}", line(group))).collect();
        let mut text = format!("{{\"groups\": [\n{}\n ]", groups.join(",\n"));
        let lists = [("statistics", &self.statistics), ("fixed", &self.fixed), ("ignored", &self.ignored)];
        for (name, list) in lists.iter().filter(|(_, list)| !list.is_empty()) {
            text += &format!(",\n \"{name}\": {}", line(list));
        }
        text + "}\n"
    }

    /// Reads a spec from a file.
    ///
    /// # Errors
    /// As [`Spec::from_json`], and when the file cannot be read.
    pub fn read(path: impl AsRef<Path>) -> Result<Spec> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Spec::from_json(&text).map_err(|e| Error::format(path, e.to_string()).because_of(e))
    }
}

fn line(value: impl Serialize) -> String {
    serde_json::to_string(&value).expect("names and numbers always become JSON")
}

/// Whether a name fits a pattern in which `*` matches any characters.
pub(in crate::merge) fn fits(pattern: &str, name: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(head) else { return false };
    let mut ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
    ends.any(|at| fits(tail, &rest[at..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name) in
            [("a", "a"), ("*", ""), ("*.mean", "x.y.mean"), ("a*b*c", "a--bb-c"), ("*é", "oé")]
        {
            assert!(fits(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("a", "ab"), ("*.mean", "mean"), ("a*b*c", "acb"), ("", "a")] {
            assert!(!fits(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn json_and_back() {
        let text = r#"{"groups": [
            {"name": "P0", "axes": [["a", 0], ["b", 1, 4]]},
            {"name": "h", "heads": {"heads": 4, "kv_heads": 2, "rotary": true,
             "q": [["q", 0]], "k": [["k", 0]], "v": [["v", 0]], "o": [["o", 1]]}}], "fixed": ["c*"]}"#;
        let spec = Spec::from_json(text).unwrap();
        assert_eq!(
            spec.groups[0].kind,
            GroupKind::Units(vec![Axis::new("a", 0), Axis { repeat: 4, ..Axis::new("b", 1) }])
        );
        assert_eq!(Spec::from_json(&spec.to_json()).unwrap(), spec);
        for (bad, words) in [
            ("{", "line 1"),
            (r#"{"groups": [{"name": "P", "axes": [["a"]]}]}"#, "[tensor, axis] or [tensor, axis, repeat]"),
            (r#"{"groups": [{"name": "P", "axes": [["a", -1]]}]}"#, "[tensor, axis]"),
            (r#"{"groups": [{"name": "P"}]}"#, "group `P` needs either"),
            (r#"{"groups": [{"name": "P", "axes": [], "axis": 1}]}"#, "unknown field `axis`"),
            (r#"{"groups": [], "fix": []}"#, "unknown field `fix`"),
            ("{}", "missing field `groups`"),
        ] {
            let message = Spec::from_json(bad).expect_err(bad).to_string();
            assert!(message.contains(words), "{bad}: {message}");
        }
    }
}
