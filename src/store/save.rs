//! Writes safetensors files atomically, with the same bytes for the same tensors.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use half::f16;

use super::header::{Header, MAX_BYTES, METADATA, tensor_bytes};
use super::{FileDType, bf16_bytes};
use crate::error::{Error, Result};
use crate::files;

/// One tensor to be written.
///
/// ```
/// use tiebeam::store::{Entry, File, save};
/// let path = std::env::temp_dir().join(format!("tiebeam-entry-{}.safetensors", std::process::id()));
/// save(&path, [Entry::f32("w", &[2, 1], &[0.5, 1.5])], &Default::default())?;
/// let file = File::open(&path)?;
/// assert_eq!(file.info("w")?.shape, [2, 1]);
/// assert_eq!(file.tensor_f32("w")?, [0.5, 1.5]);
/// # std::fs::remove_file(path).ok();
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct Entry<'a> {
    name: String,
    dtype: FileDType,
    shape: Vec<usize>,
    data: Data<'a>,
}

enum Data<'a> {
    Bytes(Cow<'a, [u8]>),
    Lazy(Box<dyn FnOnce() -> Result<Vec<u8>> + 'a>),
}

impl<'a> Entry<'a> {
    /// An F32 tensor. All constructors panic if the data does not have the size of `shape`.
    #[track_caller]
    pub fn f32(name: impl Into<String>, shape: &[usize], values: &'a [f32]) -> Self {
        Entry::bytes(name, FileDType::F32, shape, bytemuck::cast_slice(values))
    }

    /// An F16 tensor.
    #[track_caller]
    pub fn f16(name: impl Into<String>, shape: &[usize], values: &'a [f16]) -> Self {
        Entry::bytes(name, FileDType::F16, shape, bytemuck::cast_slice(values))
    }

    /// A BF16 tensor of f32 values, each rounded to nearest even.
    #[track_caller]
    pub fn bf16(name: impl Into<String>, shape: &[usize], values: &[f32]) -> Self {
        Entry::bytes(name, FileDType::BF16, shape, bf16_bytes(values))
    }

    /// A U32 tensor.
    #[track_caller]
    pub fn u32(name: impl Into<String>, shape: &[usize], values: &'a [u32]) -> Self {
        Entry::bytes(name, FileDType::U32, shape, bytemuck::cast_slice(values))
    }

    /// An I32 tensor.
    #[track_caller]
    pub fn i32(name: impl Into<String>, shape: &[usize], values: &'a [i32]) -> Self {
        Entry::bytes(name, FileDType::I32, shape, bytemuck::cast_slice(values))
    }

    /// A tensor of any type, from its little-endian bytes.
    #[track_caller]
    pub fn bytes(
        name: impl Into<String>,
        dtype: FileDType,
        shape: &[usize],
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Self {
        let (name, bytes) = (name.into(), bytes.into());
        let (need, has) = (tensor_bytes(dtype, shape), bytes.len());
        assert!(need == Some(has), "store: `{name}`: {dtype} {shape:?} needs {need:?} bytes, got {has}");
        Entry { name, dtype, shape: shape.to_vec(), data: Data::Bytes(bytes) }
    }

    /// A tensor whose bytes are produced only when it is written, so a model on the device need not be on the host as a whole. If
    /// `produce` fails or returns another number of bytes than `shape` needs, [`save`] fails and leaves the old file intact.
    #[track_caller]
    pub fn lazy(
        name: impl Into<String>,
        dtype: FileDType,
        shape: &[usize],
        produce: impl FnOnce() -> Result<Vec<u8>> + 'a,
    ) -> Self {
        let name = name.into();
        assert!(
            tensor_bytes(dtype, shape).is_some(),
            "store: `{name}`: {dtype} {shape:?} is no size in bytes"
        );
        Entry { name, dtype, shape: shape.to_vec(), data: Data::Lazy(Box::new(produce)) }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        // Every constructor checks that the size is valid.
        tensor_bytes(self.dtype, &self.shape).unwrap_or(0)
    }
}

impl fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({} {} {:?})", self.name, self.dtype, self.shape)
    }
}

/// Writes a safetensors file: first a temporary file beside it, which is synced to the disk and then renamed over it.
///
/// On any error (disk full, a tensor that could not be produced) the old file is left intact and the temporary file is removed. A
/// program that has the old file mapped continues to read the old content (on Windows the rename fails instead). Links are
/// followed, mode and owner are kept, and devices and pipes are written directly, by the rules of [`files::replace()`].
///
/// The bytes depend only on tensors and metadata, not on the order of `tensors`. Metadata is sorted by key. Tensors are sorted by
/// alignment, then name, as in the reference implementation, which aligns each tensor in the file.
///
/// ```no_run
/// # use tiebeam::store::{Entry, save};
/// # fn main() -> tiebeam::error::Result<()> {
/// let (w, b) = (vec![0.0; 6], vec![1.0; 3]);
/// let notes = [("step".to_string(), "100".to_string())].into();
/// save("model.safetensors", [Entry::f32("w", &[2, 3], &w), Entry::bf16("b", &[3], &b)], &notes)?;
/// # Ok(()) }
/// ```
pub fn save<'a>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = Entry<'a>>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let (header, tensors) = layout(path, tensors, metadata)?;
    files::replace(path, |file| write(path, file, &header, tensors))
}

/// Returns the header, and the tensors in the order of their data.
fn layout<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = Entry<'a>>,
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, Vec<Entry<'a>>)> {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut names: Vec<_> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::format(path, format!("two tensors are named `{}`", pair[0])));
    }
    if names.contains(&METADATA) {
        return Err(Error::format(
            path,
            format!("a tensor cannot be named `{METADATA}`, the format's word for text"),
        ));
    }
    let mut end = 0usize;
    let mut ranges = Vec::with_capacity(tensors.len());
    for tensor in &tensors {
        let start = end;
        end = end.checked_add(tensor.len()).ok_or_else(|| {
            Error::format(path, format!("tensor `{}` takes the file beyond the address space", tensor.name))
        })?;
        ranges.push(start..end);
    }
    let infos = tensors.iter().zip(ranges).map(|(t, range)| (t.name.as_str(), t.dtype, &t.shape[..], range));
    let header = Header::write(metadata, infos).map_err(|e| Error::format(path, e.to_string()))?;
    if header.len() as u64 > MAX_BYTES {
        return Err(Error::format(
            path,
            format!("names and metadata take {} bytes, over {MAX_BYTES}", header.len()),
        ));
    }
    Ok((header, tensors))
}

/// Writes header and tensors to `out`. `path` is only used in error messages.
fn write(path: &Path, out: impl Write, header: &[u8], tensors: Vec<Entry<'_>>) -> Result<()> {
    let failed = |e: io::Error| Error::io(path, e);
    let mut out = BufWriter::with_capacity(1 << 20, out);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    out.write_all(header).map_err(failed)?;
    for tensor in tensors {
        let need = tensor.len();
        let bytes = match tensor.data {
            Data::Bytes(bytes) => bytes,
            Data::Lazy(produce) => Cow::Owned(produce()?),
        };
        if bytes.len() != need {
            let (name, dtype, shape, has) = (tensor.name, tensor.dtype, tensor.shape, bytes.len());
            let message =
                format!("tensor `{name}`: {dtype} {shape:?} needs {need} bytes, {has} were produced");
            return Err(Error::format(path, message));
        }
        out.write_all(&bytes).map_err(failed)?;
    }
    out.flush().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::scratch::Folder;
    use crate::store::File;
    use safetensors::tensor::TensorView;
    use std::path::PathBuf;

    fn notes() -> BTreeMap<String, String> {
        ["step", "name", "a\"b"].map(|k| (k.to_string(), format!("{k} of\nit"))).into()
    }

    #[test]
    fn what_is_saved_is_read() {
        let folder = Folder::new("save-read");
        let path = folder.join("m.safetensors");
        let (floats, halves) = ([1.5, -0.0, 3.0e38], [f16::MAX, f16::NEG_ONE]);
        let entries = || {
            [
                Entry::f32("w", &[3, 1], &floats),
                Entry::bf16("b", &[3], &floats),
                Entry::f16("h", &[2], &halves),
                Entry::u32("u", &[], &[u32::MAX]),
                Entry::i32("ä\n", &[2, 1], &[-1, i32::MAX]),
                Entry::bytes("raw", FileDType::U8, &[5], vec![1, 2, 3, 4, 5]),
                Entry::lazy("late", FileDType::F64, &[1], || Ok(2.5f64.to_le_bytes().to_vec())),
                Entry::f32("none", &[0, 4], &[]),
            ]
        };
        save(&path, entries(), &notes()).unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(file.metadata(), &notes());
        assert_eq!(file.tensor_f32("w").unwrap().map_bits(), floats.to_vec().map_bits());
        assert_eq!(file.tensor_f32("b").unwrap()[..2], [1.5, -0.0]);
        assert_eq!(file.tensor_f16("h").unwrap(), halves);
        assert_eq!(file.tensor_u32("u").unwrap(), [u32::MAX]);
        assert!(file.tensor_i32("u").is_err());
        assert_eq!(file.tensor_i32("ä\n").unwrap(), [-1, i32::MAX]);
        assert_eq!(file.tensor_f32("late").unwrap(), [2.5]);
        file.expect("none", &[0, 4]).unwrap();
        // Entries in reverse order give the same bytes. The old file is mapped meanwhile, and no temporary file remains.
        let first = std::fs::read(&path).unwrap();
        save(&path, entries().into_iter().rev(), &notes()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), first);
        assert_eq!(file.tensor_f16("h").unwrap(), halves);
        assert_eq!(folder.names(), ["m.safetensors"]);
    }

    trait MapBits {
        fn map_bits(self) -> Vec<u32>;
    }

    impl MapBits for Vec<f32> {
        fn map_bits(self) -> Vec<u32> {
            self.into_iter().map(f32::to_bits).collect()
        }
    }

    /// Compares with the bytes of the reference implementation. There is only one metadata key, because it has no fixed order for
    /// more.
    #[test]
    fn bytes_match_the_reference() {
        let folder = Folder::new("save-reference");
        let path = folder.join("m");
        let data = [1u8, 2, 3, 4, 5, 6, 7, 8];
        let tensors = [
            ("b", FileDType::F16, vec![2usize, 2]),
            ("z", FileDType::F32, vec![2]),
            ("a", FileDType::F32, vec![1, 2]),
            ("c", FileDType::I64, vec![]),
        ];
        let notes = [("k".to_string(), "\u{1} é \u{7f} \"\\/".to_string())];
        let view = |(name, dtype, shape): &(&'static str, FileDType, Vec<usize>)| {
            let dtype = serde_json::from_value(dtype.to_string().into()).unwrap();
            (*name, TensorView::new(dtype, shape.clone(), &data).unwrap())
        };
        let reference = safetensors::serialize(tensors.iter().map(view), Some(notes.clone().into())).unwrap();
        save(&path, tensors.iter().map(|(n, d, s)| Entry::bytes(*n, *d, s, &data[..])), &notes.into())
            .unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), reference);
    }

    #[test]
    fn failure_leaves_the_old_file() {
        let folder = Folder::new("save-failure");
        let path = folder.join("m");
        save(&path, [Entry::u32("u", &[1], &[7])], &BTreeMap::new()).unwrap();
        let old = std::fs::read(&path).unwrap();
        let device = || Err(Error::device("lost"));
        let full = vec![0.0; 1 << 19];
        let broken = [Entry::lazy("z", FileDType::U8, &[1], device), Entry::f32("w", &[full.len()], &full)];
        assert!(matches!(save(&path, broken, &notes()), Err(Error::Device { .. })));
        let short = Entry::lazy("z", FileDType::U8, &[2], || Ok(vec![0]));
        assert!(
            save(&path, [short], &notes())
                .unwrap_err()
                .to_string()
                .contains("tensor `z`: U8 [2] needs 2 bytes")
        );
        let twice = || Entry::u32("u", &[1], &[7]);
        assert!(save(&path, [twice(), twice()], &notes()).unwrap_err().to_string().contains("named `u`"));
        assert!(save(&path, [Entry::u32(METADATA, &[1], &[7])], &notes()).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), old);
        assert_eq!(folder.names(), ["m"]);
        // A folder as the target fails and is left intact, as do a missing parent folder and a path without a name.
        let taken = folder.join("taken");
        std::fs::create_dir_all(taken.join("inner")).unwrap();
        for target in [taken.clone(), folder.join("no/such/m"), PathBuf::from(".."), PathBuf::new()] {
            assert!(
                matches!(save(&target, [twice()], &notes()), Err(Error::Io { .. })),
                "{}",
                target.display()
            );
        }
        assert_eq!(folder.names(), ["m", "taken"]);
    }

    /// A disk that fills up is an error, whether in the header, in a tensor, or in the last flush.
    #[test]
    fn full_disk_is_an_error() {
        struct Disk(usize);
        impl Write for Disk {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let fits = bytes.len().min(self.0);
                self.0 -= fits;
                if fits == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(fits) }
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let values = vec![1.0; 3 << 18];
        let parts = || layout(Path::new("m"), [Entry::f32("w", &[3, 1 << 18], &values)], &notes()).unwrap();
        let size = 8 + parts().0.len() + 4 * values.len();
        let attempt = |room| {
            let (header, tensors) = parts();
            write(Path::new("m"), Disk(room), &header, tensors)
        };
        for room in [0, 1, 8, 100, 1 << 20, size - 1] {
            assert!(matches!(attempt(room), Err(Error::Io { .. })), "{room}");
        }
        attempt(size).unwrap();
        #[cfg(target_os = "linux")]
        if let Ok(full) = std::fs::File::options().write(true).open("/dev/full") {
            let (header, tensors) = parts();
            assert!(matches!(write(Path::new("/dev/full"), full, &header, tensors), Err(Error::Io { .. })));
        }
    }

    #[test]
    #[should_panic(expected = "store: `w`: F32 [2, 2] needs Some(16) bytes, got 12")]
    fn wrong_size_panics() {
        Entry::f32("w", &[2, 2], &[0.0; 3]);
    }
}
