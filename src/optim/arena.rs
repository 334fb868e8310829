//! Arenas hold all parameters one after the other, and their gradients and moments at the same offsets of other buffers.
//! A table of chunks lets one kernel process every tensor that has a gradient.

use super::StepInfo;
use super::events::{self, Log};
use super::group::Group;
use super::rule::{Plan, at_least_zero};
use super::taken::{self, Taken};
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::buffer::Buffer;
use crate::gpu::kernel::{self, Launch, Live, grid};
use crate::gpu::recording;
use crate::gpu::shader::Source;
use crate::gpu::value::Place;
use crate::shape::Shape;
use crate::tape::{ArenaLayout, ArenaPlace, Grads, Scaled, Scaling};
use crate::tensor::Tensor;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};

/// Alignment of tensors in an arena, in bytes. With it, every adapter can bind each of them.
const ALIGN: u64 = 256;
/// Elements per chunk, which one workgroup processes.
pub(super) const CHUNK: usize = 1024;
/// The largest arena: element numbers are 32 bits.
const MOST: u64 = 1 << 32;
/// The state of gradients without a loss scale: see `Scaling`.
pub(super) const UNSCALED: [f32; 4] = [1.0, 1.0, 0.0, 0.0];
/// The most tables that are kept. There is one for each set of parameters with a gradient, and a model has few such sets.
const TABLES: usize = 32;

pub(super) struct Arenas {
    pub(super) op: &'static str,
    pub(super) gpu: Gpu,
    /// The names of the moments in files.
    pub(super) moments: Vec<&'static str>,
    pub(super) arenas: Vec<Arena>,
    pub(super) leaves: Vec<Leaf>,
    /// The tables, keyed by which leaves have a gradient.
    tables: HashMap<Vec<bool>, Arc<Table>>,
    /// Number of the optimizer's steps. Recorded steps share it, as their replays count too.
    pub(super) steps: Arc<AtomicU64>,
    /// Number of steps that changed each leaf, if the update depends on it.
    pub(super) taken: Option<Taken>,
    /// What happened in the steps, written by the device.
    pub(super) log: Log,
    /// The scale of gradients without one.
    pub(super) unscaled: Scaled,
}

pub(super) struct Arena {
    pub layout: Arc<ArenaLayout>,
    params: Arc<Buffer>,
    pub moments: Vec<Arc<Buffer>>,
}

impl Drop for Arena {
    /// Lets another optimizer take the parameters.
    fn drop(&mut self) {
        self.layout.leave();
    }
}

pub(super) struct Leaf {
    pub name: String,
    pub tensor: Tensor,
    pub arena: usize,
    /// Offset in the arena, in bytes.
    offset: u64,
    /// The leaf's part of the arena's parameters.
    part: Option<Arc<Buffer>>,
    lr_scale: f32,
    weight_decay: f32,
}

struct Table {
    parts: Vec<Part>,
    /// The leaf of each chunk, in the order of the parts, and then each leaf once.
    leaves: Arc<Buffer>,
    chunks: usize,
    /// Number of leaves.
    present: usize,
}

/// The chunks of one arena's leaves.
struct Part {
    arena: usize,
    chunks: usize,
    /// Number of chunks in the parts before this one.
    first: usize,
    table: Arc<Buffer>,
}

impl Arenas {
    #[track_caller]
    pub fn new(gpu: &Gpu, groups: Vec<Group>, plan: &Plan) -> Result<Arenas> {
        let op = plan.op;
        gpu.check()?;
        recording::refuse(gpu, "an optimizer made")?;
        gpu.refuse_in_plan("an optimizer made")?;
        let mut leaves: Vec<Leaf> = Vec::new();
        let mut sizes = Sizes::new(gpu, plan.arena_limit);
        let (mut names, mut values) = (HashSet::new(), HashSet::new());
        for Group { params, weight_decay, lr_scale } in groups {
            at_least_zero(op, "weight decay", weight_decay.into())?;
            at_least_zero(op, "lr_scale", lr_scale.into())?;
            for (name, tensor) in params {
                check_leaf(op, gpu, &name, &tensor);
                tensor.check()?;
                assert!(names.insert(name.clone()), "{op}: two parameters are named `{name}`");
                assert!(
                    values.insert(Arc::as_ptr(&tensor.value)),
                    "{op}: `{name}` holds the elements of another parameter; list a tied weight once"
                );
                let (arena, offset) = sizes.place(tensor.count());
                leaves.push(Leaf { name, tensor, arena, offset, part: None, lr_scale, weight_decay });
            }
        }
        assert!(!leaves.is_empty(), "{op}: the groups hold no parameters");
        let arena = |bytes| Arena {
            layout: ArenaLayout::new(gpu, bytes),
            params: zeros(op, gpu, bytes),
            moments: plan.moments.iter().map(|_| zeros(op, gpu, bytes)).collect(),
        };
        let arenas: Vec<Arena> = sizes.bytes.into_iter().map(arena).collect();
        let log = zeros(op, gpu, Log::bytes(leaves.len()));
        log.spare();
        let [unscaled, own] = [(); 2].map(|()| Tensor::from_slice(gpu, &UNSCALED, [4]));
        unscaled.check()?;
        own.check()?;
        let scaling =
            Scaling { state: unscaled, growth: 1.0, backoff: 1.0, interval: 0, steps: AtomicU64::new(0) };
        let unscaled = Scaled { scaling: Arc::new(scaling), own, steps: 0 };
        let taken = plan.decays.map(|decays| Taken::new(op, gpu, leaves.len(), decays)).transpose()?;
        // Errors must show before any parameter moves: one that carries an error would be lost, and it may be the only
        // copy.
        leaves.iter().for_each(|leaf| leaf.tensor.compute());
        // Some show only when the driver has compiled the kernels.
        gpu.compiled()?;
        for arena in &arenas {
            arena.buffers().try_for_each(|buffer| buffer.data().map(drop))?;
        }
        log.data()?;
        leaves.iter().try_for_each(|leaf| leaf.tensor.check())?;
        for leaf in &leaves {
            let home = ArenaPlace { arena: arenas[leaf.arena].layout.clone(), offset: leaf.offset, step: 0 };
            assert!(
                leaf.tensor.edge.as_ref().is_some_and(|edge| edge.node.settle(home)),
                "{op}: `{}` belongs to another optimizer; drop that one first, or make a new leaf with \
                 detach().requires_grad()",
                leaf.name
            );
        }
        // This must not happen during another thread's replay, which may still change the parameters in their old place.
        gpu.unchanged(|| {
            for leaf in &mut leaves {
                let part = arenas[leaf.arena].params.part(gpu, DType::F32.buffer_bytes(leaf.tensor.count()));
                leaf.tensor.value.move_to(&Place { buffer: part.clone(), offset: leaf.offset });
                leaf.part = Some(part);
            }
        });
        let log = Log::new(log, leaves.iter().map(|leaf| leaf.name.clone()).collect());
        Ok(Arenas {
            op,
            gpu: gpu.clone(),
            moments: plan.moments.iter().map(|[name, _]| *name).collect(),
            arenas,
            leaves,
            tables: HashMap::new(),
            steps: Arc::default(),
            taken,
            log,
            unscaled,
        })
    }

    /// Bytes of the moments, without the gaps between them.
    pub fn state_bytes(&self) -> usize {
        self.moments.len() * self.leaves.iter().map(|leaf| 4 * leaf.tensor.count()).sum::<usize>()
    }

    pub fn steps(&self) -> u64 {
        self.steps.load(Relaxed)
    }

    #[track_caller]
    pub fn step(&mut self, grads: &Grads, lr: f32, plan: &Plan) -> Result<StepInfo> {
        let gpu = self.gpu.clone();
        gpu.check()?;
        let mut present = Vec::with_capacity(self.leaves.len());
        // A loop, because a closure would hide the caller's line.
        for leaf in &self.leaves {
            present.push(self.has_gradient(leaf, grads));
        }
        assert!(
            present.contains(&true),
            "{}: none of the {} parameters has a gradient; was the loss computed from them?",
            self.op,
            present.len()
        );
        // Counts and kernels must belong together, even while other threads replay steps of this optimizer.
        gpu.unchanged(|| self.step_now(present, grads, lr, plan))
    }

    fn step_now(&mut self, present: Vec<bool>, grads: &Grads, lr: f32, plan: &Plan) -> Result<StepInfo> {
        let gpu = self.gpu.clone();
        let table = self.table(&present);
        let partials = self.partials(grads, &table)?;
        let norm = gpu.alloc("grad_norm", 16);
        let Scaled { scaling, own, .. } = grads.scaled().unwrap_or(&self.unscaled);
        let finish = self
            .finish(&table, plan.clip.unwrap_or(0.0), scaling)
            .bind_mut("partials", kernel::Part::whole(&partials))
            .bind_mut("y", kernel::Part::whole(&norm))
            .bind_mut("journal", kernel::Part::whole(&self.log.buffer))
            .bind_mut("scale", &scaling.state)
            .bind("own", own)
            .bind("leaves", kernel::Part::whole(&table.leaves));
        let rate = gpu.note_rate(lr);
        let updates = table.parts.iter().map(|part| {
            let live = Live::Numbers(Arc::new(move |rates: &[f32]| vec![("lr", rates[rate])]));
            self.update(&table, part, grads, &norm, plan).set("lr", lr).live(live)
        });
        let launches: Vec<Launch> = std::iter::once(finish).chain(updates).collect();
        let mut changed: Vec<Arc<Buffer>> = vec![scaling.state.place().buffer];
        changed.extend(self.taken.as_ref().map(|taken| taken.buffer.clone()));
        for (leaf, _) in self.leaves.iter().zip(&present).filter(|(_, here)| **here) {
            changed.extend(leaf.part.clone());
        }
        for part in &table.parts {
            changed.extend(self.arenas[part.arena].moments.iter().cloned());
        }
        gpu.change_now(&changed, &launches)?;
        drop(launches);
        self.count(scaling);
        let norm = Tensor::from_place(&gpu, Shape::new(&[]), DType::F32, Place { buffer: norm, offset: 0 });
        Ok(StepInfo { norm })
    }

    /// Returns the launch that joins the norm and counts the step, without the bindings of the norm.
    fn finish(&self, table: &Table, clip: f32, scaling: &Scaling) -> Launch<'static> {
        let words = events::words(self.leaves.len());
        let turns = table.chunks / 1024 + 4 + table.chunks / 256 + 1 + words;
        let numbers = Norm {
            chunks: table.chunks,
            clip,
            words,
            interval: scaling.interval,
            factors: [scaling.growth, scaling.backoff],
            ..Norm::default()
        };
        match &self.taken {
            None => numbers.launch(norm_source(), "finish", [1; 3], turns),
            Some(taken) => {
                let turns = turns + taken::turns(table.present);
                let numbers = Norm { present: table.present, ..numbers };
                taken.bind(numbers.launch(counting_source(), "finish", [1; 3], turns))
            }
        }
    }

    /// Returns the launch that updates the leaves of a part, without the learning rate.
    fn update<'a>(
        &self,
        table: &Table,
        part: &Part,
        grads: &Grads,
        norm: &Arc<Buffer>,
        plan: &'a Plan,
    ) -> Launch<'a> {
        let arena = &self.arenas[part.arena];
        let mut launch = Launch::new(self.op, &plan.source, plan.entry, grid(part.chunks))
            .bind("chunks", part.rows())
            .bind("norm", kernel::Part::whole(norm))
            .bind("g", arena.gradients(grads))
            .bind_mut("w", arena.whole(&arena.params))
            .set("count", part.chunks)
            .turns(CHUNK / 256);
        for ([_, name], buffer) in plan.moments.iter().zip(&arena.moments) {
            launch = launch.bind_mut(*name, arena.whole(buffer));
        }
        if let Some(taken) = &self.taken {
            launch = launch.bind("leaves", kernel::Part::whole(&table.leaves)).bind("taken", taken.whole());
            launch = launch.set("first", part.first);
        }
        plan.numbers.iter().fold(launch, |launch, (name, x)| launch.set(*name, *x))
    }

    /// Counts this step, and each of its replays.
    fn count(&self, scaling: &Arc<Scaling>) {
        let (steps, scaling) = (self.steps.clone(), scaling.clone());
        let count = move || {
            steps.fetch_add(1, Relaxed);
            scaling.steps.fetch_add(1, Relaxed);
        };
        if self.gpu.plan_number().is_none() {
            count();
        }
        self.gpu.each_replay(count);
    }

    #[track_caller]
    fn has_gradient(&self, leaf: &Leaf, grads: &Grads) -> bool {
        let layout = &self.arenas[leaf.arena].layout;
        let here = |place: &Place, buffer| place.offset == leaf.offset && Arc::ptr_eq(&place.buffer, buffer);
        let part = leaf.part.as_ref().expect("every leaf has moved in");
        assert!(
            leaf.tensor.value.computed().is_some_and(|place| here(&place, part)),
            "{}: another optimizer has taken the elements of `{}` since",
            self.op,
            leaf.name
        );
        let Some(gradient) = grads.get(&leaf.tensor) else { return false };
        let home = grads.arena(layout);
        assert!(
            home.is_some_and(|home| gradient.value.computed().is_some_and(|place| here(&place, home))),
            "{}: the gradient of `{}` was computed before this optimizer was made; call backward after",
            self.op,
            leaf.name
        );
        true
    }

    /// Computes the sums of squares of all chunks.
    fn partials(&self, grads: &Grads, table: &Table) -> Result<Arc<Buffer>> {
        let partials = self.gpu.alloc("grad_norm", DType::F32.buffer_bytes(table.chunks));
        for part in &table.parts {
            let numbers = Norm { chunks: part.chunks, first: part.first, ..Norm::default() };
            let launch = numbers
                .launch(norm_source(), "sum_chunks", grid(part.chunks), CHUNK / 256)
                .bind("chunks", part.rows())
                .bind("g", self.arenas[part.arena].gradients(grads));
            self.gpu.launch(launch.bind_mut("partials", kernel::Part::whole(&partials)));
        }
        partials.data()?;
        Ok(partials)
    }

    fn table(&mut self, present: &[bool]) -> Arc<Table> {
        if let Some(table) = self.tables.get(present) {
            return table.clone();
        }
        let (mut parts, mut numbers) = (Vec::new(), Vec::new());
        let mut first = 0;
        for arena in 0..self.arenas.len() {
            let all = self.leaves.iter().enumerate();
            let leaves: Vec<_> = all.filter(|(i, leaf)| leaf.arena == arena && present[*i]).collect();
            let rows: Vec<[u32; 4]> = leaves.iter().flat_map(|(_, leaf)| leaf.chunks()).collect();
            numbers.extend(leaves.iter().flat_map(|(i, leaf)| leaf.chunks().map(move |_| *i as u32)));
            if !rows.is_empty() {
                let bytes: &[u8] = bytemuck::cast_slice(&rows);
                let table = self.gpu.upload(self.op, bytes, bytes.len() as u64);
                parts.push(Part { arena, chunks: rows.len(), first, table });
                first += rows.len();
            }
        }
        numbers.extend((0..present.len()).filter(|&leaf| present[leaf]).map(|leaf| leaf as u32));
        let bytes: &[u8] = bytemuck::cast_slice(&numbers);
        let leaves = self.gpu.upload(self.op, bytes, DType::U32.buffer_bytes(numbers.len()));
        let table = Arc::new(Table { parts, leaves, chunks: first, present: numbers.len() - first });
        if self.tables.len() >= TABLES {
            self.tables.clear();
        }
        // If an upload failed, the table is recomputed next time.
        if table.leaves.data().is_ok() && table.parts.iter().all(|part| part.table.data().is_ok()) {
            self.tables.insert(present.to_vec(), table.clone());
        }
        table
    }
}

impl Arena {
    /// The buffers that an update writes.
    fn buffers(&self) -> impl Iterator<Item = &Arc<Buffer>> {
        std::iter::once(&self.params).chain(&self.moments)
    }

    /// A buffer of this arena, over the arena's whole size.
    fn whole(&self, buffer: &Arc<Buffer>) -> kernel::Part {
        kernel::Part::first(buffer, self.layout.bytes)
    }

    fn gradients(&self, grads: &Grads) -> kernel::Part {
        self.whole(grads.arena(&self.layout).expect("a leaf of this arena has a gradient"))
    }
}

impl Part {
    /// The table of the chunks' places and settings.
    fn rows(&self) -> kernel::Part {
        kernel::Part::first(&self.table, 16 * self.chunks as u64)
    }
}

impl Leaf {
    /// The range of the leaf's elements in the arena.
    pub(super) fn range(&self) -> std::ops::Range<usize> {
        let start = self.offset as usize / 4;
        start..start + self.tensor.count()
    }

    fn chunks(&self) -> impl Iterator<Item = [u32; 4]> {
        let range = self.range();
        let settings = [self.lr_scale.to_bits(), self.weight_decay.to_bits()];
        range
            .clone()
            .step_by(CHUNK)
            .map(move |start| [start as u32, (range.end - start).min(CHUNK) as u32, settings[0], settings[1]])
    }
}

/// The sizes of arenas that are being filled, in bytes.
pub(super) struct Sizes {
    pub bytes: Vec<u64>,
    most: u64,
}

impl Sizes {
    /// No tensor yet, and arenas of at most `limit` bytes.
    pub fn new(gpu: &Gpu, limit: Option<u64>) -> Sizes {
        let device = gpu.limits().max_storage_buffer_binding_size.min(gpu.limits().max_buffer_size);
        Sizes { bytes: vec![0], most: limit.unwrap_or(MOST).min(MOST).min(device) }
    }

    /// Returns the arena of the next tensor, and its offset there in bytes.
    pub fn place(&mut self, elements: usize) -> (usize, u64) {
        let bytes = DType::F32.buffer_bytes(elements);
        let mut offset = self.bytes[self.bytes.len() - 1].next_multiple_of(ALIGN);
        if offset > 0 && offset + bytes > self.most {
            self.bytes.push(0);
            offset = 0;
        }
        let arena = self.bytes.len() - 1;
        self.bytes[arena] = offset + bytes;
        (arena, offset)
    }
}

#[track_caller]
fn check_leaf(op: &str, gpu: &Gpu, name: &str, tensor: &Tensor) {
    assert!(tensor.gpu() == gpu, "{op}: `{name}` is on {:?}, the optimizer on {gpu:?}", tensor.gpu());
    assert!(tensor.is_leaf(), "{op}: `{name}` is no leaf; mark parameters with requires_grad");
    assert!(
        tensor.dtype() == DType::F32,
        "{op}: `{name}` is {}; parameters are trained in f32, cast before requires_grad",
        tensor.dtype()
    );
    assert!(
        tensor.is_whole(),
        "{op}: `{name}` is a view of a larger or permuted tensor; a parameter needs elements of its own"
    );
}

/// Makes a buffer of zeros, so that the gaps between the tensors of an arena are defined too.
pub(super) fn zeros(op: &'static str, gpu: &Gpu, bytes: u64) -> Arc<Buffer> {
    let buffer = gpu.alloc(op, bytes);
    let shape = Shape::new(&[bytes as usize / 4]);
    let whole = Tensor::from_place(gpu, shape, DType::F32, Place { buffer: buffer.clone(), offset: 0 });
    Tensor::zeros(gpu, shape).write_to(op, &whole, false);
    buffer
}

/// The parameters of `grad_norm`, over all chunks of a part or, for `finish`, of all parts.
#[derive(Default)]
struct Norm {
    chunks: usize,
    first: usize,
    clip: f32,
    words: usize,
    interval: u32,
    /// Growth and backoff of the scale.
    factors: [f32; 2],
    present: usize,
}

impl Norm {
    fn launch(
        self,
        source: &'static Source,
        entry: &'static str,
        grid: [u32; 3],
        turns: usize,
    ) -> Launch<'static> {
        let [growth, backoff] = self.factors;
        Launch::new("grad_norm", source, entry, grid)
            .set("count", self.chunks)
            .set("first", self.first)
            .set("clip", self.clip)
            .set("leaf_words", self.words)
            .set("interval", self.interval)
            .set("growth", growth)
            .set("backoff", backoff)
            .set("inverse_growth", growth.recip())
            .set("inverse_backoff", backoff.recip())
            .set("present", self.present)
            .turns(turns)
    }
}

fn norm_source() -> &'static Source {
    static SOURCE: LazyLock<Source> = LazyLock::new(|| Source::file("grad_norm"));
    &SOURCE
}

/// The source of a norm that also counts the steps of each leaf.
fn counting_source() -> &'static Source {
    static SOURCE: LazyLock<Source> = LazyLock::new(|| norm_source().clone().slot("count", "count_unbias"));
    &SOURCE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::kernel::Launch;
    use crate::gpu::shader::Source;
    use crate::optim::{AdamW, AdamWConfig};

    /// A parameter whose kernel the driver refuses is found before any other moves.
    #[test]
    fn errors_show_before_any_parameter_moves() {
        let gpu = Gpu::open().unwrap();
        let text = "@group(0) @binding(0) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(8192)
fn main(@builtin(global_invocation_id) id: vec3<u32>) { y[id.x % 2u] = 1.0; }
";
        let source = Source::text("impossible", text.to_string());
        let good = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
        let bad = Tensor::empty(&gpu, "test", [2], DType::F32);
        let held = gpu.hold_compiler();
        gpu.launch(Launch::new("test", &source, "main", [1; 3]).bind_mut("y", &bad).turns(0));
        let bad = bad.requires_grad();
        let before = good.place();
        let groups = || vec![Group::new([("good", &good), ("bad", &bad)])];
        // The driver refuses only while the optimizer is made.
        let later = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(200));
            drop(held);
        });
        let error = AdamW::new(&gpu, groups(), AdamWConfig::default()).map(drop).unwrap_err();
        later.join().unwrap();
        assert!(error.to_string().contains("impossible (test)"), "{error}");
        assert!(gpu.take_fault().is_some());
        assert!(Arc::ptr_eq(&good.place().buffer, &before.buffer), "the parameters are unchanged");
        assert_eq!(good.to_vec::<f32>().unwrap(), [1.0, 2.0]);
        AdamW::new(&gpu, vec![Group::new([("good", &good)])], AdamWConfig::default()).unwrap();
    }
}
