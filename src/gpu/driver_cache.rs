//! What the driver keeps of compiled kernels, in a file of the user's cache folder. Only Vulkan offers this.
//!
//! The file begins with a line that names the adapter and the driver, then has a hash of the rest, then the driver's
//! bytes. A file that is broken, of another driver, another user's or too large is ignored without a word, and later
//! replaced: it only saves time. Many drivers keep such a cache of their own as well.
//!
//! A process writes what its own driver has: what the file had when the device was opened, and what was compiled since.
//! wgpu cannot merge that with what another process has written in the meantime. So of programs that run at the same time
//! the last one to write is kept, and the others' new kernels are compiled again in their next run.

use super::{AdapterSummary, caught, lock};
use crate::error::{Error, Result};
use crate::files;
use std::fs::{File, Metadata};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use twox_hash::XxHash3_128;

/// The largest file. Drivers never remove anything, so a file that would become larger is begun anew.
const MOST: usize = 64 << 20;
/// A cache without kernels has at most so many bytes: wgpu's head of 64 and Vulkan's of 32.
const EMPTY: usize = 96;
/// The bytes of the hash.
const HASH: usize = 16;

/// The cache of one device.
pub(crate) struct DriverCache {
    raw: wgpu::PipelineCache,
    file: PathBuf,
    /// The file's first line.
    head: String,
    /// The hash of the bytes that the file was last read or written with.
    known: Mutex<u128>,
}

impl DriverCache {
    /// Opens the cache of a device that was opened with `wgpu::Features::PIPELINE_CACHE`. `None` if the adapter has no
    /// name for its file, or the driver refuses.
    pub fn open(
        device: &wgpu::Device,
        info: &wgpu::AdapterInfo,
        summary: &AdapterSummary,
        folder: &Path,
    ) -> Option<DriverCache> {
        let file = folder.join(format!("{}.bin", wgpu::util::pipeline_cache_key(info)?));
        let head = format!("tiebeam pipelines 1 {}; {}\n", summary.name, summary.driver);
        let data = read(&file, &head);
        let known = data.as_deref().map_or(0, XxHash3_128::oneshot);
        let descriptor =
            wgpu::PipelineCacheDescriptor { label: Some("tiebeam"), data: data.as_deref(), fallback: true };
        // SAFETY: the bytes must be what `get_data` returned. They come from a file that is the user's own where the
        // system tells (`is_ours`), and that only `save` below writes, under a hash and the names of this adapter and
        // driver. wgpu compares the driver's own mark in them too, and the driver its version.
        match caught(device, || unsafe { device.create_pipeline_cache(&descriptor) }) {
            Ok(raw) => Some(DriverCache { raw, file, head, known: Mutex::new(known) }),
            Err(error) => {
                tracing::debug!(%error, "no driver's cache");
                None
            }
        }
    }

    pub fn raw(&self) -> &wgpu::PipelineCache {
        &self.raw
    }

    /// Writes what the driver has now, if that is new. A file that cannot be written costs time only, in a later run.
    pub fn save(&self) {
        let Some(data) = self.raw.get_data().filter(|data| data.len() > EMPTY) else { return };
        let hash = XxHash3_128::oneshot(&data);
        let mut known = lock(&self.known);
        if *known == hash {
            return;
        }
        match write(&self.file, &self.head, &data) {
            Ok(()) => *known = hash,
            Err(error) => tracing::debug!(%error, "the driver's cache was not written"),
        }
    }
}

/// Whether nobody else can have written a file. Drivers run what is in it, and a hash is no signature.
#[cfg(unix)]
fn is_ours(file: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    file.uid() == rustix::process::geteuid().as_raw() && file.mode() & 0o022 == 0
}

/// Folders of a user's profile are the user's own elsewhere. Another folder is taken as it is.
#[cfg(not(unix))]
fn is_ours(_: &Metadata) -> bool {
    true
}

/// Returns the driver's bytes in a file, if it is ours, whole and of this head.
fn read(file: &Path, head: &str) -> Option<Vec<u8>> {
    // A pipe would be waited for.
    let is_file = std::fs::metadata(file).ok()?.is_file();
    let open = is_file.then(|| File::open(file).ok()).flatten()?;
    let found = open.metadata().ok()?;
    if found.len() > MOST as u64 || !is_ours(&found) {
        return None;
    }
    let mut bytes = Vec::with_capacity(found.len() as usize);
    open.take(MOST as u64).read_to_end(&mut bytes).ok()?;
    let rest = bytes.strip_prefix(head.as_bytes())?;
    let (hash, data) = rest.split_first_chunk::<HASH>()?;
    if u128::from_le_bytes(*hash) != XxHash3_128::oneshot(data) {
        return None;
    }
    Some(bytes.split_off(head.len() + HASH))
}

/// Replaces a file as a whole. Bytes that are too many remove it instead, so that the next run begins anew.
fn write(file: &Path, head: &str, data: &[u8]) -> Result<()> {
    if head.len() + HASH + data.len() > MOST {
        let _ = std::fs::remove_file(file);
        return Ok(());
    }
    if let Some(folder) = file.parent() {
        let _ = std::fs::create_dir_all(folder);
    }
    if file.metadata().is_ok_and(|found| !is_ours(&found)) {
        // A replaced file would keep its owner and mode.
        let _ = std::fs::remove_file(file);
    }
    let bytes = [head.as_bytes(), &XxHash3_128::oneshot(data).to_le_bytes(), data].concat();
    files::replace(file, |mut open| {
        let written = only_ours(open).and_then(|()| open.write_all(&bytes));
        written.map_err(|error| Error::io(file, error))
    })
}

/// Takes a file from other users, whatever new files are by default.
#[cfg(unix)]
fn only_ours(file: &File) -> std::io::Result<()> {
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))
}

#[cfg(not(unix))]
fn only_ours(_: &File) -> std::io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{Feature, Gpu, Options};

    /// Whatever is in the file: the device opens and computes.
    #[test]
    fn a_device_opens_beside_a_broken_file() {
        let folder = files::scratch::Folder::new("driver_cache");
        let open = |without: Vec<Feature>| {
            Gpu::open_with(Options::default().cache(Some(folder.to_path_buf())).without(without)).unwrap()
        };
        let gpu = open(vec![]);
        let Some(cache) = gpu.0.compiler.cache() else {
            assert!(!gpu.adapter().features.contains(&"pipeline-cache"));
            return;
        };
        let (file, head) = (cache.file.clone(), cache.head.clone());
        assert!(
            file.starts_with(&*folder) && open(vec![Feature::PipelineCache]).0.compiler.cache().is_none()
        );
        // The second passes our own check, so that wgpu sees it, and the third has wgpu's mark as well.
        let made = cache.raw.get_data().unwrap_or_default();
        let (torn, foreign) = (b"torn".to_vec(), b"WGPUPLCH and nothing more".to_vec());
        let cut = made[..made.len().min(70)].to_vec();
        std::fs::write(&file, torn).unwrap();
        for bytes in [None, Some(foreign), Some(cut), Some(made)] {
            bytes.iter().for_each(|bytes| write(&file, &head, bytes).unwrap());
            let gpu = open(vec![]);
            assert!(gpu.take_fault().is_none() && gpu.0.compiler.cache().is_some());
            let x = gpu.upload("test", &[7; 16], 16);
            assert_eq!(gpu.read(&x, 0, 16).unwrap(), [7; 16]);
        }
    }

    #[test]
    fn a_file_is_read_only_if_it_is_whole_and_of_this_driver() {
        let scratch = files::scratch::Folder::new("driver_cache");
        let file = scratch.join("deeper/cache.bin");
        let (head, data) = ("tiebeam pipelines 1 card; driver 7\n", vec![7u8; 1000]);
        assert_eq!(read(&file, head), None, "no file");
        write(&file, head, &data).unwrap();
        assert_eq!(read(&file, head), Some(data.clone()));
        assert_eq!(read(&file, "tiebeam pipelines 1 card; driver 8\n"), None);
        let whole = std::fs::read(&file).unwrap();
        for length in [0, 5, head.len(), head.len() + HASH, whole.len() - 1] {
            std::fs::write(&file, &whole[..length]).unwrap();
            assert_eq!(read(&file, head), None, "{length} bytes");
        }
        for at in [0, head.len() + 3, whole.len() - 1] {
            let mut broken = whole.clone();
            broken[at] ^= 1;
            std::fs::write(&file, &broken).unwrap();
            assert_eq!(read(&file, head), None, "byte {at}");
        }
        std::fs::write(&file, [&whole[..], b"more"].concat()).unwrap();
        assert_eq!(read(&file, head), None, "longer than it was");
        write(&file, head, &vec![0; MOST]).unwrap();
        assert!(!file.exists(), "too large a cache is begun anew");
        std::fs::write(&file, vec![0; MOST + 1]).unwrap();
        assert_eq!(read(&file, head), None);
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_others_may_write_is_begun_anew() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = files::scratch::Folder::new("driver_cache");
        let (file, head) = (scratch.join("cache.bin"), "tiebeam pipelines 1 card; driver 7\n");
        write(&file, head, &[7; 100]).unwrap();
        for mode in [0o620, 0o602] {
            std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
            assert_eq!(read(&file, head), None);
            write(&file, head, &[8; 100]).unwrap();
            assert_eq!(read(&file, head), Some(vec![8; 100]));
        }
    }
}
