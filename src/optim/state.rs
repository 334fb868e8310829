//! What an optimizer keeps between steps, for checkpoints.

use super::StateTensor;
use super::arena::{Arena, Arenas};
use crate::error::{Error, Result};
use crate::gpu::buffer::Reading;
use crate::gpu::value::Place;
use crate::shape::Shape;
use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;

/// The state that counts a parameter's steps, where they are not the optimizer's.
const COUNT: &str = "step";

impl Arenas {
    /// Every moment of every leaf, named `MOMENT/LEAF`, of one moment in time; and where `counts` is set `step/LEAF` of every leaf
    /// that has not taken part in all steps.
    pub fn state_dict(&self, counts: bool) -> Result<Vec<StateTensor>> {
        let read = |index: usize| -> Result<Vec<Reading>> {
            let start = |arena: &Arena| self.gpu.start_read(&arena.moments[index], 0, arena.layout.bytes);
            self.arenas.iter().map(start).collect()
        };
        let readings: Result<Vec<_>> = self.gpu.unchanged(|| (0..self.moments.len()).map(read).collect());
        let mut state = Vec::new();
        for (moment, readings) in self.moments.iter().zip(readings?) {
            let elements: Vec<Vec<f32>> = readings
                .into_iter()
                .map(|reading| Ok(bytemuck::pod_collect_to_vec(&reading.wait()?)))
                .collect::<Result<_>>()?;
            state.extend(self.leaves.iter().map(|leaf| {
                let data = elements[leaf.arena][leaf.range()].to_vec();
                (format!("{moment}/{}", leaf.name), *leaf.tensor.shape(), data)
            }));
        }
        for (leaf, count) in self.leaves.iter().zip(self.counts.iter()).filter(|_| counts) {
            let count = count.load(Relaxed);
            if count != self.steps() {
                state.push((format!("{COUNT}/{}", leaf.name), Shape::new(&[]), vec![count as f32]));
            }
        }
        Ok(state)
    }

    pub fn load_state(&mut self, steps: u64, state: &[StateTensor]) -> Result<()> {
        let wrong = |message: String| Error::config(format!("{}: {message}", self.op));
        let mut given: HashMap<&str, (&Shape, &[f32])> = HashMap::new();
        for (name, shape, data) in state {
            if data.len() != shape.count() {
                return Err(wrong(format!("state `{name}`: {} elements for shape {shape}", data.len())));
            }
            if given.insert(name, (shape, data)).is_some() {
                return Err(wrong(format!("state `{name}` comes twice")));
            }
        }
        let mut images = Vec::new();
        for moment in self.moments {
            let mut image: Vec<Vec<f32>> =
                self.arenas.iter().map(|arena| vec![0.0; arena.layout.bytes as usize / 4]).collect();
            for leaf in &self.leaves {
                let name = format!("{moment}/{}", leaf.name);
                let Some((shape, data)) = given.remove(name.as_str()) else {
                    return Err(wrong(format!(
                        "there is no state `{name}`; it is another model's or optimizer's"
                    )));
                };
                if shape != leaf.tensor.shape() {
                    let own = leaf.tensor.shape();
                    return Err(wrong(format!(
                        "state `{name}` is {shape}, here it is {own}; it is another model's"
                    )));
                }
                image[leaf.arena][leaf.range()].copy_from_slice(data);
            }
            images.push(image);
        }
        let mut counts = Vec::new();
        for leaf in &self.leaves {
            let name = format!("{COUNT}/{}", leaf.name);
            counts.push(match given.remove(name.as_str()) {
                None => steps,
                Some((_, [count])) if *count >= 0.0 && count.fract() == 0.0 => *count as u64,
                Some((_, data)) => {
                    return Err(wrong(format!("state `{name}` is {data:?}, no number of steps")));
                }
            });
        }
        if let Some(name) = given.keys().min() {
            return Err(wrong(format!("state `{name}` belongs to no parameter here; it is another model's")));
        }
        let arenas = |index: usize| self.arenas.iter().map(move |arena| arena.moments[index].clone());
        let places = (0..images.len()).flat_map(arenas).map(|buffer| Place { buffer, offset: 0 });
        let bytes = images.iter().flatten().map(|elements| bytemuck::cast_slice(elements));
        self.gpu.overwrite(&places.zip(bytes).collect::<Vec<_>>())?;
        self.steps.store(steps, Relaxed);
        for (count, new) in self.counts.iter().zip(counts) {
            count.store(new, Relaxed);
        }
        Ok(())
    }

    /// Steps that changed nothing because the gradients had no finite norm. Waits for the device.
    pub fn skipped(&self) -> Result<u64> {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&self.gpu.read(&self.skipped, 0, 4)?);
        Ok(words[0].into())
    }
}
