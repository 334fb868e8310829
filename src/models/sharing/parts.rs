//! Different recipes for different matrices.

use super::recipe::{Matrix, Recipe, Sharing, Sites, Stack};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ops::product::site::Site;
use crate::rng::Rng;
use std::sync::Arc;

/// Recipes for named matrices, and one for the rest: `q k v: dictionary 2 output true; up down: tied; none`.
pub struct Parts {
    pub named: Vec<(Vec<String>, Sharing)>,
    pub rest: Sharing,
}

impl Recipe for Parts {
    fn text(&self) -> String {
        let part =
            |(names, sharing): &(Vec<String>, Sharing)| format!("{}: {}; ", names.join(" "), sharing.text());
        self.named.iter().map(part).collect::<String>() + &self.rest.text()
    }

    fn sites(&self, gpu: &Gpu, stack: &Stack, rng: &mut Rng) -> Result<Sites> {
        let known = |name: &String| stack.matrices.iter().any(|matrix| matrix.name == name);
        let mut taken: Vec<&String> = Vec::new();
        for name in self.named.iter().flat_map(|(names, _)| names) {
            if !known(name) || taken.contains(&name) {
                let all = stack.matrices.iter().map(|matrix| matrix.name).collect::<Vec<_>>().join(", ");
                let what = if known(name) { "is named twice" } else { "is no matrix of a block" };
                return Err(Error::config(format!("`{name}` {what}; there are {all}")));
            }
            taken.push(name);
        }
        let mut by_depth: Vec<Vec<Option<Arc<dyn Site>>>> =
            vec![vec![None; stack.matrices.len()]; stack.depth];
        let mut all = Sites::default();
        let rest = (None, &self.rest);
        for (names, sharing) in self.named.iter().map(|(names, sharing)| (Some(names), sharing)).chain([rest])
        {
            let is_mine = |matrix: &Matrix| {
                let name = matrix.name.to_string();
                names.map_or(!taken.contains(&&name), |names| names.contains(&name))
            };
            let places: Vec<usize> =
                (0..stack.matrices.len()).filter(|&i| is_mine(&stack.matrices[i])).collect();
            if places.is_empty() {
                continue;
            }
            let matrices: Vec<Matrix> = places.iter().map(|&i| stack.matrices[i]).collect();
            // The tables belong to the rest.
            let tables = if names.is_none() { stack.tables } else { &[] };
            let own = Stack { matrices: &matrices, tables, named: names.is_some(), ..*stack };
            let made = sharing.sites(gpu, &own, rng)?;
            made.fit(&own).map_err(Error::config)?;
            for (to, from) in by_depth.iter_mut().zip(made.by_depth) {
                places.iter().zip(from).for_each(|(&i, site)| to[i] = Some(site));
            }
            all.made.extend(made.made);
            all.tables.extend(made.tables);
        }
        all.by_depth = by_depth.into_iter().map(|sites| sites.into_iter().flatten().collect()).collect();
        Ok(all)
    }
}
