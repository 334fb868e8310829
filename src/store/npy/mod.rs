//! Reads and writes NumPy's files: an array (`.npy`), or several with names in a zip archive (`.npz`).
//!
//! The format of an array is that of NumPy's module `numpy.lib.format`, versions 1 to 3
//! (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>): the bytes `\x93NUMPY`, two bytes of version, the
//! header's length, the header, and the elements.

mod header;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use zip::result::ZipError;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipArchive, ZipWriter};

use super::checkpoint::{elements, of_one_moment, stored};
use super::{FileDType, bytes};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::files;
use crate::gpu::Gpu;
use crate::shape::{MAX_AXES, Shape};
use crate::tensor::Tensor;
use header::{Header, MAGIC, MAX_BYTES};

/// Reads an array that `numpy.save` wrote.
///
/// | NumPy | tensor |
/// |---|---|
/// | `float32`, `float16`, `int32`, `uint32` | the same type, the same bits |
/// | `float64` | f32, rounded to nearest even; a finite value beyond the range of f32 is an error |
/// | `int8`, `int16`, `int64` | i32; a value that does not fit is an error that names it |
/// | `bool`, `uint8`, `uint16`, `uint64` | u32; a value that does not fit is an error that names it |
///
/// Both orders of bytes are read. An array in Fortran order is put into row-major order, so the tensor has the array's shape. Other
/// types (complex numbers, texts, records, the untyped bytes as which `ml_dtypes` writes bfloat16) and Python objects are refused by
/// name. Nothing that a file claims is believed before the data are there, so a wrong header takes no memory.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`], with the file's name, when the file cannot be read, is no such array, is cut short or too long,
/// or has more than [`MAX_AXES`] axes or 2^32 - 1 elements.
///
/// ```
/// # use tiebeam::{Gpu, Tensor, store};
/// # let gpu = Gpu::open()?;
/// # let path = std::env::temp_dir().join(format!("tiebeam-doc-{}.npy", std::process::id()));
/// store::save_npy(&path, &Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]))?;
/// let x = store::load_npy(&gpu, &path)?; // in Python: numpy.load(path)
/// assert_eq!(x.to_vec2::<f32>()?, [[1.0, 2.0], [3.0, 4.0]]);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn load_npy(gpu: &Gpu, path: impl AsRef<Path>) -> Result<Tensor> {
    let path = path.as_ref();
    let place = Place { path, name: None };
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let array = Array::read(&place, BufReader::with_capacity(1 << 20, file))?;
    let tensor = array.tensor(gpu, &place)?;
    gpu.check()?;
    Ok(tensor)
}

/// Reads every array of an archive that `numpy.savez` or `numpy.savez_compressed` wrote, by name. Types are those of [`load_npy`].
///
/// # Errors
/// As [`load_npy`], with the array's name too, and when the file is no zip archive, a checksum is wrong, or something in the archive
/// is no array.
///
/// ```
/// # use tiebeam::{Gpu, Tensor, store};
/// # let gpu = Gpu::open()?;
/// # let path = std::env::temp_dir().join(format!("tiebeam-doc-{}.npz", std::process::id()));
/// let (x, y) = (Tensor::ones(&gpu, [2, 2]), Tensor::from_slice(&gpu, &[0u32, 1], [2]));
/// store::save_npz(&path, [("x", &x), ("y", &y)])?;
/// let arrays = store::load_npz(&gpu, &path)?; // in Python: numpy.load(path)
/// assert_eq!(arrays["y"].to_vec::<u32>()?, [0, 1]);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn load_npz(gpu: &Gpu, path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| archive_error(path, e))?;
    let mut tensors = BTreeMap::new();
    for index in 0..archive.len() {
        let member = archive.by_index(index).map_err(|e| archive_error(path, e))?;
        let Some(name) = member.name().strip_suffix(".npy").map(String::from) else {
            let message =
                format!("`{}` in the archive is no array, whose name would end in .npy", member.name());
            return Err(Error::format(path, message));
        };
        let place = Place { path, name: Some(&name) };
        let tensor = Array::read(&place, member)?.tensor(gpu, &place)?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(place.wrong("is in the archive twice"));
        }
    }
    gpu.check()?;
    Ok(tensors)
}

/// Writes a tensor as `numpy.save` writes an array, row-major. The file is replaced atomically.
///
/// f32, f16, u32 and i32 keep their type. NumPy has no bf16: such a tensor becomes `float32`, which holds every value exactly. `path` is
/// used as it is, whereas NumPy would add `.npy`.
///
/// # Errors
/// When the file cannot be written (an old file is left intact), or the tensor or its device has failed.
///
/// ```
/// # use tiebeam::{DType, Gpu, Tensor, store};
/// # let gpu = Gpu::open()?;
/// # let path = std::env::temp_dir().join(format!("tiebeam-doc-save-{}.npy", std::process::id()));
/// let x = Tensor::ones(&gpu, [3]).cast(DType::F16);
/// store::save_npy(&path, &x)?;
/// assert_eq!(store::load_npy(&gpu, &path)?.dtype(), DType::F16);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn save_npy(path: impl AsRef<Path>, tensor: &Tensor) -> Result<()> {
    let path = path.as_ref();
    of_one_moment(&[tensor], |tensors| {
        files::replace(path, |file| {
            let parts = parts(path, &tensors[0])?;
            let mut out = BufWriter::with_capacity(1 << 20, file);
            let written = parts.iter().try_for_each(|part| out.write_all(part));
            written.and_then(|()| out.flush()).map_err(|e| Error::io(path, e))
        })
    })
}

/// Writes named tensors as `numpy.savez` writes arrays, without compression. The file is replaced atomically.
///
/// Types are those of [`save_npy`]. The tensors are a consistent snapshot, as in [`save_checkpoint`](super::save_checkpoint). Equal names
/// and tensors in the same order give equal bytes. A pipe cannot be written, because an archive is not written from its beginning to
/// its end.
///
/// # Errors
/// When the file cannot be written (an old file is left intact), a name occurs twice, or a tensor or its device has failed.
///
/// ```
/// # use tiebeam::{Gpu, Tensor, store};
/// # let gpu = Gpu::open()?;
/// # let path = std::env::temp_dir().join(format!("tiebeam-doc-save-{}.npz", std::process::id()));
/// let (w, b) = (Tensor::ones(&gpu, [2, 3]), Tensor::zeros(&gpu, [3]));
/// store::save_npz(&path, [("layer.weight", &w), ("layer.bias", &b)])?;
/// assert_eq!(store::load_npz(&gpu, &path)?.len(), 2);
/// # std::fs::remove_file(path).unwrap();
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn save_npz<'a, N: AsRef<str>>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (N, &'a Tensor)>,
) -> Result<()> {
    let path = path.as_ref();
    let (names, tensors): (Vec<N>, Vec<_>) = tensors.into_iter().unzip();
    of_one_moment(&tensors, |tensors| {
        files::replace(path, |file| {
            let mut archive = ZipWriter::new(BufWriter::with_capacity(1 << 20, file));
            for (name, tensor) in names.iter().zip(&tensors) {
                let parts = parts(path, tensor)?;
                let bytes: usize = parts.iter().map(Vec::len).sum();
                let options = SimpleFileOptions::default()
                    .compression_method(CompressionMethod::Stored)
                    // Equal tensors give equal bytes, whenever they are written.
                    .last_modified_time(DateTime::DEFAULT)
                    .large_file(bytes as u64 >= u64::from(u32::MAX));
                archive
                    .start_file(format!("{}.npy", name.as_ref()), options)
                    .map_err(|e| archive_error(path, e))?;
                parts.iter().try_for_each(|part| archive.write_all(part)).map_err(|e| Error::io(path, e))?;
            }
            let mut out = archive.finish().map_err(|e| archive_error(path, e))?;
            out.flush().map_err(|e| Error::io(path, e))
        })
    })
}

/// Returns header and elements of a tensor, as they are written.
fn parts(path: &Path, tensor: &Tensor) -> Result<[Vec<u8>; 2]> {
    let data = elements(tensor)?;
    let (dtype, data) = match stored(tensor.dtype()) {
        FileDType::BF16 => {
            let wide =
                bytes::to_f32(FileDType::BF16, &data).map_err(|message| Error::format(path, message))?;
            (FileDType::F32, bytemuck::cast_slice(&wide).to_vec())
        }
        dtype => (dtype, data),
    };
    let header = Header::write(dtype, tensor.shape());
    let header = header.ok_or_else(|| Error::format(path, format!("NumPy has no type {dtype}")))?;
    Ok([header, data])
}

/// The error of an archive, which the file's content or the system caused.
fn archive_error(path: &Path, error: ZipError) -> Error {
    match error {
        ZipError::Io(e) if !is_content(&e) => Error::io(path, e),
        error => Error::format(path, format!("no valid .npz archive: {error}")).because_of(error),
    }
}

/// Whether a reader failed because of what it read.
fn is_content(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput
    )
}

/// Where an array comes from, for messages: a file, or a member of one.
struct Place<'a> {
    path: &'a Path,
    name: Option<&'a str>,
}

impl Place<'_> {
    fn wrong(&self, message: impl Into<String>) -> Error {
        let message = message.into();
        Error::format(
            self.path,
            self.name.map_or(message.clone(), |name| format!("array `{name}`: {message}")),
        )
    }

    fn failed(&self, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => self.wrong("it ends within its header; was it cut short?"),
            _ if is_content(&error) => self.wrong(error.to_string()).because_of(error),
            _ => Error::io(self.path, error),
        }
    }
}

/// An array as its file has it.
struct Array {
    header: Header,
    shape: Shape,
    data: Vec<u8>,
}

impl Array {
    fn read(place: &Place, mut reader: impl Read) -> Result<Array> {
        let header = read_header(place, &mut reader)?;
        let Some(shape) = Shape::checked(&header.shape) else {
            let sizes = &header.shape;
            return Err(place.wrong(format!("{sizes:?} has more than {MAX_AXES} axes or 2^32 - 1 elements")));
        };
        let need = shape.count() as u64 * header.dtype.bits() as u64 / 8;
        // Memory grows with the data that arrive, and not by what the header claims.
        let mut data = Vec::new();
        reader.by_ref().take(need).read_to_end(&mut data).map_err(|e| place.failed(e))?;
        let has = data.len();
        if (has as u64) < need {
            let message =
                format!("{} {shape} needs {need} bytes, it has {has}; was it cut short?", header.dtype);
            return Err(place.wrong(message));
        }
        if reader.read(&mut [0]).map_err(|e| place.failed(e))? > 0 {
            return Err(place.wrong(format!(
                "something follows the {need} bytes of {} {shape}; a file holds one array",
                header.dtype
            )));
        }
        Ok(Array { header, shape, data })
    }

    /// Converts to a type of the engine, as the table of [`load_npy`] says.
    fn tensor(mut self, gpu: &Gpu, place: &Place) -> Result<Tensor> {
        let size = self.header.dtype.bits() / 8;
        if self.header.big_endian {
            self.data.chunks_exact_mut(size).for_each(<[u8]>::reverse);
        }
        if self.header.fortran_order {
            self.data = row_major(&self.data, size, &self.shape);
        }
        let (dtype, data, shape) = (self.header.dtype, &self.data, self.shape);
        let wrong = |message: String| place.wrong(message);
        let tensor = match dtype {
            FileDType::F32 => Tensor::from_bytes(gpu, DType::F32, data, shape),
            FileDType::F16 => Tensor::from_bytes(gpu, DType::F16, data, shape),
            FileDType::U32 => Tensor::from_bytes(gpu, DType::U32, data, shape),
            FileDType::I32 => Tensor::from_bytes(gpu, DType::I32, data, shape),
            FileDType::F64 => Tensor::from_slice(gpu, &bytes::to_f32(dtype, data).map_err(wrong)?, shape),
            FileDType::I8 | FileDType::I16 | FileDType::I64 => {
                Tensor::from_slice(gpu, &bytes::to_integer::<i32>(dtype, data).map_err(wrong)?, shape)
            }
            _ => Tensor::from_slice(gpu, &bytes::to_integer::<u32>(dtype, data).map_err(wrong)?, shape),
        };
        tensor.check()?;
        Ok(tensor)
    }
}

fn read_header(place: &Place, reader: &mut impl Read) -> Result<Header> {
    let mut start = [0; 8];
    reader.read_exact(&mut start).map_err(|e| place.failed(e))?;
    let [magic @ .., major, minor] = start;
    if magic != *MAGIC {
        let hint = if start.starts_with(b"PK") { "; it is an archive, which load_npz reads" } else { "" };
        return Err(place.wrong(format!("is no array of NumPy: it does not begin with \\x93NUMPY{hint}")));
    }
    let mut length = [0; 4];
    let field = match major {
        1 => &mut length[..2],
        2 | 3 => &mut length[..],
        _ => return Err(place.wrong(format!("has version {major}.{minor} of the format; 1 to 3 are read"))),
    };
    reader.read_exact(field).map_err(|e| place.failed(e))?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_BYTES {
        return Err(place.wrong(format!("its header claims {length} bytes, the limit is {MAX_BYTES}")));
    }
    let mut text = vec![0; length];
    reader.read_exact(&mut text).map_err(|e| place.failed(e))?;
    let text =
        std::str::from_utf8(&text).map_err(|e| place.wrong(format!("its header is not UTF-8: {e}")))?;
    Header::parse(text).map_err(|message| place.wrong(message))
}

/// Returns elements of `size` bytes, whose first axis varies fastest, in row-major order.
fn row_major(data: &[u8], size: usize, shape: &Shape) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len());
    let mut steps = vec![1; shape.len()];
    for axis in 1..shape.len() {
        steps[axis] = steps[axis - 1] * shape[axis - 1];
    }
    let mut index = vec![0; shape.len()];
    let mut at = 0;
    for _ in 0..shape.count() {
        out.extend_from_slice(&data[at * size..][..size]);
        // Counts on, the last axis first.
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            at += steps[axis];
            if index[axis] < shape[axis] {
                break;
            }
            at -= steps[axis] * shape[axis];
            index[axis] = 0;
        }
    }
    out
}
