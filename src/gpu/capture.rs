//! Recording what a thread launches, and encoding it again without the code that launched it.
//!
//! While a thread captures, its commands run as ever and are kept too. What kernels write comes from a pool of the capture's
//! own, so that nobody else is given memory that a replay writes; uploads come from the device's pool, because a replay does
//! not repeat them. What is bound from outside the own pool is held.

use super::buffer::{Buffer, Pool};
use super::kernel::{Bind, Pipeline};
use super::texel::{self, Texel};
use super::{Gpu, lock};
use crate::error::{Error, Result};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

/// The numbers of a kernel for this learning rate, or for the recorded one.
pub(crate) type Numbers = Arc<dyn Fn(Option<f32>) -> Vec<f32> + Send + Sync>;

/// What changes in a kernel's parameters from one replay to the next.
#[derive(Clone)]
pub(crate) enum Live {
    /// Words `at` and `at + 1` number a random stream, the words before them are its key.
    Stream { at: usize },
    /// The words from `at` on.
    Numbers { at: usize, make: Numbers },
}

enum Command {
    Dispatch {
        pipeline: Arc<Pipeline>,
        group: wgpu::BindGroup,
        params: Vec<u8>,
        grid: [u32; 3],
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
    commands: Vec<Command>,
    pool: Arc<Mutex<Pool>>,
    /// Buffers of other pools that replays read or write: from before, or uploaded in between.
    outside: Vec<Arc<Buffer>>,
    /// Those among them that are written.
    written: Vec<Arc<Buffer>>,
    refused: Option<Error>,
    /// How many streams a replay takes from each generator, by its key.
    spans: HashMap<[u32; 2], u64>,
    replays: u64,
}

thread_local! {
    static CAPTURE: RefCell<Option<Capture>> = const { RefCell::new(None) };
}

/// Ends the thread's capture even when the captured code panics.
struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        CAPTURE.take();
    }
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
pub(super) fn refuse(gpu: &Gpu, what: &str) -> Result<()> {
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
    binds: &[Bind],
    params: &[u8],
    grid: [u32; 3],
    live: Option<Live>,
) {
    with(gpu, |capture| {
        for bind in binds {
            if !bind.buffer.is_of(&capture.pool) {
                push_once(&mut capture.outside, &bind.buffer);
                if bind.write {
                    push_once(&mut capture.written, &bind.buffer);
                }
            }
        }
        let (pipeline, group, params) = (pipeline.clone(), group.clone(), params.to_vec());
        capture.commands.push(Command::Dispatch { pipeline, group, params, grid, live });
    });
}

fn push_once(list: &mut Vec<Arc<Buffer>>, buffer: &Arc<Buffer>) {
    if !list.iter().any(|b| Arc::ptr_eq(b, buffer)) {
        list.push(buffer.clone());
    }
}

fn word(params: &[u8], at: usize) -> u32 {
    bytemuck::pod_read_unaligned(&params[4 * at..4 * at + 4])
}

impl Gpu {
    /// Every replay of what this thread captures now runs `hook` at this place; nothing when it does not capture.
    pub(crate) fn each_replay(&self, hook: impl Fn() + Send + 'static) {
        with(self, |capture| capture.commands.push(Command::Hook(Box::new(hook))));
    }

    /// Runs `work` and keeps what it launches on this device.
    ///
    /// # Errors
    /// `work`'s, a capture inside a capture, or something in `work` that cannot be replayed.
    pub(crate) fn capture<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Capture)> {
        if CAPTURE.with_borrow(Option::is_some) {
            return Err(Error::config(
                "Step: a step recorded inside a step; record the inner code in the outer step",
            ));
        }
        CAPTURE.set(Some(Capture {
            gpu: self.clone(),
            commands: vec![],
            pool: Arc::default(),
            outside: vec![],
            written: vec![],
            refused: None,
            spans: HashMap::new(),
            replays: 0,
        }));
        let guard = Guard;
        let made = work()?;
        let mut capture = CAPTURE.take().expect("set above");
        drop(guard);
        if let Some(error) = capture.refused.take() {
            return Err(error);
        }
        capture.find_spans();
        Ok((made, capture))
    }
}

impl Capture {
    fn find_spans(&mut self) {
        let mut ranges: HashMap<[u32; 2], (u64, u64)> = HashMap::new();
        for command in &self.commands {
            if let Command::Dispatch { params, live: Some(Live::Stream { at }), .. } = command {
                let (key, id) = stream(params, *at);
                let range = ranges.entry(key).or_insert((id, id));
                *range = (range.0.min(id), range.1.max(id));
            }
        }
        self.spans = ranges.into_iter().map(|(key, (first, last))| (key, last - first + 1)).collect();
    }

    /// Dispatches of one replay.
    pub fn dispatches(&self) -> usize {
        self.commands.iter().filter(|c| matches!(c, Command::Dispatch { .. })).count()
    }

    /// Encodes all commands again.
    pub fn replay(&mut self, lr: Option<f32>) -> Result<()> {
        let gpu = self.gpu.clone();
        gpu.check()?;
        for buffer in &self.outside {
            buffer.data()?;
        }
        gpu.settle(&self.written);
        self.replays += 1;
        let mut recorder = lock(&gpu.0.recorder);
        for command in &self.commands {
            match command {
                Command::Hook(hook) => hook(),
                Command::Texels { from, offset, bytes, texel, texture } => {
                    texel::copy(recorder.encoder(&gpu), from, *offset, *bytes, *texel, texture);
                }
                Command::Dispatch { pipeline, group, params, grid, live } => {
                    let pass = recorder.pass(&gpu);
                    pass.set_pipeline(&pipeline.raw);
                    pass.set_bind_group(0, group, &[]);
                    match live {
                        Some(live) => pass.set_immediates(0, &self.changed(params, live, lr)),
                        None if params.is_empty() => {}
                        None => pass.set_immediates(0, params),
                    }
                    pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
                    recorder.dispatched(&gpu);
                }
            }
        }
        drop(recorder);
        self.written.iter().for_each(|buffer| buffer.touch());
        gpu.check()
    }

    fn changed(&self, params: &[u8], live: &Live, lr: Option<f32>) -> Vec<u8> {
        let mut params = params.to_vec();
        match live {
            Live::Stream { at } => {
                let (key, id) = stream(&params, *at);
                let id = id + self.replays * self.spans.get(&key).copied().unwrap_or(0);
                params[4 * at..4 * at + 8].copy_from_slice(&id.to_le_bytes());
            }
            Live::Numbers { at, make } => {
                let numbers = make(lr);
                params[4 * at..4 * (at + numbers.len())].copy_from_slice(bytemuck::cast_slice(&numbers));
            }
        }
        params
    }
}

fn stream(params: &[u8], at: usize) -> ([u32; 2], u64) {
    let id = word(params, at) as u64 | (word(params, at + 1) as u64) << 32;
    ([word(params, at - 2), word(params, at - 1)], id)
}

/// A pool that a buffer goes back to; gone with its owner.
pub(super) type Home = Weak<Mutex<Pool>>;
