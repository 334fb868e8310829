//! The training loop: one recorded step, which is replayed, and a checkpoint per epoch.

use crate::Args;
use crate::data::{Data, PARTICLES, Split};
use crate::net::Net;
use crate::precision;
use crate::state::State;
use indicatif::{ProgressBar, ProgressStyle};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use tiebeam::geometry::Graph;
use tiebeam::geometry::vectors::{DMat3, DVec3, orthogonal};
use tiebeam::gpu::readback::Reading;
use tiebeam::nn::Parameters;
use tiebeam::optim::{AdamW, AdamWConfig, Group, LossScale, Schedule, Watch};
use tiebeam::{Error, Gpu, Result, Rng, Step, Tensor, autocast, no_grad};

/// The numbers of an epoch: mean of the steps' losses, error on all validation systems, seconds.
pub type Epoch = [f64; 3];

/// A network in training.
pub struct Run<'a> {
    args: &'a Args,
    gpu: &'a Gpu,
    name: &'a str,
    data: &'a Data,
    pub net: Net,
    pub state: State<3>,
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
    pub fn new(args: &'a Args, gpu: &'a Gpu, name: &'a str, mut net: Net, data: &'a Data) -> Result<Run<'a>> {
        let batch = args.batch as usize;
        let first = data.train.rows(&(0..batch).collect::<Vec<_>>());
        let graph = Graph::full(gpu, &first.position, 3, &vec![PARTICLES; batch], true)?;
        let [_, velocity, charge, _] = tensors(gpu, &first);
        net.calibrate(&graph, &charge, &velocity)?;
        let parameters = Parameters::of(&net);
        let group = Group::new(parameters.named().iter().map(|(name, p)| (name.clone(), p)));
        let config = AdamWConfig::default().clip(Some(0.5));
        let optimizer = AdamW::new(gpu, vec![group], config)?;
        // Batches have their own generator, so both networks see the same ones.
        let rng = Rng::new(args.seed ^ 0xba7c4);
        let scale = LossScale::of(gpu, args.scope.precision)?;
        let state = State { optimizer, scale, rng, curve: Vec::new(), settings: settings(args) };
        let mut run = Run { args, gpu, name, data, net, state, graph };
        let checkpoint = run.checkpoint();
        if args.resume && checkpoint.exists() {
            run.state.load(&checkpoint, &run.net)?;
        }
        Ok(run)
    }

    /// Trains to the last epoch. Returns false if Ctrl-C stopped it before.
    pub fn train(&mut self, stop: &AtomicBool) -> Result<bool> {
        let per_epoch = self.data.train.len() / self.args.batch as usize;
        let (epochs, steps) = (self.args.epochs as usize, self.args.epochs as usize * per_epoch);
        let schedule =
            Schedule::WarmupCosine { warmup: (per_epoch / 2) as u64, total: steps as u64, floor: 0.0 };
        let bar = ProgressBar::new(steps as u64);
        bar.set_style(ProgressStyle::with_template("{bar:32} {pos}/{len} {msg} ETA {eta}").expect("valid"));
        bar.set_position((self.state.curve.len() * per_epoch) as u64);
        bar.reset_eta();
        let mut recorded: Option<Step> = None;
        while self.state.curve.len() < epochs {
            let started = Instant::now();
            let mut order: Vec<usize> = (0..self.data.train.len()).collect();
            self.state.rng.shuffle(&mut order);
            let (mut sum, mut late) = (0.0, None);
            for (i, chosen) in order.chunks_exact(self.args.batch as usize).enumerate() {
                if stop.load(Ordering::SeqCst) {
                    bar.finish_and_clear();
                    return Ok(false);
                }
                let lr = schedule.lr(self.args.lr, (self.state.curve.len() * per_epoch + i) as u64);
                let turned = self.data.train.rows(chosen).turned(|| orthogonal(&mut self.state.rng));
                let loss = self.step(&mut recorded, &turned, lr)?;
                // The loss is read one step late, so the device never waits for the host.
                let sent = (loss.read::<f32>()?, self.state.optimizer.watch()?);
                if let Some(previous) = late.replace(sent) {
                    sum += self.note_step(previous, &bar)?;
                }
                bar.inc(1);
            }
            sum += late.map_or(Ok(0.0), |last| self.note_step(last, &bar))?;
            let validation = self.data.validation.error(&self.predict(&self.data.validation)?);
            self.state.curve.push([sum / per_epoch as f64, validation, started.elapsed().as_secs_f64()]);
            bar.set_message(format!("epoch {}, validation {validation:.4}", self.state.curve.len()));
            bar.suspend(|| self.note());
            self.state.save(&self.checkpoint(), &self.net)?;
        }
        bar.finish_and_clear();
        Ok(true)
    }

    fn note(&self) {
        if let Some([train, validation, seconds]) = self.state.curve.last() {
            let epoch = self.state.curve.len();
            println!(
                "{:<10} epoch {epoch:3}  train {train:.4}  validation {validation:.4}  {seconds:.1} s",
                self.name
            );
        }
    }

    /// Prints what happened up to a step, and returns its loss.
    fn note_step(&self, (loss, watch): (Reading, Watch), bar: &ProgressBar) -> Result<f64> {
        precision::report(bar, self.name, watch)?;
        number(loss)
    }

    /// Makes one step of the optimizer and returns the loss.
    fn step(&mut self, recorded: &mut Option<Step>, batch: &Split, lr: f32) -> Result<Tensor> {
        let inputs = tensors(self.gpu, batch);
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        if let Some(step) = recorded {
            step.set_lr(lr);
            return Ok(step.run(&inputs)?[0].clone());
        }
        let (net, graph, precision) = (&self.net, &self.graph, self.args.scope.precision);
        let State { optimizer, scale, .. } = &mut self.state;
        let step = Step::record(self.gpu, &inputs, |inputs| {
            let [position, velocity, charge, target] = inputs else { unreachable!("four inputs") };
            let loss = autocast(precision, || {
                let moved = position.add(&net.displacement(&graph.at(position), charge, velocity));
                moved.sub(target).square().mean_all()
            });
            optimizer.step(&scale.backward(&loss)?, lr)?;
            Ok(vec![loss])
        })?;
        Ok(recorded.insert(step).outputs()[0].clone())
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
            epochs: self.state.curve.len(),
            seconds: self.state.curve.iter().map(|e| e[2]).sum(),
            mse: test.error(&plain),
            rotated: test.error(&mean),
            turn: (change / test.error_along(0.0)).sqrt(),
        })
    }

    fn checkpoint(&self) -> PathBuf {
        self.args.out.join(format!("{}.checkpoint.safetensors", self.name))
    }
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

/// Returns a loss that was read back. NaN or infinity ends the run before a bad checkpoint is saved.
fn number(reading: Reading) -> Result<f64> {
    let loss: f32 = bytemuck::pod_read_unaligned(&reading.wait()?);
    if loss.is_finite() {
        return Ok(loss as f64);
    }
    let message =
        format!("the loss is {loss}; go on from the last epoch with --resume, or start with a smaller --lr");
    Err(Error::config(message))
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
