//! Checkpoints: a model's parameters, its optimizer's state and the run's position, in one safetensors file.
//!
//! Parameters keep their own names, so any program that reads safetensors finds the weights. The optimizer's state has names
//! under `optimizer/`, and the rest is in the header's metadata. A run that is stopped and resumed gives the same bits as one
//! that was not stopped.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::{Entry, File, FileDType, save};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::rng::Rng;
use crate::setters::setters;
use crate::shape::{MAX_AXES, Shape};
use crate::tensor::Tensor;

pub(crate) const OPTIMIZER: &str = "optimizer/";
const RESERVED: &str = "tiebeam.";
const FORMAT: &str = "tiebeam.checkpoint";
const STEP: &str = "tiebeam.step";
const RNG: &str = "tiebeam.rng";
const VERSION: &str = "1";

/// The state of a run apart from the parameters.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Checkpoint {
    /// Optimizer steps taken.
    pub step: u64,
    /// The optimizer's named state, as its `state_dict` returns it and its `load_state` takes it.
    pub optimizer: Vec<(String, Shape, Vec<f32>)>,
    /// The random generator of the run, if it has one.
    pub rng: Option<Rng>,
    /// Free text by key. Keys must not begin with `tiebeam.`.
    pub metadata: BTreeMap<String, String>,
}

setters!(Checkpoint {
    step: u64,
    optimizer: Vec<(String, Shape, Vec<f32>)>,
    rng: Option<Rng>,
    metadata: BTreeMap<String, String>,
});

/// Writes parameters and run state. The file is replaced atomically.
///
/// The parameters are a consistent snapshot between two optimizer steps or replays, even while another thread trains them. They
/// are first copied on the device, and the other thread waits only for this copy. If the device has no memory for copies, it
/// waits until everything is written. The contents of `run` date from when they were read. If another thread steps the optimizer,
/// call this under the lock that guards it, or read the state together with a [`Gpu::snapshot`] of the parameters and save that.
///
/// ```no_run
/// # use tiebeam::{Gpu, Rng, optim::{AdamW, AdamWConfig, Group}};
/// # use tiebeam::nn::{Init, Linear, Module};
/// # use tiebeam::store::{Checkpoint, load_checkpoint, save_checkpoint};
/// # let gpu = Gpu::open()?;
/// # let model = Linear::new(&gpu, 3, 2, true, Init::KaimingUniform, &mut Rng::new(1));
/// let params = model.parameters().state_dict(); // with buffers, such as running statistics
/// let group = Group::new(model.parameters().trainable());
/// let mut optimizer = AdamW::new(&gpu, vec![group], AdamWConfig::default())?;
/// let mut rng = Rng::new(1);
/// // ... steps ...
/// let run = Checkpoint::default()
///     .step(optimizer.steps())
///     .optimizer(optimizer.state_dict()?)
///     .rng(Some(rng.clone()));
/// save_checkpoint("run.safetensors", &params, &run)?;
/// // Later, with the same model and optimizer made anew:
/// let run = load_checkpoint("run.safetensors", &params)?;
/// optimizer.load_state(run.step, &run.optimizer)?;
/// if let Some(saved) = run.rng {
///     rng.set_state(saved.state());
/// }
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// # Errors
/// When the file cannot be written (an old file is left intact), a name occurs twice, a name or key is reserved by the format, or
/// the device has failed.
pub fn save_checkpoint(path: impl AsRef<Path>, params: &[(String, Tensor)], run: &Checkpoint) -> Result<()> {
    let path = path.as_ref();
    if let Some((name, _)) = params.iter().find(|(name, _)| name.starts_with(OPTIMIZER)) {
        return Err(Error::format(
            path,
            format!("parameter `{name}`: names under `{OPTIMIZER}` are the optimizer's"),
        ));
    }
    if let Some(key) = run.metadata.keys().find(|key| key.starts_with(RESERVED)) {
        return Err(Error::format(path, format!("metadata `{key}`: keys under `{RESERVED}` are reserved")));
    }
    let mut metadata = run.metadata.clone();
    metadata.insert(FORMAT.into(), VERSION.into());
    metadata.insert(STEP.into(), run.step.to_string());
    if let Some(rng) = &run.rng {
        let [seed, draws] = rng.state();
        metadata.insert(RNG.into(), format!("{seed} {draws}"));
    }
    let state =
        run.optimizer.iter().map(|(name, shape, data)| Entry::f32(format!("{OPTIMIZER}{name}"), shape, data));
    let (names, tensors): (Vec<_>, Vec<_>) = params.iter().map(|(name, tensor)| (name, tensor)).unzip();
    of_one_moment(&tensors, |tensors| {
        let params = names.into_iter().zip(tensors).map(|(name, tensor)| entry(name, tensor));
        save(path, params.chain(state), &metadata)
    })
}

/// Loads the parameters of a checkpoint into `params`, in place, and returns the rest.
///
/// The tensors keep their memory, so they remain leaves, known to their optimizer and shared as before. Pending expressions over
/// them are computed first. Nothing is written before everything has been checked.
///
/// # Errors
/// When the file is not a checkpoint, or a parameter is missing, unknown, or of another shape or type (the message names it).
/// Also when the device has failed.
///
/// # Panics
/// When one of `params` is a view of part of another tensor.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::store::{Checkpoint, load_checkpoint, save_checkpoint};
/// let path = std::env::temp_dir().join(format!("tiebeam-run-{}.safetensors", std::process::id()));
/// let params = |value| [("w".to_string(), Tensor::full(&gpu, [2], value).requires_grad())];
/// save_checkpoint(&path, &params(7.0), &Checkpoint::default().step(100))?;
/// let model = params(0.0);
/// assert_eq!(load_checkpoint(&path, &model)?.step, 100);
/// assert_eq!(model[0].1.to_vec::<f32>()?, [7.0, 7.0]); // written in place
/// # std::fs::remove_file(path).ok();
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[track_caller]
pub fn load_checkpoint(path: impl AsRef<Path>, params: &[(String, Tensor)]) -> Result<Checkpoint> {
    let (file, run) = read_checkpoint(path.as_ref(), params, |_| Ok(()))?;
    write_params(&file, params)?;
    Ok(run)
}

/// Reads a checkpoint whose metadata `accept` accepts, and compares it with the model, which is as it was.
#[track_caller]
pub(crate) fn read_checkpoint(
    path: &Path,
    params: &[(String, Tensor)],
    accept: impl FnOnce(&BTreeMap<String, String>) -> Result<()>,
) -> Result<(File, Checkpoint)> {
    for (name, tensor) in params {
        let whole = tensor.is_whole();
        assert!(
            whole,
            "load_checkpoint: `{name}` is a view; only a tensor with elements of its own can be written"
        );
    }
    let file = File::open(path)?;
    accept(file.metadata())?;
    let run = run(&file)?;
    check(&file, params)?;
    Ok((file, run))
}

/// Writes the parameters of a checkpoint that was read into the model's.
pub(crate) fn write_params(file: &File, params: &[(String, Tensor)]) -> Result<()> {
    for gpu in devices(params.iter().map(|(_, tensor)| tensor)) {
        gpu.unchanged(|| {
            let own = params.iter().filter(|(_, tensor)| tensor.gpu() == gpu);
            let writes = own.map(|(name, tensor)| Ok((tensor.place(), file.bytes(name)?)));
            gpu.overwrite_now(&writes.collect::<Result<Vec<_>>>()?)
        })?;
    }
    Ok(())
}

/// Writes bytes in the tensor's type into a tensor in place.
pub(crate) fn overwrite(tensor: &Tensor, bytes: &[u8]) -> Result<()> {
    let expected = tensor.count() * tensor.dtype().size();
    if bytes.len() != expected || !tensor.is_whole() {
        let got = bytes.len();
        return Err(Error::config(format!(
            "{got} bytes for a tensor of {expected} with elements of its own"
        )));
    }
    let gpu = tensor.gpu();
    gpu.unchanged(|| gpu.overwrite_now(&[(tensor.place(), bytes)]))
}

/// Reads everything but the parameters.
fn run(file: &File) -> Result<Checkpoint> {
    let wrong = |message: String| Error::format(file.path(), message);
    let text = |key| file.metadata().get(key).map(String::as_str);
    match text(FORMAT) {
        Some(VERSION) => {}
        Some(other) => {
            return Err(wrong(format!("a checkpoint of version {other}; this crate reads {VERSION}")));
        }
        None => {
            return Err(wrong(format!(
                "no checkpoint (its header has no `{FORMAT}`); read weights with load_tensors"
            )));
        }
    }
    let step = text(STEP).and_then(|step| step.parse().ok());
    let step = step.ok_or_else(|| wrong(format!("its header has no number under `{STEP}`")))?;
    let state = |text: &str| {
        let (seed, draws) = text.split_once(' ')?;
        Some(Rng::from_state([seed.parse().ok()?, draws.parse().ok()?]))
    };
    let rng = match text(RNG) {
        None => None,
        Some(text) => Some(state(text).ok_or_else(|| wrong(format!("`{RNG}` is `{text}`, no two numbers")))?),
    };
    let mut optimizer = Vec::new();
    for name in file.names().filter(|name| name.starts_with(OPTIMIZER)) {
        optimizer.push((name[OPTIMIZER.len()..].to_string(), shape(file, name)?, file.tensor_f32(name)?));
    }
    let own = |key: &String| key.starts_with(RESERVED);
    let metadata =
        file.metadata().iter().filter(|(key, _)| !own(key)).map(|(k, v)| (k.clone(), v.clone())).collect();
    Ok(Checkpoint { step, optimizer, rng, metadata })
}

/// Compares names, shapes and types of the file with the model's.
fn check(file: &File, params: &[(String, Tensor)]) -> Result<()> {
    let other = |message: String| {
        Error::format(file.path(), format!("{message}: this is another model's checkpoint"))
    };
    for (name, tensor) in params {
        if !file.contains(name) {
            return Err(other(format!("no tensor `{name}`, which the model has")));
        }
        let info = file.info(name)?;
        if info.shape != tensor.shape()[..] || info.dtype != stored(tensor.dtype()) {
            return Err(other(format!(
                "tensor `{name}` is {} {:?}, the model's is {} {}",
                info.dtype,
                info.shape,
                tensor.dtype(),
                tensor.shape()
            )));
        }
    }
    let known: HashSet<&str> = params.iter().map(|(name, _)| name.as_str()).collect();
    match file.names().find(|name| !name.starts_with(OPTIMIZER) && !known.contains(name)) {
        Some(name) => Err(other(format!("tensor `{name}` is none of the model's"))),
        None => Ok(()),
    }
}

/// Writes named tensors, each in its own type, as a consistent snapshot: see [`save_checkpoint`].
///
/// # Errors
/// When the file cannot be written (an old file is left intact), a name occurs twice, or the device has failed.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::store::{load_tensors, save_tensors};
/// let path = std::env::temp_dir().join(format!("tiebeam-save-{}.safetensors", std::process::id()));
/// let (w, ids) = (Tensor::ones(&gpu, [2, 3]), Tensor::from_slice(&gpu, &[7u32, 8], [2]));
/// save_tensors(&path, [("w", &w), ("ids", &ids)], &Default::default())?;
/// let tensors = load_tensors(&gpu, &path)?;
/// assert_eq!(tensors["w"].to_vec2::<f32>()?, [[1.0; 3]; 2]);
/// assert_eq!(tensors["ids"].to_vec::<u32>()?, [7, 8]);
/// # std::fs::remove_file(path).ok();
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn save_tensors<N: AsRef<str>, T: Borrow<Tensor>>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (N, T)>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let (names, tensors): (Vec<N>, Vec<T>) = tensors.into_iter().unzip();
    let tensors: Vec<&Tensor> = tensors.iter().map(Borrow::borrow).collect();
    of_one_moment(&tensors, |tensors| {
        save(path, names.iter().zip(tensors).map(|(name, tensor)| entry(name.as_ref(), tensor)), metadata)
    })
}

/// Calls `write` with a consistent snapshot of the tensors.
pub(super) fn of_one_moment(
    tensors: &[&Tensor],
    write: impl FnOnce(Vec<Tensor>) -> Result<()>,
) -> Result<()> {
    let copies: Vec<Tensor> = tensors.iter().map(|tensor| tensor.room_for_copy()).collect();
    if copies.iter().any(|copy| copy.check().is_err()) {
        drop(copies);
        let gpus = devices(tensors.iter().copied());
        return holding(&gpus, || write(tensors.iter().map(|&tensor| tensor.clone()).collect()));
    }
    for gpu in devices(tensors.iter().copied()) {
        let own = tensors.iter().zip(&copies).filter(|(tensor, _)| tensor.gpu() == gpu);
        let (tensors, copies): (Vec<&Tensor>, Vec<&Tensor>) = own.unzip();
        gpu.fill_snapshot(&tensors, &copies)?;
    }
    write(copies)
}

/// Returns the devices of some tensors, always in the same order. Locks taken in this order cannot deadlock.
pub(crate) fn devices<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Vec<&'a Gpu> {
    let mut all: Vec<&Gpu> = tensors.map(Tensor::gpu).collect();
    all.sort_by_key(|gpu| gpu.0.id);
    all.dedup();
    all
}

/// Runs `work` while no thread changes a tensor of these devices in place.
fn holding<T>(gpus: &[&Gpu], work: impl FnOnce() -> T) -> T {
    match gpus {
        [] => work(),
        [first, rest @ ..] => first.unchanged(|| holding(rest, work)),
    }
}

/// Reads every tensor of a file, by name. F16, U32 and I32 keep their type; other floats become f32.
///
/// # Errors
/// When the file cannot be read, or has a tensor of an unsupported type (the message names it).
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::store::{load_tensors, save_tensors};
/// let path = std::env::temp_dir().join(format!("tiebeam-load-{}.safetensors", std::process::id()));
/// save_tensors(&path, [("a.w", &Tensor::ones(&gpu, [2, 3]))], &Default::default())?;
/// for (name, tensor) in load_tensors(&gpu, &path)? {
///     assert_eq!((&name[..], &tensor.shape()[..]), ("a.w", &[2, 3][..]));
/// }
/// # std::fs::remove_file(path).ok();
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn load_tensors(gpu: &Gpu, path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>> {
    read_tensors(gpu, path.as_ref(), false)
}

/// Like [`load_tensors`], but BF16 keeps its type too, at half the memory.
///
/// # Errors
/// As [`load_tensors`].
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::DType;
/// use tiebeam::store::{load_tensors, load_tensors_as_stored, save_tensors};
/// let path = std::env::temp_dir().join(format!("tiebeam-as-stored-{}.safetensors", std::process::id()));
/// save_tensors(&path, [("w", &Tensor::ones(&gpu, [2]).cast(DType::Bf16))], &Default::default())?;
/// assert_eq!(load_tensors(&gpu, &path)?["w"].dtype(), DType::F32);
/// assert_eq!(load_tensors_as_stored(&gpu, &path)?["w"].dtype(), DType::Bf16);
/// # std::fs::remove_file(path).ok();
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn load_tensors_as_stored(gpu: &Gpu, path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>> {
    read_tensors(gpu, path.as_ref(), true)
}

fn read_tensors(gpu: &Gpu, path: &Path, as_stored: bool) -> Result<BTreeMap<String, Tensor>> {
    let file = File::open(path)?;
    let mut tensors = BTreeMap::new();
    for name in file.names() {
        let shape = shape(&file, name)?;
        let tensor = match file.info(name)?.dtype {
            FileDType::F16 => Tensor::from_slice(gpu, &file.tensor_f16(name)?, shape),
            FileDType::BF16 if as_stored => Tensor::from_bytes(gpu, DType::Bf16, file.bytes(name)?, shape),
            FileDType::U32 => Tensor::from_slice(gpu, &file.tensor_u32(name)?, shape),
            FileDType::I32 => Tensor::from_slice(gpu, &file.tensor_i32(name)?, shape),
            _ => Tensor::from_slice(gpu, &file.tensor_f32(name)?, shape),
        };
        tensor.check()?;
        tensors.insert(name.to_string(), tensor);
    }
    gpu.check()?;
    Ok(tensors)
}

/// Returns the shape of a tensor in the file. More axes or elements than this crate supports are an error.
fn shape(file: &File, name: &str) -> Result<Shape> {
    let sizes = &file.info(name)?.shape;
    Shape::checked(sizes).ok_or_else(|| {
        let message =
            format!("tensor `{name}`: {sizes:?} has more than {MAX_AXES} axes or 2^32 - 1 elements");
        Error::format(file.path(), message)
    })
}

pub(crate) fn stored(dtype: DType) -> FileDType {
    match dtype {
        DType::F32 => FileDType::F32,
        DType::F16 => FileDType::F16,
        DType::Bf16 => FileDType::BF16,
        DType::U32 => FileDType::U32,
        DType::I32 => FileDType::I32,
    }
}

/// Returns an entry for a tensor that is read back only when it is written.
fn entry<'a>(name: &str, tensor: Tensor) -> Entry<'a> {
    let shape = *tensor.shape();
    Entry::lazy(name, stored(tensor.dtype()), &shape, move || elements(&tensor))
}

/// Reads the elements' bytes, row-major. Waits for the device.
pub(super) fn elements(tensor: &Tensor) -> Result<Vec<u8>> {
    let dense = tensor.detach().contiguous();
    let place = dense.place();
    dense.gpu().read(&place.buffer, place.offset, (dense.count() * dense.dtype().size()) as u64)
}
