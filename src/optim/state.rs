//! The state that an optimizer keeps between steps, for checkpoints.

use super::StateTensor;
use super::arena::{self, Arena, Arenas};
use super::events::{self, Watch};
use super::taken::{self, Taken};
use crate::error::{Error, Result};
use crate::gpu::readback::Reading;
use crate::gpu::value::Place;
use crate::shape::Shape;
use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;

/// Name of the state that counts the steps that changed a parameter, if that is not all of the optimizer's.
const COUNT: &str = "step";
/// Begins the name of an empty state that says whose the others are, because several optimizers have moments of the same names.
const KIND: &str = "kind/";

impl Arenas {
    /// Returns every moment of every leaf, named `MOMENT/LEAF`, all from the same point in time. If the leaves' steps
    /// are counted, also returns `step/LEAF` of every leaf that some step did not change. An empty `kind/OPTIMIZER/LEAF`, with
    /// the first leaf, says whose state it is.
    pub fn state_dict(&self) -> Result<Vec<StateTensor>> {
        let read = |index: usize| -> Result<Vec<Reading>> {
            let start = |arena: &Arena| self.gpu.start_read(&arena.moments[index], 0, arena.layout.bytes);
            self.arenas.iter().map(start).collect()
        };
        let (readings, taken, steps) = self.gpu.unchanged(|| {
            let readings: Result<Vec<_>> = (0..self.moments.len()).map(read).collect();
            let taken = self.taken.iter().map(|taken| {
                let buffer = &taken.buffer;
                self.gpu.start_read(buffer, 0, buffer.size)
            });
            (readings, taken.collect::<Result<Vec<_>>>(), self.steps())
        });
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
        for reading in taken? {
            let words: Vec<u32> = bytemuck::pod_collect_to_vec(&reading.wait()?);
            for (leaf, words) in self.leaves.iter().zip(words.chunks_exact(taken::WORDS)) {
                if u64::from(words[0]) != steps {
                    state.push((format!("{COUNT}/{}", leaf.name), Shape::new(&[]), vec![words[0] as f32]));
                }
            }
        }
        let first = self.leaves.first().map_or("", |leaf| &leaf.name);
        state.push((format!("{KIND}{}/{first}", self.op), Shape::new(&[0]), vec![]));
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
        // States of earlier versions do not name their optimizer.
        let kinds = given.keys().filter_map(|name| name.strip_prefix(KIND)?.split_once('/'));
        if let Some((other, _)) = kinds.filter(|(name, _)| *name != self.op).min() {
            return Err(wrong(format!("this is the state of {other}")));
        }
        given.retain(|name, _| !name.starts_with(KIND));
        let mut images = Vec::new();
        for moment in &self.moments {
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
        let count = (steps as u32).to_le_bytes();
        let log = Place { buffer: self.log.buffer.clone(), offset: events::STEPS };
        // A lost batch may have written it too.
        let unscaled = (self.unscaled.scaling.state.place(), bytemuck::cast_slice(&arena::UNSCALED));
        let image = Taken::image(counts.into_iter());
        let taken = self
            .taken
            .iter()
            .map(|taken| (Place { buffer: taken.buffer.clone(), offset: 0 }, bytemuck::cast_slice(&image)));
        let writes: Vec<_> = places.zip(bytes).chain([(log, &count[..]), unscaled]).chain(taken).collect();
        self.gpu.unchanged(|| {
            self.gpu.overwrite_now(&writes)?;
            self.steps.store(steps, Relaxed);
            Ok(())
        })
    }

    /// Starts to read what happened in the steps, without waiting for the device.
    pub fn watch(&self) -> Result<Watch> {
        self.log.watch(&self.gpu)
    }

    /// Number of steps that changed nothing, because the norm of the gradients was not finite. Waits for the device.
    pub fn skipped(&self) -> Result<u64> {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&self.gpu.read(&self.log.buffer, 0, 4)?);
        Ok(words[0].into())
    }
}

#[cfg(test)]
mod tests {
    use crate::gpu::{Gpu, lock};
    use crate::optim::{AdamW, AdamWConfig, Group};
    use crate::step::Step;
    use crate::tensor::Tensor;

    /// A batch that the driver refused may have changed all, some or none of its tensors' elements. The tensors report
    /// this until they are loaded again.
    #[test]
    fn a_lost_batch_is_known_by_what_it_wrote() {
        let gpu = Gpu::open().unwrap();
        let [w, v] = [1f32, 2.0].map(|x| Tensor::from_slice(&gpu, &[x, x], [2]).requires_grad());
        let mut adamw =
            AdamW::new(&gpu, vec![Group::new([("w", &w), ("v", &v)])], AdamWConfig::default()).unwrap();
        let state = adamw.state_dict().unwrap();
        let grads = w.sum_all().backward().unwrap();
        adamw.step(&grads, 0.5).unwrap();
        let mut step = Step::record(&gpu, &[], |_| {
            adamw.step(&w.scale(2.0).sum_all().backward()?, 0.5)?;
            Ok(vec![v.sum_all()])
        })
        .unwrap();
        gpu.synchronize().unwrap();
        // Other work in the same batch comes first.
        v.detach().scale(2.0).evaluate();
        step.run(&[]).unwrap();
        let sum = w.detach().sum_all();
        sum.evaluate();
        // A copy of a buffer onto itself: wgpu refuses it, and with it the whole batch.
        let raw = w.place().buffer.data().unwrap().clone();
        lock(&gpu.0.recorder).encoder(&gpu).unwrap().copy_buffer_to_buffer(&raw, 0, &raw, 0, 4);
        assert!(gpu.synchronize().is_err());
        gpu.take_fault().expect("the driver's refusal");
        let lost = |error: crate::Error| assert!(error.to_string().contains("was lost"), "{error}");
        lost(w.to_vec::<f32>().unwrap_err());
        lost(sum.item().unwrap_err());
        lost(step.outputs()[0].item().unwrap_err());
        lost(step.run(&[]).map(drop).unwrap_err());
        lost(adamw.state_dict().unwrap_err());
        lost(adamw.step(&grads, 0.5).map(drop).unwrap_err());
        assert_eq!(v.to_vec::<f32>().unwrap(), [2.0; 2], "beside it in the same arena");
        gpu.unchanged(|| gpu.overwrite_now(&[(w.place(), bytemuck::cast_slice(&[3f32, 4.0]))])).unwrap();
        adamw.load_state(0, &state).unwrap();
        adamw.step(&w.sum_all().backward().unwrap(), 0.5).unwrap();
        assert_eq!(w.to_vec::<f32>().unwrap(), [2.5, 3.5]);
        step.run(&[]).unwrap();
        assert!(w.to_vec::<f32>().unwrap()[0] < 2.1 && step.outputs()[0].item().unwrap() == 4.0);
    }

    /// Loading parameters and state repairs an optimizer that was made in the lost batch itself.
    #[test]
    fn an_optimizer_made_in_a_lost_batch_can_be_loaded() {
        let gpu = Gpu::open().unwrap();
        let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
        gpu.synchronize().unwrap();
        let mut adamw = AdamW::new(&gpu, vec![Group::new([("w", &w)])], AdamWConfig::default()).unwrap();
        let raw = w.place().buffer.data().unwrap().clone();
        lock(&gpu.0.recorder).encoder(&gpu).unwrap().copy_buffer_to_buffer(&raw, 0, &raw, 0, 4);
        assert!(gpu.synchronize().is_err());
        gpu.take_fault();
        assert!(w.to_vec::<f32>().is_err() && adamw.state_dict().is_err());
        gpu.unchanged(|| gpu.overwrite_now(&[(w.place(), bytemuck::cast_slice(&[3f32, 4.0]))])).unwrap();
        let zeros = |moment: &str| (format!("{moment}/w"), *w.shape(), vec![0.0; 2]);
        adamw.load_state(0, &[zeros("m"), zeros("v")]).unwrap();
        adamw.step(&w.sum_all().backward().unwrap(), 0.5).unwrap();
        assert_eq!((w.to_vec::<f32>().unwrap(), adamw.skipped().unwrap()), (vec![2.5, 3.5], 0));
    }
}
