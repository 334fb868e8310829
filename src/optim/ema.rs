//! Exponential moving averages of parameters, which are often better than the parameters themselves.

use super::StateTensor;
use super::arena::{CHUNK, Sizes, zeros};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::buffer::Buffer;
use crate::gpu::kernel::{self, Launch, Live, grid};
use crate::gpu::recording;
use crate::gpu::shader::Source;
use crate::gpu::value::Place;
use crate::shape::Shape;
use crate::tensor::Tensor;
use std::borrow::Borrow;
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Weak};

const OP: &str = "ema";
/// Names of the state in files. An optimizer's state has no such names.
const STATE: &str = "ema/";
const UPDATES: &str = "ema_updates";
/// The count of updates is saved as two numbers in this base, because f32 is exact to 2^24 only.
const BASE: u64 = 1 << 20;

/// An exponential moving average of every parameter. It begins with the parameters as they are, and each update is
///
/// ```text
/// e = d e + (1 - d) w,  with d = decay,  or with warm-up  d = min(decay, (1 + n) / (10 + n))  after n updates
/// ```
///
/// The averages lie in arenas of their own, as large as the parameters. An update is one dispatch for all parameters of an
/// optimizer's arena, and one for each tensor that is in none. It may be part of a recorded [`Step`](crate::Step), where every
/// replay updates and counts. A step of an optimizer that changes nothing, because a norm was not finite, is followed by an
/// update towards the unchanged parameters.
///
/// ```
/// # use tiebeam::{Gpu, Tensor, optim::{Ema, Group, Sgd, SgdConfig}};
/// # let gpu = Gpu::open()?;
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
/// let mut sgd = Sgd::new(&gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
/// let mut ema = Ema::new([("w", &w)], 0.5)?;
/// sgd.step(&w.sum_all().backward()?, 1.0)?; // w is [0, 1] now
/// ema.update()?;
/// let score = ema.averaged(|| w.detach().sum_all().item())?;
/// assert_eq!((score, w.to_vec::<f32>()?), (2.0, vec![0.0, 1.0]));
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// Source: Polyak, Juditsky 1992, "Acceleration of stochastic approximation by averaging", in the exponential form of PyTorch's
/// `AveragedModel` with `get_ema_multi_avg_fn`. The warm-up is TensorFlow's `ExponentialMovingAverage` with `num_updates`.
pub struct Ema {
    gpu: Gpu,
    decay: f64,
    warmup: bool,
    leaves: Vec<Leaf>,
    arenas: Vec<Arc<Buffer>>,
    /// Number of updates. Recorded steps share it, as their replays count too.
    updates: Arc<AtomicU64>,
    /// Whether the averages are in the parameters' places, and the parameters in theirs.
    swapped: bool,
    /// The places of the parameters for which `spans` was made.
    homes: Vec<(Weak<Buffer>, u64)>,
    /// The dispatches of an update.
    spans: Arc<Vec<Span>>,
}

struct Leaf {
    name: String,
    param: Tensor,
    average: Tensor,
    arena: usize,
}

/// Parameters of one buffer whose averages are in one arena.
struct Span {
    params: Weak<Buffer>,
    /// Bytes of the parameters' buffer up to the end of the last of them.
    bytes: u64,
    arena: usize,
    table: Arc<Buffer>,
    chunks: usize,
}

impl Ema {
    /// Copies the parameters as the first averages. They may be leaves of an optimizer, now or later, or any other f32 tensors
    /// that are changed in place. Those of a model are `Ema::new(model.parameters().trainable(), 0.999)`.
    ///
    /// # Errors
    /// When `decay` is not in `[0, 1)`, inside a recorded step, or when the device has failed.
    ///
    /// # Panics
    /// When there are no parameters, when one is not an f32 tensor with elements of its own or is on another device than the
    /// first, or when a name or tensor comes twice.
    #[track_caller]
    pub fn new<N: Into<String>, T: Borrow<Tensor>>(
        params: impl IntoIterator<Item = (N, T)>,
        decay: f64,
    ) -> Result<Ema> {
        super::rule::below_one(OP, "decay", decay)?;
        let params: Vec<(String, T)> = params.into_iter().map(|(name, x)| (name.into(), x)).collect();
        let params: Vec<(String, &Tensor)> =
            params.iter().map(|(name, x)| (name.clone(), x.borrow())).collect();
        assert!(!params.is_empty(), "{OP}: there are no parameters");
        let gpu = params[0].1.gpu().clone();
        gpu.check()?;
        recording::refuse(&gpu, "averages of parameters made")?;
        gpu.refuse_in_plan("averages of parameters made")?;
        let (mut names, mut values) = (HashSet::new(), HashSet::new());
        for (name, tensor) in &params {
            check_param(&gpu, name, tensor);
            tensor.check()?;
            assert!(names.insert(name), "{OP}: two parameters are named `{name}`");
            let new = values.insert(Arc::as_ptr(&tensor.value));
            assert!(new, "{OP}: `{name}` holds the elements of another parameter; list a tied weight once");
        }
        let mut sizes = Sizes::new(&gpu, None);
        let places: Vec<(usize, u64)> =
            params.iter().map(|(_, tensor)| sizes.place(tensor.count())).collect();
        let arenas: Vec<Arc<Buffer>> = sizes.bytes.iter().map(|&bytes| zeros(OP, &gpu, bytes)).collect();
        let leaf = |((name, param), (arena, offset)): ((String, &Tensor), (usize, u64))| {
            let buffer = arenas[arena].part(&gpu, DType::F32.buffer_bytes(param.count()));
            let average = Tensor::from_place(&gpu, *param.shape(), DType::F32, Place { buffer, offset });
            Leaf { name, param: param.detach(), average, arena }
        };
        let leaves: Vec<Leaf> = params.into_iter().zip(places).map(leaf).collect();
        let [from, to]: [Vec<&Tensor>; 2] = [
            leaves.iter().map(|leaf| &leaf.param).collect(),
            leaves.iter().map(|leaf| &leaf.average).collect(),
        ];
        gpu.fill_snapshot(&from, &to)?;
        Ok(Ema {
            gpu,
            decay,
            warmup: false,
            leaves,
            arenas,
            updates: Arc::default(),
            swapped: false,
            homes: Vec::new(),
            spans: Arc::default(),
        })
    }

    /// Sets whether early updates have a smaller decay, so that the averages forget the first parameters sooner. The default is
    /// not to.
    pub fn warmup(self, warmup: bool) -> Ema {
        Ema { warmup, ..self }
    }

    /// Moves the averages towards the parameters, usually after each step of the optimizer. It is recorded like an op.
    ///
    /// # Errors
    /// When a parameter or an average carries an error, or the device has failed. Then no average changes.
    ///
    /// # Panics
    /// When the averages are swapped in.
    #[track_caller]
    pub fn update(&mut self) -> Result<()> {
        assert!(!self.swapped, "{OP}: an update while the averages are swapped in; call swap before it");
        let gpu = self.gpu.clone();
        gpu.unchanged(|| {
            let updates = self.updates.clone();
            let rest = one_less(self.decay, self.warmup, updates.load(Relaxed));
            let homes = self.change("update", rest)?;
            gpu.note_reads(homes.iter().map(|home| &home.buffer));
            let count = move || {
                updates.fetch_add(1, Relaxed);
            };
            if gpu.plan_number().is_none() {
                count();
            }
            gpu.each_replay(count);
            Ok(())
        })
    }

    /// Exchanges parameters and averages: the model then computes with the averages. A second call restores the parameters, bit
    /// for bit. Do not step the optimizer in between. To keep the averages for good, swap once and drop this.
    ///
    /// A graph that saved a parameter cannot go backward after this. [`Ema::averaged`] cannot forget the second call.
    ///
    /// # Errors
    /// When a parameter or an average carries an error, inside a recorded step, or when the device has failed. Then nothing
    /// changes.
    pub fn swap(&mut self) -> Result<()> {
        recording::refuse(&self.gpu, "a swap of averages")?;
        self.gpu.refuse_in_plan("a swap of averages")?;
        let gpu = self.gpu.clone();
        gpu.unchanged(|| self.change("swap", 0.0))?;
        self.swapped = !self.swapped;
        Ok(())
    }

    /// Runs `work` with the averages in place of the parameters, such as an evaluation, and then restores the parameters, also
    /// if `work` fails or panics.
    ///
    /// # Errors
    /// The error of `work`, or as [`Ema::swap`].
    ///
    /// # Panics
    /// When the averages are swapped in already.
    #[track_caller]
    pub fn averaged<T>(&mut self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        struct Back<'a>(&'a mut Ema);
        impl Drop for Back<'_> {
            fn drop(&mut self) {
                // After a panic there is nobody to tell.
                let _ = if self.0.swapped { self.0.swap() } else { Ok(()) };
            }
        }
        assert!(!self.swapped, "{OP}: the averages are swapped in already; call swap before this");
        self.swap()?;
        let back = Back(self);
        let made = work();
        back.0.swap()?;
        made
    }

    /// Names and averages, in the order of the parameters, to be saved as weights or compared. They follow later updates;
    /// [`Tensor::copy`] keeps the present elements. While the averages are swapped in, they are in the parameters, and these
    /// tensors hold the parameters.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        self.leaves.iter().map(|leaf| (leaf.name.clone(), leaf.average.clone())).collect()
    }

    /// Number of updates.
    pub fn updates(&self) -> u64 {
        self.updates.load(Relaxed)
    }

    /// Returns the averages `ema/NAME` and the number of updates, to be saved beside an optimizer's state.
    ///
    /// # Errors
    /// When the averages are swapped in, an average carries an error, or the device has failed.
    pub fn state_dict(&self) -> Result<Vec<StateTensor>> {
        self.refuse_swapped("saved")?;
        self.leaves.iter().try_for_each(|leaf| leaf.average.check())?;
        let start = |arena: &Arc<Buffer>| self.gpu.start_read(arena, 0, arena.size);
        let (readings, updates) = self.gpu.unchanged(|| {
            let readings: Result<Vec<_>> = self.arenas.iter().map(start).collect();
            (readings, self.updates())
        });
        let elements: Vec<Vec<f32>> = readings?
            .into_iter()
            .map(|reading| Ok(bytemuck::pod_collect_to_vec(&reading.wait()?)))
            .collect::<Result<_>>()?;
        let average = |leaf: &Leaf| {
            let start = leaf.average.place().offset as usize / 4;
            let data = elements[leaf.arena][start..start + leaf.average.count()].to_vec();
            (format!("{STATE}{}", leaf.name), *leaf.average.shape(), data)
        };
        let count = vec![(updates % BASE) as f32, (updates / BASE) as f32];
        Ok(self.leaves.iter().map(average).chain([(UPDATES.into(), Shape::new(&[2]), count)]).collect())
    }

    /// Restores what [`Ema::state_dict`] returned, and takes it out of `state`, so that the rest is the optimizer's.
    ///
    /// # Errors
    /// When the averages are swapped in, or a part is missing or of another shape, or belongs to no parameter. The message names
    /// it, and nothing changes.
    pub fn load_state(&mut self, state: &mut Vec<StateTensor>) -> Result<()> {
        self.refuse_swapped("loaded")?;
        let wrong = |message: String| Error::config(format!("{OP}: {message}; it is another run's"));
        let find = |name: &str| {
            let found = state.iter().find(|(own, ..)| own == name);
            found.ok_or_else(|| wrong(format!("there is no state `{name}`")))
        };
        let mut writes: Vec<(Place, &[u8])> = Vec::new();
        for leaf in &self.leaves {
            let name = format!("{STATE}{}", leaf.name);
            let (_, shape, data) = find(&name)?;
            if shape != leaf.average.shape() || data.len() != shape.count() {
                let own = leaf.average.shape();
                return Err(wrong(format!("state `{name}` is {shape}, here it is {own}")));
            }
            writes.push((leaf.average.place(), bytemuck::cast_slice(data)));
        }
        let updates = match &find(UPDATES)?.2[..] {
            [low, high] if *low >= 0.0 && *high >= 0.0 => *low as u64 + BASE * *high as u64,
            other => return Err(wrong(format!("state `{UPDATES}` is {other:?}, no number of updates"))),
        };
        let own = |name: &str| {
            name.strip_prefix(STATE).map(|name| self.leaves.iter().any(|leaf| leaf.name == name))
        };
        if let Some((name, ..)) = state.iter().find(|(name, ..)| own(name) == Some(false)) {
            return Err(wrong(format!("state `{name}` belongs to no parameter here")));
        }
        self.gpu.unchanged(|| {
            self.gpu.overwrite_now(&writes)?;
            self.updates.store(updates, Relaxed);
            Ok::<_, Error>(())
        })?;
        state.retain(|(name, ..)| !name.starts_with(STATE) && name != UPDATES);
        Ok(())
    }

    fn refuse_swapped(&self, what: &str) -> Result<()> {
        match self.swapped {
            true => Err(Error::config(format!(
                "{OP}: averages that are swapped in cannot be {what}; call swap first"
            ))),
            false => Ok(()),
        }
    }

    /// Launches an entry of the kernel over all parameters, for callers inside [`Gpu::unchanged`], and returns where they are.
    fn change(&mut self, entry: &str, rest: f32) -> Result<Vec<Place>> {
        static SOURCE: LazyLock<Source> = LazyLock::new(|| Source::file("ema"));
        let gpu = self.gpu.clone();
        // What is not compiled yet may turn out to be lost. The buffer that is bound as a whole carries no error of its parts.
        gpu.compiled()?;
        let homes: Vec<Place> = self.leaves.iter().map(|leaf| leaf.param.place()).collect();
        homes.iter().try_for_each(|home| home.buffer.data().map(drop))?;
        let spans = self.spans(&homes);
        let (of, warmup, updates) = (self.decay, self.warmup, self.updates.clone());
        let live = move |_: &[f32]| vec![("rest", one_less(of, warmup, updates.load(Relaxed)))];
        let launch = |span: &Span| {
            let buffer = span.params.upgrade().expect("the places hold it");
            let params = kernel::Part::first(&buffer, span.bytes);
            let launch = Launch::new(OP, &SOURCE, entry, grid(span.chunks))
                .bind("chunks", kernel::Part::first(&span.table, 16 * span.chunks as u64))
                .bind_mut("e", kernel::Part::whole(&self.arenas[span.arena]))
                .set("count", span.chunks)
                .set("rest", rest)
                .turns(CHUNK / 256);
            match entry {
                "swap" => launch.bind_mut("x", params),
                _ => launch.bind("w", params).live(Live::Numbers(Arc::new(live.clone()))),
            }
        };
        let launches: Vec<Launch> = spans.iter().map(launch).collect();
        let mut changed: Vec<Arc<Buffer>> =
            self.leaves.iter().map(|leaf| leaf.average.place().buffer).collect();
        if entry == "swap" {
            changed.extend(homes.iter().map(|home| home.buffer.clone()));
        }
        gpu.change_now(&changed, &launches)?;
        Ok(homes)
    }

    /// Returns the dispatches for parameters at these places.
    fn spans(&mut self, homes: &[Place]) -> Arc<Vec<Span>> {
        let same = |(home, (buffer, offset)): (&Place, &(Weak<Buffer>, u64))| {
            std::ptr::eq(Arc::as_ptr(&home.buffer), buffer.as_ptr()) && home.offset == *offset
        };
        if self.homes.len() == homes.len() && homes.iter().zip(&self.homes).all(same) {
            return self.spans.clone();
        }
        let mut all: Vec<Rows> = Vec::new();
        for (leaf, home) in self.leaves.iter().zip(homes).filter(|(leaf, _)| leaf.param.count() > 0) {
            let root = home.buffer.root();
            let known = all.iter().position(|rows| Arc::ptr_eq(rows.root, root) && rows.arena == leaf.arena);
            let at = known.unwrap_or_else(|| {
                all.push(Rows { root, arena: leaf.arena, bytes: 0, rows: Vec::new() });
                all.len() - 1
            });
            all[at].add(home.offset, leaf);
        }
        let spans: Vec<Span> = all.into_iter().map(|rows| rows.span(&self.gpu)).collect();
        let (spans, made) = (Arc::new(spans), |span: &Span| span.table.data().is_ok());
        // If an upload failed, the table is made again next time.
        if spans.iter().all(made) {
            self.homes = homes.iter().map(|home| (Arc::downgrade(&home.buffer), home.offset)).collect();
            self.spans = spans.clone();
        }
        spans
    }
}

/// The chunks of a [`Span`] that is being made.
struct Rows<'a> {
    root: &'a Arc<Buffer>,
    arena: usize,
    bytes: u64,
    rows: Vec<[u32; 4]>,
}

impl Rows<'_> {
    /// Adds the chunks of a parameter that is `offset` bytes into the buffer.
    fn add(&mut self, offset: u64, leaf: &Leaf) {
        let count = leaf.param.count();
        self.bytes = self.bytes.max(offset + DType::F32.buffer_bytes(count));
        let [there, own] = [offset, leaf.average.place().offset].map(|offset| offset as usize / 4);
        let row = |start: usize| {
            [(there + start) as u32, (own + start) as u32, (count - start).min(CHUNK) as u32, 0]
        };
        self.rows.extend((0..count).step_by(CHUNK).map(row));
    }

    fn span(self, gpu: &Gpu) -> Span {
        let table: &[u8] = bytemuck::cast_slice(&self.rows);
        let table = gpu.upload(OP, table, table.len() as u64);
        let params = Arc::downgrade(self.root);
        Span { params, bytes: self.bytes, arena: self.arena, table, chunks: self.rows.len() }
    }
}

/// Returns 1 - decay after this many updates.
fn one_less(decay: f64, warmup: bool, updates: u64) -> f32 {
    let early = (1 + updates) as f64 / (10 + updates) as f64;
    let d = if warmup { decay.min(early) } else { decay };
    (1.0 - d) as f32
}

#[track_caller]
fn check_param(gpu: &Gpu, name: &str, tensor: &Tensor) {
    assert!(tensor.gpu() == gpu, "{OP}: `{name}` is on {:?}, the first parameter on {gpu:?}", tensor.gpu());
    assert!(tensor.dtype() == DType::F32, "{OP}: `{name}` is {}; averages are of f32", tensor.dtype());
    assert!(
        tensor.is_whole(),
        "{OP}: `{name}` is a view of a larger or permuted tensor; a parameter needs elements of its own"
    );
}
