//! Recording what a thread launches, and encoding it again without the code that launched it.
//!
//! While a thread captures, its commands run as ever and are kept too. What kernels write comes from a pool of the capture's
//! own, so that nobody else is given memory that a replay writes; uploads come from the device's pool, because a replay does
//! not repeat them. What is bound from outside the own pool is held. What the thread computes for others, or made before, is no
//! part of it: that runs [`aside`].

use super::buffer::{Buffer, Pool};
use super::kernel::{Bind, Launch, Pipeline};
use super::texel::{self, Texel};
use super::{Gpu, lock};
use crate::error::{Error, Result};
use crate::rng;
use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// The numbers of a kernel at the rates that a step has now.
pub(crate) type Numbers = Arc<dyn Fn(&[f32]) -> Vec<f32> + Send + Sync>;

/// What changes in a kernel's parameters from one replay to the next.
#[derive(Clone)]
pub(crate) enum Live {
    /// Words `at` and `at + 1` number a random stream of the generator, the words before them are its key.
    Stream { at: usize, generator: u64 },
    /// The words from `at` on.
    Numbers { at: usize, make: Numbers },
}

enum Command {
    Dispatch {
        pipeline: Arc<Pipeline>,
        group: wgpu::BindGroup,
        params: Vec<u8>,
        grid: [u32; 3],
        /// How long it should take.
        seconds: f64,
        live: Option<Live>,
    },
    /// What the host does at this place.
    Hook(Box<dyn Fn() + Send>),
    Texels {
        from: wgpu::Buffer,
        offset: u64,
        bytes: u64,
        texel: Texel,
        texture: wgpu::Texture,
    },
}

/// A thread's commands since it began to capture.
pub(crate) struct Capture {
    gpu: Gpu,
    /// Which recording it is, above 0.
    number: u64,
    commands: Vec<Command>,
    pool: Arc<Mutex<Pool>>,
    /// Buffers of other pools that replays read or write: from before, or uploaded in between.
    outside: Vec<Arc<Buffer>>,
    /// Tensors that replays change in place.
    changed: Vec<Arc<Buffer>>,
    /// Where replays write the step's outputs.
    results: Vec<Arc<Buffer>>,
    refused: Option<Error>,
    /// The learning rates of optimizer steps, in order.
    rates: Vec<f32>,
    /// What must hold before a replay.
    conditions: Vec<Condition>,
    /// What the step draws from random generators.
    draws: rng::Drawn,
}

type Condition = Box<dyn Fn() -> Result<()> + Send>;

thread_local! {
    static CAPTURE: RefCell<Option<Capture>> = const { RefCell::new(None) };
}

/// Ends the thread's capture even when the captured code panics.
struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        CAPTURE.take();
        rng::drawn();
    }
}

/// Puts the thread's capture back.
struct Aside(Option<Capture>);

impl Drop for Aside {
    fn drop(&mut self) {
        CAPTURE.set(self.0.take());
    }
}

/// Runs `work` outside the thread's capture, if there is one.
pub(super) fn aside<T>(work: impl FnOnce() -> T) -> T {
    let _aside = Aside(CAPTURE.take());
    work()
}

/// The number of the recording whose code this thread runs on the device, 0 for none.
pub(crate) fn number(gpu: &Gpu) -> u64 {
    with(gpu, |capture| capture.number).unwrap_or(0)
}

/// The thread's capture on this device, if it captures.
fn with<T>(gpu: &Gpu, work: impl FnOnce(&mut Capture) -> T) -> Option<T> {
    CAPTURE.with_borrow_mut(|capture| capture.as_mut().filter(|c| c.gpu == *gpu).map(work))
}

/// The pool that the thread's buffers come from and go back to.
pub(super) fn pool(gpu: &Gpu) -> Arc<Mutex<Pool>> {
    with(gpu, |capture| capture.pool.clone()).unwrap_or_else(|| gpu.0.pool.clone())
}

/// Fails while capturing: what the host does once in the middle of a step would be missing from its replays.
pub(crate) fn refuse(gpu: &Gpu, what: &str) -> Result<()> {
    let error = || Error::config(format!("Step: {what} inside a recorded step; do it before or after"));
    match with(gpu, |capture| capture.refused.get_or_insert_with(error).clone()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// A launch of this thread was skipped: its replays would lack it, so a capture must not go on.
pub(super) fn failed(gpu: &Gpu, error: &Error) {
    with(gpu, |capture| {
        capture.refused.get_or_insert_with(|| error.clone());
    });
}

pub(super) fn texels(gpu: &Gpu, bind: &Bind, from: &wgpu::Buffer, texel: Texel, texture: &wgpu::Texture) {
    with(gpu, |capture| {
        let (offset, bytes) = (bind.offset, bind.size);
        let (from, texture) = (from.clone(), texture.clone());
        capture.commands.push(Command::Texels { from, offset, bytes, texel, texture });
    });
}

pub(super) fn dispatch(
    gpu: &Gpu,
    pipeline: &Arc<Pipeline>,
    group: &wgpu::BindGroup,
    launch: &Launch,
    seconds: f64,
    live: Option<Live>,
) {
    with(gpu, |capture| {
        for bind in launch.binds.iter().filter(|bind| !bind.buffer.is_of(&capture.pool)) {
            push_once(&mut capture.outside, &bind.buffer);
        }
        let (pipeline, group, params) = (pipeline.clone(), group.clone(), launch.params.to_vec());
        let grid = launch.grid;
        capture.commands.push(Command::Dispatch { pipeline, group, params, grid, seconds, live });
    });
}

/// The kernels just captured change these tensors, and will at every replay.
pub(super) fn changes(gpu: &Gpu, changed: &[Arc<Buffer>]) {
    with(gpu, |capture| {
        // What the step made itself is no tensor's any more in a replay.
        for buffer in changed.iter().filter(|buffer| !buffer.is_of(&capture.pool)) {
            push_once(&mut capture.changed, buffer);
        }
    });
}

fn push_once(list: &mut Vec<Arc<Buffer>>, buffer: &Arc<Buffer>) {
    if !list.iter().any(|b| Arc::ptr_eq(b, buffer)) {
        list.push(buffer.clone());
    }
}

impl Gpu {
    /// Every replay of what this thread captures now runs `hook` at this place; nothing when it does not capture.
    pub(crate) fn each_replay(&self, hook: impl Fn() + Send + 'static) {
        with(self, |capture| capture.commands.push(Command::Hook(Box::new(hook))));
    }

    /// Before every replay of what this thread captures now, `condition` is asked; where it fails nothing is run.
    pub(crate) fn before_replays(&self, condition: impl Fn() -> Result<()> + Send + 'static) {
        with(self, |capture| capture.conditions.push(Box::new(condition)));
    }

    /// The place among a step's rates of an optimizer that steps at `rate` now; 0 when this thread captures nothing.
    pub(crate) fn note_rate(&self, rate: f32) -> usize {
        let note = |capture: &mut Capture| {
            capture.rates.push(rate);
            capture.rates.len() - 1
        };
        with(self, note).unwrap_or(0)
    }

    /// Runs `work` and keeps what it launches on this device, in memory of `pool`.
    ///
    /// # Errors
    /// `work`'s, a capture inside a capture, or something in `work` that cannot be replayed.
    pub(crate) fn capture<T>(
        &self,
        (number, pool): (u64, Arc<Mutex<Pool>>),
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Capture)> {
        if CAPTURE.with_borrow(Option::is_some) {
            return Err(Error::config(
                "Step: a step recorded inside a step; record the inner code in the outer step",
            ));
        }
        CAPTURE.set(Some(Capture {
            gpu: self.clone(),
            number,
            commands: vec![],
            pool,
            outside: vec![],
            changed: vec![],
            results: vec![],
            refused: None,
            rates: vec![],
            conditions: vec![],
            draws: rng::Drawn::default(),
        }));
        let guard = Guard;
        rng::draw_from_here();
        let made = work()?;
        let mut capture = CAPTURE.take().expect("set above");
        capture.draws = rng::drawn();
        drop(guard);
        match capture.refused.take() {
            Some(error) => Err(error),
            None => Ok((made, capture)),
        }
    }
}

impl Capture {
    /// Tells where replays write the step's outputs.
    pub fn set_results(&mut self, results: Vec<Arc<Buffer>>) {
        self.results = results;
    }

    /// Where replays write the step's outputs; those that only give out a tensor from outside are not among them.
    pub fn results(&self) -> &[Arc<Buffer>] {
        &self.results
    }

    /// The rates of the recorded run.
    pub fn rates(&self) -> &[f32] {
        &self.rates
    }

    /// Dispatches of one replay.
    pub fn dispatches(&self) -> usize {
        self.commands.iter().filter(|c| matches!(c, Command::Dispatch { .. })).count()
    }

    /// Encodes all commands again, with optimizers stepping at `rates`.
    ///
    /// # Errors
    /// What a tensor from outside carries, that one is elsewhere now, a condition that does not hold, the device's fault. Then
    /// nothing is run, and no generator or optimizer goes on.
    pub fn replay(&self, rates: &[f32]) -> Result<()> {
        let gpu = &self.gpu;
        gpu.unchanged(|| {
            gpu.check()?;
            for buffer in self.outside.iter().chain(&self.changed) {
                buffer.data()?;
            }
            for buffer in self.outside.iter().chain(&self.changed).chain(&self.results) {
                if buffer.is_left() {
                    return Err(Error::config(
                        "Step: a parameter that it uses was taken by an optimizer after the recording and has its elements \
                         elsewhere; record the step again",
                    ));
                }
            }
            self.conditions.iter().try_for_each(|condition| condition())?;
            gpu.settle(&self.changed);
            // Written whole, whatever became of the last run.
            self.results.iter().for_each(|buffer| buffer.heal());
            self.encode(rates);
            self.changed.iter().chain(&self.results).for_each(|buffer| buffer.touch());
            Ok(())
        })
    }

    fn encode(&self, rates: &[f32]) {
        let gpu = &self.gpu;
        let shifts = self.draws.again();
        let mut recorder = lock(&gpu.0.recorder);
        // The batch in which it is noted what replays write; a long step is several.
        let mut noted = None;
        for command in &self.commands {
            match command {
                Command::Hook(hook) => hook(),
                Command::Texels { from, offset, bytes, texel, texture } => {
                    texel::copy(recorder.encoder(gpu), from, *offset, *bytes, *texel, texture);
                }
                Command::Dispatch { pipeline, group, params, grid, seconds, live } => {
                    let epoch = gpu.0.epoch.load(Ordering::Acquire);
                    if noted != Some(epoch) {
                        recorder.writes(self.changed.iter().chain(&self.results));
                        noted = Some(epoch);
                    }
                    let pass = recorder.pass(gpu);
                    pass.set_pipeline(&pipeline.raw);
                    pass.set_bind_group(0, group, &[]);
                    match live {
                        Some(live) => pass.set_immediates(0, &changed(params, live, rates, &shifts)),
                        None if params.is_empty() => {}
                        None => pass.set_immediates(0, params),
                    }
                    pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
                    recorder.dispatched(gpu, *seconds);
                }
            }
        }
    }
}

/// A kernel's parameters in a replay.
fn changed(params: &[u8], live: &Live, rates: &[f32], shifts: &rng::Shifts) -> Vec<u8> {
    let mut params = params.to_vec();
    match live {
        Live::Stream { at, generator } => {
            if let Some(stream) = shifts.stream(*generator, u64::from_le_bytes(words(&params, *at))) {
                let both: [[u32; 2]; 2] = [stream.key, stream.id];
                params[4 * at - 8..4 * at + 8].copy_from_slice(bytemuck::cast_slice(&both));
            }
        }
        Live::Numbers { at, make } => {
            let numbers = make(rates);
            params[4 * at..4 * (at + numbers.len())].copy_from_slice(bytemuck::cast_slice(&numbers));
        }
    }
    params
}

/// Two words from `at` on.
fn words(params: &[u8], at: usize) -> [u8; 8] {
    std::array::from_fn(|i| params[4 * at + i])
}
