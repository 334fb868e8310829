//! The vocabulary of the output, and where the rows of its tables are from.

use super::choice::{TokenizerConfig, TokenizerSource};
use super::rows::Fills;
use super::tokens::{Added, Spelling, Tokens};
use crate::store::{nearest, some};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;

/// A model of the merge.
#[derive(Debug)]
pub(super) struct Member {
    pub path: PathBuf,
    pub tokens: Tokens,
    /// The number of rows of each of its tables.
    pub tables: Vec<usize>,
}

/// Whose tokens the output has.
#[derive(Debug)]
pub(super) enum Whose {
    /// Those of the first model.
    Base,
    /// Those of the first model, and behind them those of the others.
    Union,
    /// Those of a model by its number.
    Model(usize),
    /// Those of a model that is not merged.
    Outside(Box<Tokens>),
}

/// The vocabulary of the output.
#[derive(Debug)]
pub(super) struct Vocabulary {
    /// The number of rows of its tables.
    pub rows: usize,
    /// For each model and each row of the output the model's row, if it has one.
    pub own: Vec<Vec<Option<u32>>>,
    /// What stands for the others.
    pub fills: Fills,
    /// Whether every model's tables are what they were.
    pub is_same: bool,
    /// The tokens that a union adds to those of the first model.
    pub new: Vec<Added>,
    /// What becomes of the first model's ids that are no longer what they were.
    pub moved: BTreeMap<u32, Option<u32>>,
    pub problems: Vec<String>,
    pub notes: Vec<String>,
}

/// The vocabulary of the output, and the files that describe it.
#[derive(Debug)]
pub(super) struct Chosen {
    pub source: TokenizerSource,
    /// The folder whose tokenizer the output has, or extends.
    pub folder: PathBuf,
    pub found: Vocabulary,
    /// The tokens of the first model.
    pub lead: Tokens,
}

/// Finds the output's vocabulary. `members` begins with the base, if `has_base`.
pub(super) fn find(
    wanted: &TokenizerConfig,
    whose: &Whose,
    members: &[Member],
    has_base: bool,
) -> Vocabulary {
    let lead = match whose {
        Whose::Base | Whose::Union => Some(0),
        Whose::Model(i) => Some(*i),
        Whose::Outside(_) => None,
    };
    let out = match whose {
        Whose::Outside(tokens) => tokens,
        _ => &members[lead.unwrap_or(0)].tokens,
    };
    let mut found = Vocabulary {
        rows: out.size(),
        own: Vec::new(),
        fills: Fills::new(),
        is_same: false,
        new: Vec::new(),
        moved: BTreeMap::new(),
        problems: Vec::new(),
        notes: Vec::new(),
    };
    found.note_kinds(out, members);
    if matches!(whose, Whose::Union) {
        found.unite(out, members);
    }
    found.pad(whose, members);
    found.own = members.iter().map(|member| found.places(out, &member.tokens)).collect();
    found.note_lacks(out, members);
    let mut back: HashMap<u32, u32> = HashMap::new();
    for (row, own) in found.own[0].iter().enumerate() {
        own.map(|own| back.entry(own).or_insert(row as u32));
    }
    let ids = members[0].tokens.by_id.keys().map(|id| (*id, back.get(id).copied()));
    found.moved = ids.filter(|(id, to)| *to != Some(*id)).collect();
    let equal = |member: &Member| {
        member.tokens.by_id == out.by_id && member.tables.iter().all(|&rows| rows == found.rows)
    };
    if found.new.is_empty() && wanted.tokens.is_empty() && members.iter().all(equal) {
        found.notes = vec!["all models have the same tokens, so their tables are merged as they are".into()];
        found.is_same = true;
        return found;
    }
    found.fill(out, members, lead, has_base);
    found.prefer(wanted, out, members);
    found
}

/// The number of rows that all tables of all models have.
fn common(members: &[Member]) -> Option<usize> {
    let all: BTreeSet<usize> = members.iter().flat_map(|member| member.tables.iter().copied()).collect();
    all.first().copied().filter(|_| all.len() == 1)
}

impl Vocabulary {
    fn note_kinds(&mut self, out: &Tokens, members: &[Member]) {
        for Member { path, tokens, .. } in members {
            if tokens.kind != out.kind || tokens.spelling != out.spelling {
                self.notes.push(format!(
                    "{} has a tokenizer of another kind ({:?}, {}) than the output ({:?}, {}); tokens are found by their text, and \
                     texts are cut into other tokens than this model was trained on",
                    path.display(),
                    tokens.spelling,
                    tokens.kind,
                    out.spelling,
                    out.kind
                ));
            }
        }
    }

    /// Adds the tokens that only other models than the first have.
    fn unite(&mut self, out: &Tokens, members: &[Member]) {
        let (known, mut seen) = (out.by_text(), HashSet::new());
        let mut regular = 0;
        for Member { path, tokens, .. } in &members[1..] {
            let is_alike = tokens.spelling == out.spelling;
            let (before, mut unwritten) = (self.new.len(), Vec::new());
            for token in tokens.by_id.values() {
                if is_alike && out.id(token).is_some() {
                    continue;
                }
                let text = match tokens.text(token) {
                    Some(text) if !known.contains_key(&text) && out.can_add(&text) => text,
                    // By its text it is one of the first model's.
                    Some(text) if !is_alike && known.contains_key(&text) => continue,
                    _ => {
                        unwritten.push(token.as_str());
                        continue;
                    }
                };
                let id = (out.size() + self.new.len()) as u32;
                if !seen.insert(text.clone()) {
                    continue;
                }
                regular += usize::from(tokens.said(token).is_none());
                let said = tokens.said(token).cloned().unwrap_or_else(|| described(out.spelling));
                self.new.push(Added { text, id, is_regular: false, said });
            }
            let path = path.display();
            let all: Vec<&str> = self.new[before..].iter().map(|new| new.text.as_str()).collect();
            if !all.is_empty() {
                self.notes.push(format!("{} from {path}: {}", counted(all.len(), "added"), some(all)));
            }
            if !unwritten.is_empty() {
                self.notes.push(format!(
                    "{} of {path}, because no added token can have such a text: {}",
                    counted(unwritten.len(), "left out"),
                    some(unwritten)
                ));
            }
        }
        if regular > 0 {
            let blanks = match out.spelling {
                Spelling::Pieces => ", and behind one within a word such tokenizers may put a blank",
                _ => "",
            };
            self.notes.push(format!(
                "regular tokens among the added ones: {regular}; how tokens are made of smaller ones is not united, so they are found \
                 in texts before all others, as added tokens are{blanks}"
            ));
        }
        if let Some(gap) = gap(out).filter(|_| !self.new.is_empty()) {
            self.problems.push(format!("{}: {gap}", members[0].path.display()));
        }
        self.rows = out.size() + self.new.len();
    }

    /// Keeps rows behind the last token, if the tokens are the base's and all tables have them.
    fn pad(&mut self, whose: &Whose, members: &[Member]) {
        if let Some(rows) = common(members).filter(|&rows| matches!(whose, Whose::Base) && rows > self.rows) {
            self.notes.push(format!(
                "the tables have {rows} rows, and the last token has row {}; the rows behind it are kept as {} has them",
                self.rows - 1,
                members[0].path.display()
            ));
            self.rows = rows;
            return;
        }
        let is_padded = |member: &Member| member.tables.iter().any(|&rows| rows > member.tokens.size());
        if members.iter().any(is_padded) {
            self.notes.push(format!(
                "the tables have {} rows, one for each token; rows that are no token's are left out",
                self.rows
            ));
        }
    }

    /// The rows of a model for the tokens of the output.
    fn places(&self, out: &Tokens, tokens: &Tokens) -> Vec<Option<u32>> {
        let mut rows = vec![None; self.rows];
        let is_alike = tokens.spelling == out.spelling;
        let by_text = if is_alike && self.new.is_empty() { HashMap::new() } else { tokens.by_text() };
        for (&id, token) in &out.by_id {
            rows[id as usize] = match is_alike {
                true => tokens.id(token),
                false => out.text(token).and_then(|text| by_text.get(&text).copied()),
            };
        }
        for new in &self.new {
            rows[new.id as usize] = by_text.get(&new.text).copied();
        }
        rows
    }

    fn note_lacks(&mut self, out: &Tokens, members: &[Member]) {
        for (Member { path, tokens, .. }, own) in members.iter().zip(&self.own) {
            let has = |id: u32| own[id as usize].is_some();
            let new = self.new.iter().map(|new| (new.id, &new.text));
            let all = out.by_id.iter().map(|(id, token)| (*id, token)).chain(new);
            let lacks: Vec<&str> = all.filter(|(id, _)| !has(*id)).map(|(_, token)| token.as_str()).collect();
            let used: BTreeSet<u32> = own.iter().copied().flatten().collect();
            let unused = tokens.by_id.iter().filter(|(id, _)| !used.contains(id));
            let unused: Vec<&str> = unused.map(|(_, token)| token.as_str()).collect();
            let path = path.display();
            if !lacks.is_empty() {
                self.notes.push(format!("tokens of the output that {path} lacks: {}", some(lacks)));
            }
            if !unused.is_empty() {
                self.notes.push(format!("tokens of {path} that the output lacks: {}", some(unused)));
            }
        }
    }

    /// Says what stands for the rows that models lack.
    fn fill(&mut self, out: &Tokens, members: &[Member], lead: Option<usize>, has_base: bool) {
        let mut nobody = Vec::new();
        for row in 0..self.rows {
            let all = self.own.iter().enumerate();
            let mut has: Vec<(usize, u32)> = all.filter_map(|(i, own)| Some((i, own[row]?))).collect();
            if has.len() == members.len() {
                continue;
            }
            if has_base && has.first().is_some_and(|(model, _)| *model == 0) {
                has.truncate(1);
            }
            if has.is_empty() {
                // No token has this id: the row is the one that the model has there whose tokens these are.
                let is_there = |lead: &usize| members[*lead].tables.iter().all(|&rows| row < rows);
                let lead = lead.filter(is_there);
                has.extend(lead.map(|lead| (lead, row as u32)));
                nobody.extend(out.by_id.get(&(row as u32)).filter(|_| lead.is_none()).map(String::as_str));
            }
            self.fills.insert(row, has);
        }
        if !nobody.is_empty() {
            self.notes.push(format!("tokens that no model has, whose rows are 0: {}", some(nobody)));
        }
        if !self.fills.is_empty() {
            let whom = if has_base { "the base's vector or, if it has none, " } else { "" };
            self.notes.push(format!(
                "what a model lacks is {whom}the mean of the vectors of the models that have the token"
            ));
        }
    }

    /// Takes the vectors of some tokens from the models that the configuration names.
    fn prefer(&mut self, wanted: &TokenizerConfig, out: &Tokens, members: &[Member]) {
        for (token, row) in &wanted.tokens {
            let wrong = |message: String| format!("tokenizer.tokens: {message}");
            let new = self.new.iter().find(|new| new.text == *token).map(|new| new.id);
            let Some(id) = out.id(token).or(new) else {
                let known = out.by_id.values().chain(self.new.iter().map(|new| &new.text));
                let near = nearest(token, known.map(String::as_str));
                self.problems.push(wrong(format!("the output has no token `{token}`; near: {near}")));
                continue;
            };
            let path = row.model.display();
            let Some(model) = members.iter().position(|member| member.path == row.model) else {
                self.problems.push(wrong(format!("{path}, from which `{token}` is to be, is not merged")));
                continue;
            };
            let Some(source) = self.own[model][id as usize] else {
                self.problems.push(wrong(format!("{path} has no token `{token}`")));
                continue;
            };
            self.fills.insert(id as usize, vec![(model, source)]);
            let whose = if row.force { "all models" } else { "the models that lack it" };
            self.notes.push(format!("the vector of `{token}` is that of {path} for {whose}"));
            if row.force {
                self.own.iter_mut().for_each(|own| own[id as usize] = None);
            }
        }
    }
}

/// How many tokens something was done with.
fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 token is {what}") } else { format!("{count} tokens are {what}") }
}

/// What is said of a regular token that becomes an added one. In pieces, blanks are written in another way once a text is normalized.
fn described(spelling: Spelling) -> Map<String, Value> {
    let flags = ["special", "single_word", "lstrip", "rstrip"].map(|flag| (flag.to_string(), json!(false)));
    let normalized = [("normalized".to_string(), json!(spelling != Spelling::Pieces))];
    flags.into_iter().chain(normalized).collect()
}

/// Why other programs would give an added token another id than the next one, if so. They count the tokens, and pass over the ids of
/// the added ones.
fn gap(tokens: &Tokens) -> Option<String> {
    let mut most = None;
    let next = |most: Option<u32>| most.map_or(0, |most| most + 1).max(tokens.plain as u32);
    for added in &tokens.added {
        if !added.is_regular && added.id != next(most) {
            return Some(format!(
                "its tokens have gaps: `{}` has the id {} where {} would follow, and other programs count on",
                added.text,
                added.id,
                next(most)
            ));
        }
        most = most.max(Some(added.id));
    }
    let size = tokens.size() as u32;
    (next(most) != size).then(|| {
        format!("its {} tokens have gaps in their ids, the last of which is {}", tokens.by_id.len(), size - 1)
    })
}
