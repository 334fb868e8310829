//! Which tensors of the models have a row for each token, and how they are read by token.

use super::choice::TokenizerSource;
use super::heads::{HEADS, is_table};
use super::job::{Job, Model, Stage};
use super::rows::{ByToken, Fills};
use super::tokens::Tokens;
use super::vocabulary::{Chosen, Member, Whose, find};
use crate::error::Result;
use crate::merge::Weights;
use crate::store::{located, missing};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The folder of a model's files.
pub(super) fn folder_of(place: &Path) -> PathBuf {
    let parent = place.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if place.is_dir() { place.to_path_buf() } else { parent.to_path_buf() }
}

impl Model {
    /// The folder of its files.
    pub(super) fn folder(&self) -> PathBuf {
        folder_of(&self.place())
    }

    /// The names of its tables and heads, with their shapes.
    pub(super) fn tables(&self) -> Vec<(String, Vec<usize>)> {
        let names = self.checkpoint.names().into_iter().filter(|name| is_table(name));
        names.filter_map(|name| Some((name.clone(), self.checkpoint.shape(&name).ok()?))).collect()
    }
}

impl Job {
    /// Finds the tokens of the output, and lets the models be read by them.
    pub(super) fn find_vocabulary(&mut self) -> Result<()> {
        let Some(wanted) = self.config.tokenizer.clone() else { return Ok(()) };
        let mut members = Vec::new();
        for model in &self.models {
            let tokens = Tokens::read(&model.folder())?;
            let tables =
                model.tables().iter().map(|(_, shape)| shape.first().copied().unwrap_or(0)).collect();
            members.push(Member { path: model.path.clone(), tokens, tables });
        }
        let (whose, folder) = match &wanted.source {
            TokenizerSource::Base => (Whose::Base, self.leader().folder()),
            TokenizerSource::Union => (Whose::Union, self.leader().folder()),
            TokenizerSource::Model(path) => {
                let place = located(path);
                if !place.exists() {
                    return Err(missing(&place));
                }
                let folder = folder_of(&place);
                match members.iter().position(|member| member.path == *path) {
                    Some(i) => (Whose::Model(i), folder),
                    None => (Whose::Outside(Box::new(Tokens::read(&folder)?)), folder),
                }
            }
        };
        let problems: Vec<String> = self
            .models
            .iter()
            .zip(&members)
            .flat_map(|(model, member)| misfits(model, &member.tokens))
            .collect();
        if !problems.is_empty() {
            self.problems.extend(problems);
            return Ok(());
        }
        let mut found = find(&wanted, &whose, &members, self.config.base.is_some());
        self.notes.push(format!(
            "the output has the tokens of {}",
            match &wanted.source {
                TokenizerSource::Model(path) => path.display().to_string(),
                TokenizerSource::Base => self.leader().path.display().to_string(),
                TokenizerSource::Union => {
                    format!(
                        "{}, and behind them those that only other models have",
                        self.leader().path.display()
                    )
                }
            }
        ));
        self.notes.append(&mut found.notes);
        self.problems.append(&mut found.problems);
        if !found.is_same {
            if self.config.evaluate.is_some() {
                self.problems.push(
                    "evaluate: models with other tokens than the output are not scored; score the output by `tiebeam evaluate`".into(),
                );
            }
            let own = std::mem::take(&mut found.own).into_iter().map(Arc::new).collect();
            self.read_by_token(found.rows, own, Arc::new(std::mem::take(&mut found.fills)));
        }
        let lead = members.swap_remove(0).tokens;
        self.vocabulary = Some(Chosen { source: wanted.source, folder, found, lead });
        Ok(())
    }

    /// Lets every table and head of the models be read with the rows of the output.
    fn read_by_token(&mut self, rows: usize, own: Vec<Arc<Vec<Option<u32>>>>, fills: Arc<Fills>) {
        let used: BTreeSet<usize> = fills.values().flatten().map(|(model, _)| *model).collect();
        let (mut all, mut problems) = (Vec::new(), BTreeSet::new());
        for (i, model) in self.models.iter().enumerate() {
            let mut names: BTreeSet<String> = model.tables().into_iter().map(|(name, _)| name).collect();
            // The head of a tied model is read under its own name, because other models' heads stand in there.
            let tied = HEADS.iter().filter(|(head, _)| self.table_for(i, head).is_some());
            names.extend(tied.map(|(head, _)| head.to_string()));
            for name in names {
                let tensor = self.table_for(i, &name).map_or(name.clone(), String::from);
                let Ok(mut shape) = model.checkpoint.shape(&tensor) else { continue };
                if model.is_adapted(&tensor) {
                    problems.insert(format!(
                        "{}: the adapter changes `{tensor}`, which is read by token; merge it into its model first",
                        model.path.display()
                    ));
                }
                let donor = |j: usize| {
                    let donor = &self.models[j].checkpoint;
                    let tensor = self.table_for(j, &name).map_or(name.clone(), String::from);
                    donor.contains(&tensor).then(|| (donor.clone(), tensor))
                };
                let donors: Vec<_> = (0..self.models.len()).map(donor).collect();
                for &j in &used {
                    let place = self.models[j].path.display();
                    let theirs = donors[j].as_ref().and_then(|(donor, tensor)| donor.shape(tensor).ok());
                    match theirs {
                        Some(theirs) if theirs[1..] == shape[1..] => {}
                        Some(theirs) => drop(problems.insert(format!(
                            "`{name}` is {theirs:?} in {place} and {shape:?} in {}",
                            model.path.display()
                        ))),
                        None => drop(problems.insert(format!(
                            "{place} has no tensor `{name}`, whose rows are to stand in where others lack a token"
                        ))),
                    }
                }
                shape[0] = rows;
                let (rows, fills) = (own[i].clone(), fills.clone());
                all.push((i, name, ByToken { name: tensor, shape, rows, fills, donors }));
            }
        }
        for (i, name, table) in all {
            self.models[i].by_token.insert(name, table);
        }
        self.problems.extend(problems);
        self.note_unknown_tables();
    }

    /// Names tensors that may be tables under names that are not known.
    fn note_unknown_tables(&mut self) {
        let lead = self.leader();
        let sizes: BTreeSet<usize> = lead.tables().into_iter().map(|(_, shape)| shape[0]).collect();
        let is_like = |name: &String| {
            let info = lead.checkpoint.info(name);
            let outside = !matches!(Stage::of(name), Stage::Layer(_)) && !is_table(name);
            outside
                && info.is_ok_and(|info| {
                    info.dtype.is_float() && sizes.contains(info.shape.first().unwrap_or(&0))
                })
        };
        let names: Vec<String> = lead.checkpoint.names().into_iter().filter(is_like).collect();
        for name in names {
            let note = "{} have as many rows as there were tokens, and are not read by token".to_string();
            self.gather(note, &name);
        }
    }
}

/// What prevents a model from being read by token.
fn misfits(model: &Model, tokens: &Tokens) -> Vec<String> {
    let (path, tables) = (model.path.display(), model.tables());
    if tables.is_empty() {
        return vec![format!(
            "{path} has no table of token vectors by a name that is known, such as `model.embed_tokens.weight`"
        )];
    }
    let mut problems = Vec::new();
    for (name, shape) in tables {
        if shape.is_empty() || shape.contains(&0) {
            problems.push(format!("`{name}` is {shape:?} in {path}, which has no rows"));
            continue;
        }
        if let Some((id, token)) = tokens.by_id.last_key_value().filter(|(id, _)| **id as usize >= shape[0]) {
            problems.push(format!(
                "{path}: its tokenizer.json gives `{token}` the id {id}, and `{name}` has {} rows",
                shape[0]
            ));
        }
    }
    problems
}
