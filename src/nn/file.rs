//! Modules in files: safetensors with a tensor for each parameter and buffer.

use super::module::Module;
use super::parameters::Parameters;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::value::Place;
use crate::store::{File, OPTIMIZER, devices, save_tensors, stored};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

/// What a file and a module do not have in common.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
#[must_use = "what is missing kept its elements"]
pub struct Loaded {
    /// Parameters and buffers that the file lacks, by their first names. They keep their elements.
    pub missing: Vec<String>,
    /// Tensors of the file that the module lacks.
    pub unexpected: Vec<String>,
}

pub(super) fn save(all: &Parameters, path: &Path, metadata: &BTreeMap<String, String>) -> Result<()> {
    all.check_saved()?;
    let mut metadata = metadata.clone();
    // As safetensors' `save_model` writes it: every other name of a tensor, with the one under which it is stored.
    for (names, _) in all.all() {
        metadata.extend(names[1..].iter().map(|name| (name.clone(), names[0].clone())));
    }
    save_tensors(path, all.all().map(|(names, tensor)| (&names[0], tensor)), &metadata)
}

/// Reads what file and module have in common into the module's tensors. Nothing is written before everything has been checked.
pub(super) fn load(all: &Parameters, path: &Path, strict: bool) -> Result<Loaded> {
    let file = File::open(path)?;
    let (mut found, mut loaded) = (Vec::new(), Loaded::default());
    for (names, tensor) in all.all() {
        let mut there = names.iter().filter(|name| file.contains(name));
        let Some(name) = there.next() else {
            loaded.missing.push(names[0].clone());
            continue;
        };
        let bytes = elements(&file, name, tensor)?;
        for other in there {
            if elements(&file, other, tensor)? != bytes {
                let message = format!("`{name}` and `{other}` differ, and this model ties them");
                return Err(Error::format(path, message));
            }
        }
        found.push((name, tensor, bytes));
    }
    if found.is_empty() {
        return Err(Error::format(path, "it has no tensor of this model's names"));
    }
    let known = |name: &str| all.all().any(|(names, _)| names.iter().any(|own| own == name));
    let others = file.names().filter(|name| !name.starts_with(OPTIMIZER) && !known(name));
    loaded.unexpected = others.map(String::from).collect();
    if strict && loaded != Loaded::default() {
        let list = |names: &[String]| if names.is_empty() { "nothing".to_string() } else { names.join(", ") };
        let (missing, unexpected) = (list(&loaded.missing), list(&loaded.unexpected));
        let message = format!(
            "it is another model's: it lacks {missing} and has {unexpected} besides; load_partly reads what fits"
        );
        return Err(Error::format(path, message));
    }
    for gpu in devices(found.iter().map(|(_, tensor, _)| *tensor)) {
        gpu.unchanged(|| {
            let own = found.iter().filter(|(_, tensor, _)| tensor.gpu() == gpu);
            let writes: Vec<(Place, &[u8])> =
                own.map(|(_, tensor, bytes)| (tensor.place(), &bytes[..])).collect();
            gpu.overwrite_now(&writes)
        })?;
    }
    Ok(loaded)
}

/// The bytes of a tensor of the file, in the type of the module's. Floats are converted.
fn elements(file: &File, name: &str, tensor: &Tensor) -> Result<Vec<u8>> {
    let wrong = |message: String| Err(Error::format(file.path(), format!("tensor `{name}` {message}")));
    let (info, own) = (file.info(name)?, tensor.shape());
    if info.shape != own[..] {
        return wrong(format!("is {:?}, the model's is {own}", info.shape));
    }
    if !tensor.is_whole() {
        return wrong("is a view of another tensor in this model, which cannot be written".into());
    }
    if info.dtype == stored(tensor.dtype()) {
        return Ok(file.bytes(name)?.to_vec());
    }
    if !tensor.dtype().is_float() {
        return wrong(format!("is {}, the model's is {}", info.dtype, tensor.dtype()));
    }
    let floats = file.tensor_f32(name)?;
    let round: fn(f32) -> (u16, bool) = match tensor.dtype() {
        DType::F16 => |x| (half::f16::from_f32(x).to_bits(), half::f16::from_f32(x).is_finite()),
        DType::Bf16 => |x| (half::bf16::from_f32(x).to_bits(), half::bf16::from_f32(x).is_finite()),
        _ => return Ok(floats.iter().flat_map(|x| x.to_le_bytes()).collect()),
    };
    match floats.iter().position(|&x| x.is_finite() && !round(x).1) {
        Some(i) => {
            wrong(format!("has {} at element {i}, too large for the model's {}", floats[i], tensor.dtype()))
        }
        None => Ok(floats.iter().flat_map(|&x| round(x).0.to_le_bytes()).collect()),
    }
}

/// The methods of [`Module`] that read and write files, apart because they need nothing else of it.
pub trait ModuleFile: Module {
    /// Writes every parameter and buffer to a safetensors file, each once under its first name, with its other names in the
    /// metadata. The file is replaced whole or not at all, and holds the elements of one moment. Programs of other languages read
    /// it too.
    ///
    /// A run that is to go on needs its optimizer as well: [`save_checkpoint`](crate::store::save_checkpoint).
    ///
    /// ```
    /// # use tiebeam::nn::{Init, Linear, ModuleFile};
    /// # use tiebeam::{Gpu, Rng, Tensor};
    /// # let gpu = Gpu::open()?;
    /// # let path = std::env::temp_dir().join(format!("tiebeam-module-{}.safetensors", std::process::id()));
    /// let [a, b] = [1, 2].map(|seed| Linear::new(&gpu, 3, 2, true, Init::KaimingUniform, &mut Rng::new(seed)));
    /// a.save(&path)?;
    /// b.load(&path)?;
    /// let x = Tensor::ones(&gpu, [1, 3]);
    /// assert_eq!(b.forward(&x).to_vec::<f32>()?, a.forward(&x).to_vec::<f32>()?);
    /// # std::fs::remove_file(path).ok();
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the file cannot be written, or a device has failed. When the module holds what could not be loaded again: a view of another
    /// tensor, or what is computed from a leaf that is not listed.
    fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_with(path, &BTreeMap::new())
    }

    /// [`ModuleFile::save`] with text of your own in the file's metadata, such as a model's settings.
    ///
    /// # Errors
    /// As [`ModuleFile::save`].
    fn save_with(&self, path: impl AsRef<Path>, metadata: &BTreeMap<String, String>) -> Result<()> {
        save(&self.parameters(), path.as_ref(), metadata)
    }

    /// Reads a safetensors file into the parameters and buffers, in place: leaves stay leaves, known to their optimizer. Floats of
    /// another type are converted. A checkpoint's optimizer is passed over.
    ///
    /// # Errors
    /// When the file lacks one or has another, all of which the message names; when a shape differs, or a number is too large for
    /// the module's type. Nothing has changed then.
    fn load(&self, path: impl AsRef<Path>) -> Result<()> {
        load(&self.parameters(), path.as_ref(), true).map(drop)
    }

    /// Reads what file and module have in common, and returns the names of the rest.
    ///
    /// # Errors
    /// When a shape differs, when they have nothing in common, or the file cannot be read. Nothing has changed then.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::Rng;
    /// use tiebeam::nn::{Init, Linear, ModuleFile};
    /// let path = std::env::temp_dir().join(format!("tiebeam-partly-{}.safetensors", std::process::id()));
    /// let mut layer = |bias| Linear::new(&gpu, 3, 2, bias, Init::XavierUniform, &mut Rng::new(1));
    /// layer(false).save(&path)?;
    /// let loaded = layer(true).load_partly(&path)?;
    /// assert_eq!(loaded.missing, ["bias"]); // in the module and not in the file
    /// # std::fs::remove_file(path).ok();
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    fn load_partly(&self, path: impl AsRef<Path>) -> Result<Loaded> {
        load(&self.parameters(), path.as_ref(), false)
    }
}

impl<M: Module + ?Sized> ModuleFile for M {}
