//! Merges whose result is learned, searched for or repaired on data, and written when it is known.

use super::{Merge, READ_BACK};
use serde_json::json;
use std::time::Instant;
use tiebeam::Result;
use tiebeam::files::size;
use tiebeam::merge::Architecture;
use tiebeam::merge::learning::Learned;
use tiebeam::merge::written::Written;

/// A bar for work of a known length, of which each step says something.
const BAR: &str = "{bar:30} {pos}/{len} {msg}, {elapsed} so far, about {eta} to go";

impl Merge<'_> {
    /// Learns, searches or repairs, and writes what came of it.
    pub(super) fn write_learned(&self) -> Result<()> {
        let Merge { gpu, job, sources, context, .. } = *self;
        let start = Instant::now();
        let tasks = job.learning_tasks(gpu)?;
        let architecture = Architecture::open(gpu, &job.leader().checkpoint, job.network()?.as_ref())?;
        let bar = context.bar(Some(0), BAR);
        let mut on = |done: usize, all: usize, word: &str| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
            bar.set_message(word.to_string());
            self.unless_stopped()
        };
        let mut learned = match &job.config.search {
            Some(search) => {
                let (found, weighted) = job.searched(gpu, &architecture, &tasks, search, &mut on)?;
                let weights: Vec<String> = found.point.iter().map(|w| format!("{w:.3}")).collect();
                let note = format!(
                    "weights {}: the best of {} merges, with a mean merit of {:.4}",
                    weights.join(", "),
                    found.evaluations,
                    found.score
                );
                let record = json!({
                    "line": "searched", "weights": found.point, "merit": found.score, "evaluations": found.evaluations,
                });
                let merged = weighted.merged(gpu, sources)?;
                Learned::of(merged, note, record)
            }
            None if job.config.method.is_learned() => {
                job.learn(gpu, sources, &architecture, &tasks, &mut on)?
            }
            None => Learned::of(job.merged(gpu, sources)?, String::new(), json!(null)),
        };
        bar.finish_and_clear();
        if job.config.repair {
            learned.weights = job.repaired(gpu, sources, &architecture, &learned.weights, &tasks)?;
            learned.notes.push("repaired on the inputs of `learn`".into());
        }
        for note in learned.notes.iter().filter(|note| !note.is_empty()) {
            context.result(note);
        }
        if !learned.record.is_null() {
            context.record(&learned.record)?;
        }
        let written =
            Written { weights: &learned.weights, network: learned.network.as_ref(), record: &learned.record };
        job.write(&written, self.out, self.shard_bytes, self.config, &mut |_| self.unless_stopped())?;
        job.check_learned(&written, self.out)?;
        context.note(READ_BACK);
        let (seconds, count, bytes) =
            (start.elapsed().as_secs_f64(), learned.weights.len(), job.written_bytes(&written));
        let (all, place) = (size(bytes), self.out.display());
        context.result(format_args!("{count} tensors, {all} in {seconds:.1} s: {place}"));
        context.record(&json!({
            "line": "merged", "out": self.out, "tensors": count, "bytes": bytes, "seconds": seconds, "notes": job.notes,
        }))
    }

    /// Merges so that every model can be rebuilt.
    pub(super) fn write_reversible(&self) -> Result<()> {
        let Merge { gpu, job, sources, context, .. } = *self;
        let start = Instant::now();
        let bar = context.bar(Some(0), "{bar:30} {pos}/{len} tensors, {elapsed} so far, about {eta} to go");
        let models = job.reversible(gpu, sources, &mut |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
            self.unless_stopped()
        })?;
        job.write_reversible(&models, self.out, self.config)?;
        bar.finish_and_clear();
        let [stored, all] = models.numbers();
        let (count, seconds, place) = (models.names.len(), start.elapsed().as_secs_f64(), self.out.display());
        context.result(format_args!(
            "{count} models as {stored} numbers, {:.1}% of their {all}, in {seconds:.1} s: {place}",
            100.0 * stored as f64 / all.max(1) as f64
        ));
        context.note(format_args!(
            "`tiebeam rebuild {place} NAME --out FOLDER` rebuilds {}",
            models.names.join(", ")
        ));
        context.record(&json!({
            "line": "merged", "out": self.out, "models": models.names, "stored": stored, "numbers": all, "seconds": seconds,
        }))
    }
}
