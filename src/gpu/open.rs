//! Opens a device: reads options and environment, lists the adapters, chooses one, and enables its features.

use super::adapters::{AdapterSummary, choose, list, summarize};
use super::compile::Compiler;
use super::driver_cache::DriverCache;
use super::options::{Feature, Options, used};
use super::{CoopMatrices, DeviceClass, Gpu, Inner, Tuning, choices, lock, texel};
use crate::error::{Error, Result, panic_text};
use crate::files::parse_size;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// Held while the driver is asked for adapters or a device, so that a process opens one device at a time. NVIDIA's
/// driver starts threads for each device, and 37 tests on 16 threads that opened devices at once waited in it forever.
/// The lock of `without_panic` may be taken while this one is held, but never the reverse.
static OPENING: Mutex<()> = Mutex::new(());

/// Returns the wgpu features of a list, together with what every kernel needs.
fn required(features: &[Feature]) -> wgpu::Features {
    features.iter().fold(wgpu::Features::IMMEDIATES, |all, feature| all | feature.bits())
}

/// Returns the setting in the environment, if it is not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Returns how long to wait for the device: as given, else as `TIEBEAM_WAIT` says. `None` means no limit.
fn wait(given: Option<Duration>) -> Result<Option<Duration>> {
    const DEFAULT: Duration = Duration::from_secs(600);
    let limit = match (given, variable("TIEBEAM_WAIT")) {
        (Some(given), _) => given,
        (None, Some(text)) => seconds(&text)?,
        (None, None) => DEFAULT,
    };
    Ok((limit < Duration::MAX).then_some(limit))
}

/// Returns the most bytes of device memory: as given, else as `TIEBEAM_MEMORY` says. `u64::MAX` means no limit.
fn memory(given: Option<u64>) -> Result<u64> {
    let named = || variable("TIEBEAM_MEMORY").map(|text| parse_size(&text)).transpose();
    let named = match given {
        Some(_) => given,
        None => named().map_err(|e| Error::config(format!("TIEBEAM_MEMORY: {e}")))?,
    };
    Ok(named.unwrap_or(u64::MAX))
}

fn seconds(text: &str) -> Result<Duration> {
    let wrong = || {
        let words = "seconds, such as 600, or 0 or off for no limit";
        Error::config(format!("TIEBEAM_WAIT: '{text}' is no time to wait; give {words}"))
    };
    if text == "off" {
        return Ok(Duration::MAX);
    }
    let seconds = text.parse::<f64>().map_err(|_| wrong())?;
    let limit = Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?;
    Ok(if seconds == 0.0 { Duration::MAX } else { limit })
}

/// Returns the features that must not be used: those given and those that `TIEBEAM_OFF` lists.
fn without(mut given: Vec<Feature>) -> Result<Vec<Feature>> {
    if let Some(words) = variable("TIEBEAM_OFF") {
        given.extend(Feature::parse_list(&words)?);
    }
    Ok(given)
}

/// Returns the largest square f16 matrices with f32 sums that the adapter has. WGSL has only these two sizes.
fn coop_matrices(adapter: &wgpu::Adapter, features: &[Feature]) -> Option<CoopMatrices> {
    if !features.contains(&Feature::CooperativeMatrix) {
        return None;
    }
    let all = adapter.cooperative_matrix_properties();
    let has = |size: u32| {
        all.iter().any(|p| {
            [p.m_size, p.n_size, p.k_size] == [size; 3]
                && p.ab_type == wgpu::CooperativeScalarType::F16
                && p.cr_type == wgpu::CooperativeScalarType::F32
        })
    };
    [16, 8].into_iter().find(|&size| has(size)).map(|size| CoopMatrices { size })
}

type Opened = (wgpu::Device, wgpu::Queue);

fn request(adapter: &wgpu::Adapter, features: &[Feature]) -> Result<Opened, String> {
    let experimental = if features.contains(&Feature::CooperativeMatrix) {
        // SAFETY: the call only promises that we know the feature may misbehave. Its kernels are gated by a self-test.
        unsafe { wgpu::ExperimentalFeatures::enabled() }
    } else {
        wgpu::ExperimentalFeatures::disabled()
    };
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("tiebeam"),
        required_features: required(features),
        required_limits: adapter.limits(),
        experimental_features: experimental,
        memory_hints: wgpu::MemoryHints::Performance,
        trace: wgpu::Trace::Off,
    };
    pollster::block_on(adapter.request_device(&descriptor)).map_err(|e| e.to_string())
}

/// Opens with these features, or without the experimental one if that fails. Returns the features that were used.
///
/// wgpu-hal 30 assumes that a driver which lists cooperative matrices has the feature. If the driver's feature bit is
/// off, wgpu-hal panics in `vkCreateDevice` (`ERROR_FEATURE_NOT_PRESENT`). lavapipe of Mesa 26 with narrow vectors is
/// such a driver. wgpu offers no way to query the bit itself.
fn first_that_opens<T>(
    mut features: Vec<Feature>,
    open: impl Fn(&[Feature]) -> Result<T, String>,
) -> Result<(T, Vec<Feature>), String> {
    if features.contains(&Feature::CooperativeMatrix) {
        match without_panic(|| open(&features)) {
            Ok(opened) => return Ok((opened, features)),
            Err(why) => {
                tracing::warn!(why, "the device does not open with cooperative matrices; without them");
            }
        }
        features.retain(|&feature| feature != Feature::CooperativeMatrix);
    }
    Ok((open(&features)?, features))
}

/// Returns the result of `work`, or the message of its panic as `Err`. The panic prints nothing.
fn without_panic<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    // One at a time, because each call restores the hook that it found.
    static HOOK: Mutex<()> = Mutex::new(());
    let _one = lock(&HOOK);
    let kept = (!std::thread::panicking()).then(|| Arc::new(std::panic::take_hook()));
    if let Some(kept) = kept.clone() {
        let own = std::thread::current().id();
        std::panic::set_hook(Box::new(move |info| {
            if std::thread::current().id() != own {
                kept(info);
            }
        }));
    }
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    if let Some(kept) = kept {
        drop(std::panic::take_hook());
        match Arc::try_unwrap(kept) {
            Ok(hook) => std::panic::set_hook(hook),
            // Another thread is panicking at this moment and still holds the hook.
            Err(kept) => std::panic::set_hook(Box::new(move |info| kept(info))),
        }
    }
    done.unwrap_or_else(|payload| Err(panic_text(&*payload).to_string()))
}

impl Gpu {
    /// Opens the best adapter: discrete, then integrated, virtual, software. A process opens one device at a time, and
    /// other threads wait.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if there is none, [`Error::Unsupported`] if it lacks immediates, [`Error::Device`] if the
    /// driver refuses.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let gpu = Gpu::open()?;
    /// let x = Tensor::ones(&gpu, [3]);
    /// assert_eq!(x.sum_all().item()?, 3.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn open() -> Result<Gpu> {
        Gpu::open_with(Options::default())
    }

    /// Opens the adapter that `options` name.
    ///
    /// # Errors
    /// As for [`Gpu::open`], and [`Error::Config`] for a setting that cannot be understood. If a name matches no
    /// adapter, the error lists the adapters.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::Options;
    /// // Kernels with bounds checks, and ids that are checked before they are used.
    /// let gpu = Gpu::open_with(Options::default().checked(true))?;
    /// assert!(gpu.is_checked());
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn open_with(mut options: Options) -> Result<Gpu> {
        let flag = |name| variable(name).is_some_and(|v| v != "0");
        let backend = options.backend.take().or_else(|| variable("TIEBEAM_BACKEND"));
        let wanted = options.adapter.take().or_else(|| variable("TIEBEAM_ADAPTER"));
        options.checked |= cfg!(debug_assertions) || flag("TIEBEAM_CHECKED");
        options.round_products |= flag("TIEBEAM_ROUND_PRODUCTS");
        if options.tuning.is_none() {
            options.tuning = variable("TIEBEAM_TUNE").map(|word| Tuning::parse(&word)).transpose()?;
        }
        options.device = options.device.take().or_else(|| variable("TIEBEAM_DEVICE"));
        options.without = without(options.without)?;
        let wait = wait(options.wait)?;
        options.memory = Some(memory(options.memory)?);
        // Declared before `adapters`, so that the adapters are dropped while the lock is still held.
        let _one = lock(&OPENING);
        let adapters = list(backend.as_deref(), wanted.as_deref())?;
        let index = choose(&adapters, wanted.as_deref(), &options.without)?;
        Gpu::from_adapter(index, &adapters[index], options, wait)
    }

    /// Lists every adapter of this machine, in the order that `TIEBEAM_ADAPTER` counts. OpenGL's adapters are listed
    /// only if there are no others, or if `TIEBEAM_BACKEND` names OpenGL.
    ///
    /// # Errors
    /// If `TIEBEAM_BACKEND` names an unknown backend or `TIEBEAM_OFF` an unknown feature.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// for adapter in Gpu::adapters()? {
    ///     println!("{adapter}");
    /// }
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn adapters() -> Result<Vec<AdapterSummary>> {
        let without = without(vec![])?;
        let _one = lock(&OPENING);
        let adapters = list(variable("TIEBEAM_BACKEND").as_deref(), None)?;
        Ok(adapters.iter().enumerate().map(|(i, a)| summarize(i, a, &without)).collect())
    }

    /// Returns the adapter that [`Gpu::open_with`] would open, without opening it.
    ///
    /// # Errors
    /// As [`Gpu::adapters`], and [`Error::NoAdapter`] if there is none, or none of the wanted name.
    pub fn preferred(options: &Options) -> Result<AdapterSummary> {
        let backend = options.backend.clone().or_else(|| variable("TIEBEAM_BACKEND"));
        let wanted = options.adapter.clone().or_else(|| variable("TIEBEAM_ADAPTER"));
        let without = without(options.without.clone())?;
        let _one = lock(&OPENING);
        let adapters = list(backend.as_deref(), wanted.as_deref())?;
        let index = choose(&adapters, wanted.as_deref(), &without)?;
        Ok(summarize(index, &adapters[index], &without))
    }

    /// Returns the adapter for the process of number `local` on a machine whose processes share its adapters: of those that are of the
    /// kind and backend of [`Gpu::preferred`], the one of this number modulo their count. An adapter that the options or
    /// `TIEBEAM_ADAPTER` name is everyone's.
    ///
    /// # Errors
    /// As [`Gpu::preferred`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Options};
    /// let options = Options::default();
    /// let [first, third] = [0, 2].map(|local| Gpu::adapter_of(local, &options));
    /// assert_eq!(first?.kind, third?.kind);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn adapter_of(local: usize, options: &Options) -> Result<AdapterSummary> {
        let best = Gpu::preferred(options)?;
        if options.adapter.is_some() || variable("TIEBEAM_ADAPTER").is_some() {
            return Ok(best);
        }
        let alike = |other: &AdapterSummary| other.kind == best.kind && other.backend == best.backend;
        let mut same: Vec<AdapterSummary> = Gpu::adapters()?.into_iter().filter(alike).collect();
        match same.len() {
            0 => Ok(best),
            count => Ok(same.swap_remove(local % count)),
        }
    }

    fn from_adapter(
        index: usize,
        adapter: &wgpu::Adapter,
        options: Options,
        wait: Option<Duration>,
    ) -> Result<Gpu> {
        let (checked, round_products) = (options.checked, options.round_products);
        let most_memory = options.memory.unwrap_or(u64::MAX);
        let named = options.device.as_deref().filter(|name| !name.eq_ignore_ascii_case("auto"));
        let named = named.map(DeviceClass::named).transpose()?;
        let mut summary = summarize(index, adapter, &options.without);
        let texels = match options.texels {
            Some(true) => texel::Policy::Always,
            None if summary.name.contains("llvmpipe") => texel::Policy::Worth,
            Some(false) | None => texel::Policy::Never,
        };
        let have = adapter.features();
        if !have.contains(wgpu::Features::IMMEDIATES) {
            return Err(Error::Unsupported {
                need: format!("{} has no immediates (push constants), which every kernel uses", summary.name),
            });
        }
        let ((device, queue), features) =
            first_that_opens(used(have, &options.without), |features| request(adapter, features))
                .map_err(|e| Error::device(format!("{} refused to open: {e}", summary.name)))?;
        summary.features = features.iter().map(|feature| feature.name()).collect();
        tracing::info!(adapter = %summary, "opened");

        let fault: Arc<Mutex<Option<Error>>> = Arc::default();
        let losses: Arc<AtomicU64> = Arc::default();
        let (slot, count) = (fault.clone(), losses.clone());
        device.on_uncaptured_error(Arc::new(move |e| {
            lock(&slot).get_or_insert(Error::device(e.to_string()).because_of(e));
            count.fetch_add(1, Ordering::AcqRel);
        }));
        let slot = fault.clone();
        device.set_device_lost_callback(move |reason, message| {
            // Dropping the last handle also calls this, but then nobody is left to ask for a fault.
            if reason != wgpu::DeviceLostReason::Destroyed {
                lock(&slot).get_or_insert(Error::Lost { message });
            }
        });
        let folder = choices::folder(&options).filter(|_| features.contains(&Feature::PipelineCache));
        let cache = folder.and_then(|at| DriverCache::open(&device, &adapter.get_info(), &summary, &at));
        let class_named = named.is_some();
        let mut class = named.unwrap_or_else(|| DeviceClass::of(&summary));
        let choices = choices::Choices::open(options, &summary, class.name)?;
        if !class_named {
            choices.refine(&mut class);
        }
        let limits = adapter.limits();
        class.lanes = adapter.get_info().subgroup_max_size;
        class.workgroup_memory = limits.max_compute_workgroup_storage_size;
        Ok(Gpu::on(Inner {
            id: 0,
            on_trial: false,
            class,
            class_named,
            device,
            queue,
            limits,
            features: required(&features),
            checked,
            wait,
            texels,
            coop: coop_matrices(adapter, &features),
            coop_proven: OnceLock::new(),
            round_products,
            choices,
            summary,
            fault,
            epoch: AtomicU64::new(0),
            most_memory,
            creating: Mutex::default(),
            pool: Arc::default(),
            staging: Mutex::default(),
            kernels: Mutex::default(),
            compiler: Arc::new(Compiler::new(adapter.get_info().backend, cache, wait)),
            recorder: Mutex::default(),
            pending: Mutex::default(),
            changing: Mutex::default(),
            steps: Mutex::default(),
            losses,
            profile: Mutex::default(),
            findings: Mutex::default(),
            findings_written: Arc::default(),
            normal_table: Mutex::default(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_lies_about_matrices_opens_without_them() {
        let wanted = vec![Feature::F16, Feature::CooperativeMatrix];
        for panics in [true, false] {
            let open = |features: &[Feature]| match features.contains(&Feature::CooperativeMatrix) {
                true if panics => panic!("the driver broke an invariant"),
                true => Err("refused".to_string()),
                false => Ok(features.len()),
            };
            assert_eq!(first_that_opens(wanted.clone(), open), Ok((1, vec![Feature::F16])));
        }
        // If opening fails without it too, the error is that of the second attempt. Other features are not given up.
        let never = |features: &[Feature]| Err::<(), _>(format!("{} features", features.len()));
        assert_eq!(first_that_opens(wanted.clone(), never), Err("1 features".into()));
        assert_eq!(first_that_opens(vec![Feature::F16], never), Err("1 features".into()));
        assert_eq!(first_that_opens(wanted.clone(), |all| Ok(all.len())), Ok((2, wanted)));
        assert_eq!(without_panic::<()>(|| panic!("{} words", 3)), Err("3 words".into()));
    }

    #[test]
    fn matrices_need_f16() {
        let have = wgpu::Features::all();
        assert_eq!(used(have, &[]), Feature::ALL);
        assert_eq!(
            used(have, &[Feature::F16]),
            [Feature::Subgroups, Feature::Timestamps, Feature::PipelineCache]
        );
        assert_eq!(used(wgpu::Features::TIMESTAMP_QUERY, &[]), [Feature::Timestamps]);
        assert!(used(have, &Feature::ALL).is_empty());
    }

    #[test]
    fn words_of_waits() {
        assert_eq!(seconds("2.5").unwrap(), Duration::from_millis(2500));
        assert_eq!([seconds("0").unwrap(), seconds("off").unwrap()], [Duration::MAX; 2]);
        assert_eq!(wait(Some(Duration::MAX)).unwrap(), None);
        for wrong in ["-1", "long", "nan", "1e99"] {
            let said = seconds(wrong).unwrap_err().to_string();
            assert!(said.starts_with(&format!("TIEBEAM_WAIT: '{wrong}' is no time")), "{said}");
        }
    }

    #[test]
    fn words_of_features() {
        let all =
            Feature::parse_list("f16, subgroups,timestamps,cooperative-matrix,pipeline-cache,").unwrap();
        assert_eq!(all, Feature::ALL);
        let said = Feature::parse_list("f16,fp64").unwrap_err().to_string();
        assert_eq!(
            said,
            "TIEBEAM_OFF: 'fp64' is no feature; there are f16, subgroups, timestamps, cooperative-matrix, pipeline-cache"
        );
    }
}
