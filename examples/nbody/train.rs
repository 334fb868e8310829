//! The training run: recorded steps, and a checkpoint per epoch.

use crate::Args;
use crate::data::{Data, PARTICLES, Split};
use crate::net::Net;
use crate::{state, terminal};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tiebeam::geometry::Graph;
use tiebeam::geometry::vectors::{DMat3, DVec3, orthogonal};
use tiebeam::nn::Parameters;
use tiebeam::optim::{AdamW, AdamWConfig, Group, LossScale, Schedule};
use tiebeam::train::Trainer;
use tiebeam::{Error, Gpu, Result, Rng, Tensor, autocast, no_grad};

/// The numbers of an epoch: mean of the steps' losses, error on all validation systems, seconds.
pub type Epoch = [f64; 3];

/// A network in training.
pub struct Run<'a> {
    args: &'a Args,
    gpu: &'a Gpu,
    name: &'a str,
    data: &'a Data,
    pub net: Net,
    pub trainer: Trainer,
    pub curve: Vec<Epoch>,
    graph: Graph,
}

/// The results of the trained network.
pub struct Report {
    name: String,
    parameters: usize,
    epochs: usize,
    seconds: f64,
    pub mse: f64,
    rotated: f64,
    turn: f64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { name, parameters, epochs, seconds, mse, rotated, turn } = self;
        writeln!(
            f,
            "{name:<10} test MSE {mse:.4} ({parameters} parameters, {epochs} epochs in {seconds:.0} s)"
        )?;
        write!(
            f,
            "{:<10} mean over 5 rotations {rotated:.4}; rms change under a rotation {turn:.4} of the rms displacement",
            ""
        )
    }
}

impl<'a> Run<'a> {
    pub fn new(
        args: &'a Args,
        gpu: &'a Gpu,
        name: &'a str,
        mut net: Net,
        data: &'a Data,
        stop: &Arc<AtomicBool>,
    ) -> Result<Run<'a>> {
        let batch = args.batch as usize;
        let first = data.train.rows(&(0..batch).collect::<Vec<_>>());
        let graph = Graph::full(gpu, &first.position, 3, &vec![PARTICLES; batch], true)?;
        let [_, velocity, charge, _] = tensors(gpu, &first);
        net.calibrate(&graph, &charge, &velocity)?;
        let group = Group::new(Parameters::of(&net).trainable());
        let optimizer = AdamW::new(gpu, vec![group], AdamWConfig::default().lr(args.lr).clip(Some(0.5)))?;
        let per_epoch = (data.train.len() / batch) as u64;
        let total = u64::from(args.epochs) * per_epoch;
        let mut trainer = Trainer::new(optimizer)
            .schedule(Schedule::WarmupCosine { warmup: per_epoch / 2, total, floor: 0.0 })
            .scale(LossScale::of(gpu, args.scope.precision)?)
            // Batches have their own generator, so both networks see the same ones.
            .rng(Rng::new(args.seed ^ 0xba7c4))
            .total(total)
            .stop(stop.clone());
        let (path, mut curve) = (checkpoint(args, name), Vec::new());
        if args.resume && path.exists() {
            curve = state::resume(&path, &mut trainer, &net, &settings(args))?;
        }
        Ok(Run { args, gpu, name, data, net, trainer, curve, graph })
    }

    /// Trains to the last epoch. Returns false if Ctrl-C stopped it before.
    pub fn train(&mut self) -> Result<bool> {
        let (epochs, per_epoch) =
            (self.args.epochs as usize, self.data.train.len() / self.args.batch as usize);
        let done = self.curve.len() * per_epoch;
        let bar = terminal::bar(terminal::TRAINING, done as u64, (epochs * per_epoch) as u64);
        while self.curve.len() < epochs {
            let (gpu, net, graph, data) = (self.gpu, &self.net, &self.graph, self.data);
            let (size, precision) = (self.args.batch as usize, self.args.scope.precision);
            let started = Instant::now();
            let (mut order, mut sum): (Vec<usize>, f64) = ((0..data.train.len()).collect(), 0.0);
            let batch = |step: u64, rng: &mut Rng| {
                let i = step as usize % per_epoch;
                if i == 0 {
                    rng.shuffle(&mut order);
                }
                let turned = data.train.rows(&order[i * size..][..size]).turned(|| orthogonal(rng));
                Ok(tensors(gpu, &turned).into())
            };
            let loss = |inputs: &[Tensor], _: &mut Rng| {
                let [position, velocity, charge, target] = inputs else { unreachable!("four inputs") };
                Ok(autocast(precision, || {
                    let moved = position.add(&net.displacement(&graph.at(position), charge, velocity));
                    moved.sub(target).square().mean_all()
                }))
            };
            let end = ((self.curve.len() + 1) * per_epoch) as u64;
            let finished = self.trainer.train_recorded(end, batch, loss, |report| {
                terminal::events(&bar, self.name, report);
                bar.set_position(report.step);
                sum += f64::from(report.loss);
                if report.loss.is_finite() { Ok(()) } else { Err(diverged(report.loss)) }
            })?;
            if !finished {
                bar.finish_and_clear();
                return Ok(false);
            }
            let validation = self.data.validation.error(&self.predict(&self.data.validation)?);
            self.curve.push([sum / per_epoch as f64, validation, started.elapsed().as_secs_f64()]);
            bar.set_message(format!("epoch {}, validation {validation:.4}", self.curve.len()));
            bar.suspend(|| self.note());
            let metadata = state::metadata(&settings(self.args), &self.curve);
            self.trainer.save_with(checkpoint(self.args, self.name), &self.net, &metadata)?;
        }
        bar.finish_and_clear();
        Ok(true)
    }

    fn note(&self) {
        if let Some([train, validation, seconds]) = self.curve.last() {
            let epoch = self.curve.len();
            println!(
                "{:<10} epoch {epoch:3}  train {train:.4}  validation {validation:.4}  {seconds:.1} s",
                self.name
            );
        }
    }

    /// Predicts the final positions of all systems of `split`, in its order.
    pub fn predict(&self, split: &Split) -> Result<Vec<f32>> {
        let batch = self.args.batch as usize;
        let mut all = Vec::with_capacity(split.position.len());
        let order: Vec<usize> = (0..split.len()).collect();
        for chosen in order.chunks(batch) {
            // The last batch is padded with its first system, because the graph has a fixed size.
            let mut filled = chosen.to_vec();
            filled.resize(batch, chosen[0]);
            let [position, velocity, charge, _] = tensors(self.gpu, &split.rows(&filled));
            let moved = no_grad(|| {
                position.add(&self.net.displacement(&self.graph.at(&position), &charge, &velocity))
            });
            all.extend_from_slice(&moved.to_vec::<f32>()?[..chosen.len() * 3 * PARTICLES]);
        }
        Ok(all)
    }

    /// Scores the test systems in their own orientation and under random orthogonal matrices.
    pub fn test(&self) -> Result<Report> {
        let test = &self.data.test;
        let plain = self.predict(test)?;
        let mut rng = Rng::new(self.args.seed ^ 0x7e57);
        let (mut mean, mut change) = (vec![0.0f64; plain.len()], 0.0);
        const TURNS: usize = 5;
        for _ in 0..TURNS {
            let matrix = orthogonal(&mut rng);
            let turned = self.predict(&test.clone().turned(|| matrix))?;
            let back: Vec<f64> = turned
                .chunks_exact(3)
                .flat_map(|x| {
                    (matrix.transpose() * DVec3::from([x[0], x[1], x[2]].map(f64::from))).to_array()
                })
                .collect();
            for ((m, b), p) in mean.iter_mut().zip(&back).zip(&plain) {
                *m += b / TURNS as f64;
                change += (b - *p as f64).powi(2) / (TURNS * plain.len()) as f64;
            }
        }
        let mean: Vec<f32> = mean.iter().map(|&x| x as f32).collect();
        Ok(Report {
            name: self.name.into(),
            parameters: Parameters::of(&self.net).stored(),
            epochs: self.curve.len(),
            seconds: self.curve.iter().map(|e| e[2]).sum(),
            mse: test.error(&plain),
            rotated: test.error(&mean),
            turn: (change / test.error_along(0.0)).sqrt(),
        })
    }
}

fn checkpoint(args: &Args, name: &str) -> PathBuf {
    args.out.join(format!("{name}.checkpoint.safetensors"))
}

fn settings(args: &Args) -> String {
    let Args { epochs, systems, batch, channels, layers, orientations, lr, seed, .. } = args;
    let precision = args.scope.precision;
    format!(
        "epochs {epochs} systems {systems} batch {batch} channels {channels} layers {layers} \
         orientations {orientations} lr {lr} seed {seed} precision {precision}"
    )
}

/// Returns position, velocity, charge and target of a batch, one row per particle.
fn tensors(gpu: &Gpu, batch: &Split) -> [Tensor; 4] {
    let nodes = batch.charge.len();
    let part = |data: &[f32], width: usize| Tensor::from_slice(gpu, data, [nodes, width]);
    [part(&batch.position, 3), part(&batch.velocity, 3), part(&batch.charge, 1), part(&batch.target, 3)]
}

/// The error of a run whose loss is not finite. It comes before a bad checkpoint is saved.
fn diverged(loss: f32) -> Error {
    let message =
        format!("the loss is {loss}; go on from the last epoch with --resume, or start with a smaller --lr");
    Error::config(message)
}

impl Split {
    /// Returns the systems with these indices.
    pub fn rows(&self, chosen: &[usize]) -> Split {
        let take = |from: &[f32], width: usize| -> Vec<f32> {
            chosen.iter().flat_map(|&i| from[i * width..][..width].iter().copied()).collect()
        };
        Split {
            charge: take(&self.charge, PARTICLES),
            position: take(&self.position, 3 * PARTICLES),
            velocity: take(&self.velocity, 3 * PARTICLES),
            target: take(&self.target, 3 * PARTICLES),
            ..Split::default()
        }
    }

    /// Transforms each system by its own matrix.
    fn turned(mut self, mut matrix: impl FnMut() -> DMat3) -> Split {
        for i in 0..self.len() {
            let m = matrix();
            for part in [&mut self.position, &mut self.velocity, &mut self.target] {
                for x in part[i * 3 * PARTICLES..][..3 * PARTICLES].chunks_exact_mut(3) {
                    let turned = m * DVec3::from([x[0], x[1], x[2]].map(f64::from));
                    (0..3).for_each(|k| x[k] = turned[k] as f32);
                }
            }
        }
        self
    }
}
