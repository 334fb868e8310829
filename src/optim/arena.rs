//! Arenas: all parameters one after the other, their gradients and moments at the same offsets of other buffers, and a
//! table of chunks by which one kernel walks every tensor that has a gradient.

use super::{Group, StateTensor, StepInfo, at_least_zero};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::buffer::Buffer;
use crate::gpu::capture::Live;
use crate::gpu::fuse::{Place, Target};
use crate::gpu::kernel::{Bind, Launch, grid};
use crate::gpu::shader::Source;
use crate::shape::Shape;
use crate::tape::{ArenaLayout, Grads, Home};
use crate::tensor::Tensor;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Alignment of tensors in an arena: enough to bind one on every adapter.
const ALIGN: u64 = 256;
/// Elements that one workgroup walks.
const CHUNK: usize = 1024;
/// The largest arena: element numbers are 32 bits.
const MOST: u64 = 1 << 32;
/// Sets of parameters with a gradient whose tables are kept; a model has few.
const TABLES: usize = 32;

pub(super) struct Arenas {
    op: &'static str,
    gpu: Gpu,
    moments: &'static [&'static str],
    arenas: Vec<Arena>,
    leaves: Vec<Leaf>,
    /// By which leaves have a gradient.
    tables: HashMap<Vec<bool>, Arc<Table>>,
    /// Shared with recorded steps, whose replays count too.
    steps: Arc<AtomicU64>,
}

struct Arena {
    layout: Arc<ArenaLayout>,
    params: Arc<Buffer>,
    moments: Vec<Arc<Buffer>>,
}

struct Leaf {
    name: String,
    tensor: Tensor,
    arena: usize,
    /// In bytes.
    offset: u64,
    lr_scale: f32,
    weight_decay: f32,
}

struct Table {
    parts: Vec<Part>,
    chunks: usize,
    /// A sum of squares for every chunk.
    partials: Arc<Buffer>,
}

/// The chunks of one arena.
struct Part {
    arena: usize,
    chunks: usize,
    /// Chunks of the parts before this one.
    first: usize,
    table: Arc<Buffer>,
}

/// The numbers of an update at a learning rate and at the step that it is, counted from 1.
pub(super) type Numbers = Arc<dyn Fn(f32, u64) -> Vec<f32> + Send + Sync>;

/// The update of one optimizer: its numbers follow the grid's width and the count of chunks in the parameters.
pub(super) struct Kernel<'a> {
    pub source: &'a Source,
    pub entry: &'a str,
    pub lr: f32,
    pub numbers: Numbers,
}

impl Arenas {
    #[track_caller]
    pub fn new(
        op: &'static str,
        gpu: &Gpu,
        groups: Vec<Group>,
        moments: &'static [&'static str],
        limit: Option<u64>,
    ) -> Result<Arenas> {
        gpu.check()?;
        let device = gpu.limits().max_storage_buffer_binding_size.min(gpu.limits().max_buffer_size);
        let most = limit.unwrap_or(MOST).min(MOST).min(device);
        let mut leaves: Vec<Leaf> = Vec::new();
        let mut sizes = vec![0u64];
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
                let bytes = DType::F32.buffer_bytes(tensor.count());
                let mut offset = sizes[sizes.len() - 1].next_multiple_of(ALIGN);
                if offset > 0 && offset + bytes > most {
                    sizes.push(0);
                    offset = 0;
                }
                let arena = sizes.len() - 1;
                sizes[arena] = offset + bytes;
                leaves.push(Leaf { name, tensor, arena, offset, lr_scale, weight_decay });
            }
        }
        assert!(!leaves.is_empty(), "{op}: the groups hold no parameters");
        let arena = |bytes| Arena {
            layout: Arc::new(ArenaLayout { gpu: gpu.clone(), bytes }),
            params: zeros(op, gpu, bytes),
            moments: moments.iter().map(|_| zeros(op, gpu, bytes)).collect(),
        };
        let arenas: Vec<Arena> = sizes.into_iter().map(arena).collect();
        // Before any parameter moves in: one that carries an error would spoil what is beside it.
        for arena in &arenas {
            arena.buffers().try_for_each(|buffer| buffer.data().map(drop))?;
        }
        for leaf in &leaves {
            let Arena { layout, params, .. } = &arenas[leaf.arena];
            let home = Home { arena: layout.clone(), offset: leaf.offset, step: 0 };
            assert!(
                leaf.tensor.edge.as_ref().is_some_and(|edge| edge.node.settle(home)),
                "{op}: `{}` belongs to another optimizer; make a new leaf with detach().requires_grad()",
                leaf.name
            );
            settle_in(&leaf.tensor, &Place { buffer: params.clone(), offset: leaf.offset });
        }
        gpu.check()?;
        Ok(Arenas {
            op,
            gpu: gpu.clone(),
            moments,
            arenas,
            leaves,
            tables: HashMap::new(),
            steps: Arc::default(),
        })
    }

    /// Of moments, every stored element once each.
    pub fn state_bytes(&self) -> usize {
        self.moments.len() * self.leaves.iter().map(|leaf| 4 * leaf.tensor.count()).sum::<usize>()
    }

    pub fn steps(&self) -> u64 {
        self.steps.load(Relaxed)
    }

    #[track_caller]
    pub fn step(&mut self, grads: &Grads, clip: Option<f32>, kernel: &Kernel) -> Result<StepInfo> {
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
        let table = self.table(present);
        // Nothing is changed by an update that could not be made whole.
        for part in &table.parts {
            let arena = &self.arenas[part.arena];
            let gradients = arena.gradients(2, grads).buffer;
            arena.buffers().chain([&gradients]).try_for_each(|buffer| buffer.data().map(drop))?;
        }
        let norm = self.norm(grads, &table, clip);
        norm.data()?;
        let changed: Vec<_> = table.parts.iter().map(|part| self.arenas[part.arena].params.clone()).collect();
        gpu.settle(&changed);
        let numbers = (kernel.numbers)(kernel.lr, self.steps() + 1);
        for part in &table.parts {
            let arena = &self.arenas[part.arena];
            let grid = grid(part.chunks);
            let mut params = vec![grid[0], part.chunks as u32];
            params.extend(numbers.iter().map(|x| x.to_bits()));
            let mut binds = vec![
                part.bind(0),
                bind(1, &norm, 16, false),
                arena.gradients(2, grads),
                arena.bind(3, &arena.params),
            ];
            binds.extend((4..).zip(&arena.moments).map(|(binding, buffer)| arena.bind(binding, buffer)));
            let launch = Launch {
                op: self.op,
                source: kernel.source,
                entry: kernel.entry,
                binds,
                params: bytemuck::cast_slice(&params),
                grid,
                turns: CHUNK / 256,
                reuse: 1,
            };
            let (numbers, steps, lr) = (kernel.numbers.clone(), self.steps.clone(), kernel.lr);
            let make = Arc::new(move |new: Option<f32>| numbers(new.unwrap_or(lr), steps.load(Relaxed) + 1));
            gpu.launch_live(launch, Some(Live::Numbers { at: 2, make }));
            arena.params.touch();
        }
        gpu.check()?;
        self.steps.fetch_add(1, Relaxed);
        let steps = self.steps.clone();
        gpu.each_replay(move || {
            steps.fetch_add(1, Relaxed);
        });
        let norm = Tensor::from_place(&gpu, Shape::new(&[]), DType::F32, Place { buffer: norm, offset: 0 });
        Ok(StepInfo { norm })
    }

    #[track_caller]
    fn has_gradient(&self, leaf: &Leaf, grads: &Grads) -> bool {
        let Arena { layout, params, .. } = &self.arenas[leaf.arena];
        let here = |place: &Place, buffer| place.offset == leaf.offset && Arc::ptr_eq(&place.buffer, buffer);
        assert!(
            leaf.tensor.value.computed().is_some_and(|place| here(&place, params)),
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

    /// The norm of all gradients and the factor that clips them, in a new buffer.
    fn norm(&self, grads: &Grads, table: &Table, clip: Option<f32>) -> Arc<Buffer> {
        let partials = || bind(2, &table.partials, DType::F32.buffer_bytes(table.chunks), true);
        let launch = |entry: &'static str, binds, grid: [u32; 3], count: usize, first: usize| {
            let params = [grid[0], count as u32, first as u32, clip.unwrap_or(0.0).to_bits()];
            self.gpu.launch(Launch {
                op: "grad_norm",
                source: &norm_source(),
                entry,
                binds,
                params: bytemuck::cast_slice(&params),
                grid,
                // Of a chunk, or of all chunks, which one workgroup adds up.
                turns: (CHUNK / 256).max(count / 1024 + 4),
                reuse: 1,
            });
        };
        for part in &table.parts {
            let binds = vec![part.bind(0), self.arenas[part.arena].gradients(1, grads), partials()];
            launch("sum_chunks", binds, grid(part.chunks), part.chunks, part.first);
        }
        let norm = self.gpu.alloc("grad_norm", 16);
        launch("finish", vec![partials(), bind(3, &norm, 16, true)], [1, 1, 1], table.chunks, 0);
        norm
    }

    fn table(&mut self, present: Vec<bool>) -> Arc<Table> {
        if let Some(table) = self.tables.get(&present) {
            return table.clone();
        }
        let mut parts = Vec::new();
        let mut first = 0;
        for arena in 0..self.arenas.len() {
            let leaves =
                self.leaves.iter().zip(&present).filter(|(leaf, here)| leaf.arena == arena && **here);
            let rows: Vec<[u32; 4]> = leaves.flat_map(|(leaf, _)| leaf.chunks()).collect();
            if !rows.is_empty() {
                let bytes: &[u8] = bytemuck::cast_slice(&rows);
                let table = self.gpu.upload(self.op, bytes, bytes.len() as u64);
                parts.push(Part { arena, chunks: rows.len(), first, table });
                first += rows.len();
            }
        }
        let partials = self.gpu.alloc("grad_norm", DType::F32.buffer_bytes(first));
        let table = Arc::new(Table { parts, chunks: first, partials });
        if self.tables.len() >= TABLES {
            self.tables.clear();
        }
        self.tables.insert(present, table.clone());
        table
    }

    /// Every moment of every leaf, named `MOMENT/LEAF`.
    pub fn state_dict(&self) -> Result<Vec<StateTensor>> {
        let mut state = Vec::new();
        for (index, moment) in self.moments.iter().enumerate() {
            let read = |arena: &Arena| -> Result<Vec<f32>> {
                Ok(bytemuck::pod_collect_to_vec(&self.gpu.read(
                    &arena.moments[index],
                    0,
                    arena.layout.bytes,
                )?))
            };
            let elements = self.arenas.iter().map(read).collect::<Result<Vec<_>>>()?;
            state.extend(self.leaves.iter().map(|leaf| {
                let data = elements[leaf.arena][leaf.range()].to_vec();
                (format!("{moment}/{}", leaf.name), *leaf.tensor.shape(), data)
            }));
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
        if let Some(name) = given.keys().min() {
            return Err(wrong(format!("state `{name}` belongs to no parameter here; it is another model's")));
        }
        for (index, image) in images.iter().enumerate() {
            for (arena, elements) in self.arenas.iter().zip(image) {
                self.gpu.overwrite(&arena.moments[index], 0, bytemuck::cast_slice(elements))?;
            }
        }
        self.steps.store(steps, Relaxed);
        Ok(())
    }
}

impl Arena {
    /// What an update writes.
    fn buffers(&self) -> impl Iterator<Item = &Arc<Buffer>> {
        std::iter::once(&self.params).chain(&self.moments)
    }

    fn bind(&self, binding: u32, buffer: &Arc<Buffer>) -> Bind {
        bind(binding, buffer, self.layout.bytes, true)
    }

    fn gradients(&self, binding: u32, grads: &Grads) -> Bind {
        let buffer = grads.arena(&self.layout).expect("a leaf of this arena has a gradient");
        bind(binding, buffer, self.layout.bytes, false)
    }
}

impl Part {
    fn bind(&self, binding: u32) -> Bind {
        bind(binding, &self.table, 16 * self.chunks as u64, false)
    }
}

impl Leaf {
    /// Where the elements are in the arena, in elements.
    fn range(&self) -> std::ops::Range<usize> {
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

fn bind(binding: u32, buffer: &Arc<Buffer>, size: u64, write: bool) -> Bind {
    Bind { binding, buffer: buffer.clone(), offset: 0, size, write }
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
        tensor.is_contiguous() && tensor.offset == 0 && tensor.count() == tensor.value.count,
        "{op}: `{name}` is a view of a larger or permuted tensor; a parameter needs elements of its own"
    );
}

/// A buffer of zeros: what lies between the tensors of an arena is defined, too.
fn zeros(op: &'static str, gpu: &Gpu, bytes: u64) -> Arc<Buffer> {
    let buffer = gpu.alloc(op, bytes);
    let place = Place { buffer: buffer.clone(), offset: 0 };
    Tensor::zeros(gpu, [bytes as usize / 4]).value.realize(Some(Target { place, accumulate: false }));
    buffer
}

/// Moves a leaf's elements to `place`; every tensor that shares them follows.
fn settle_in(leaf: &Tensor, place: &Place) {
    let target = || Some(Target { place: place.clone(), accumulate: false });
    let made = leaf.value.realize(target());
    if !Arc::ptr_eq(&made.buffer, &place.buffer) {
        Tensor::lazy("parameters", "$0", DType::F32, *leaf.shape(), &[leaf]).value.realize(target());
        leaf.value.rebase(place.clone());
    }
}

fn norm_source() -> Source {
    Source::file("grad_norm")
}

pub(super) fn variants() -> Vec<Source> {
    vec![norm_source()]
}
