//! Which adapter is opened, and with what: options, the environment, the list of adapters, features.

use super::adapters::{AdapterSummary, choose, list, summarize};
use super::options::{Feature, Options, used};
use super::{CoopMatrices, DeviceClass, Gpu, Inner, Tuning, choices, lock, texel};
use crate::error::{Error, Result};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// Held while the driver is asked for adapters or a device, so that a process opens one device at a time: NVIDIA's driver starts
/// threads for each, and 37 tests on 16 threads that all opened devices at once waited in it for good. Whoever holds it may take
/// the lock of `without_panic`, never the other way round.
static OPENING: Mutex<()> = Mutex::new(());

/// The device features of a list, with what every kernel needs.
fn required(features: &[Feature]) -> wgpu::Features {
    features.iter().fold(wgpu::Features::IMMEDIATES, |all, feature| all | feature.bits())
}

/// The setting in the environment, if it is not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// How long to wait for the device: as given, else as `TIEBEAM_WAIT` says; `None` for no limit.
fn wait(given: Option<Duration>) -> Result<Option<Duration>> {
    const DEFAULT: Duration = Duration::from_secs(600);
    let limit = match (given, variable("TIEBEAM_WAIT")) {
        (Some(given), _) => given,
        (None, Some(text)) => seconds(&text)?,
        (None, None) => DEFAULT,
    };
    Ok((limit < Duration::MAX).then_some(limit))
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

/// What is left alone: as given, and as `TIEBEAM_OFF` says.
fn without(mut given: Vec<Feature>) -> Result<Vec<Feature>> {
    if let Some(words) = variable("TIEBEAM_OFF") {
        given.extend(Feature::parse_list(&words)?);
    }
    Ok(given)
}

/// The largest square matrices of f16 with f32 sums, where the adapter has any: WGSL has only these two sizes.
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
        // SAFETY: only promises that we know the feature may misbehave; its kernels are gated by a self-test.
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

/// Opens with these features, or without the experimental one where that fails; and which it was.
///
/// wgpu-hal 30 believes that a driver which lists cooperative matrices has the feature, and panics in `vkCreateDevice`
/// (`ERROR_FEATURE_NOT_PRESENT`) where its feature bit is off: lavapipe of Mesa 26 with narrow vectors is such a one. The bit
/// itself cannot be asked for through wgpu.
fn first_that_opens<T>(
    mut features: Vec<Feature>,
    open: impl Fn(&[Feature]) -> Result<T, String>,
) -> Result<(T, Vec<Feature>), String> {
    if features.contains(&Feature::CooperativeMatrix) {
        match without_panic(|| open(&features)) {
            Ok(opened) => return Ok((opened, features)),
            Err(why) => {
                tracing::warn!(why, "the device does not open with cooperative matrices; without them")
            }
        }
        features.retain(|&feature| feature != Feature::CooperativeMatrix);
    }
    Ok((open(&features)?, features))
}

/// What `work` gives, or what it panics with; such a panic prints nothing.
fn without_panic<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    // One at a time: each puts back the hook that it found.
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
            // Another thread panics this moment and still holds it.
            Err(kept) => std::panic::set_hook(Box::new(move |info| kept(info))),
        }
    }
    done.unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        let text = text.or_else(|| payload.downcast_ref::<&str>().map(|s| s.to_string()));
        Err(text.unwrap_or_else(|| "a panic in the driver's layer".into()))
    })
}

impl Gpu {
    /// Opens the best adapter: discrete, then integrated, virtual, software. A process opens one at a time; other threads wait.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is none, [`Error::Unsupported`] where it lacks immediates,
    /// [`Error::Device`] where the driver refuses.
    pub fn open() -> Result<Gpu> {
        Gpu::open_with(Options::default())
    }

    /// Opens the adapter that `options` name.
    ///
    /// # Errors
    /// As [`Gpu::open`]; a name that matches nothing lists the adapters that there are.
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
        // Before `adapters`, so that those are given back to the driver under it, too.
        let _one = lock(&OPENING);
        let adapters = list(backend.as_deref(), wanted.as_deref())?;
        let index = choose(&adapters, wanted.as_deref(), &options.without)?;
        Gpu::from_adapter(index, &adapters[index], options, wait)
    }

    /// Every adapter that this machine offers, in the order that `TIEBEAM_ADAPTER` counts. Those of OpenGL are listed where there
    /// are no others, or `TIEBEAM_BACKEND` names it.
    ///
    /// # Errors
    /// When `TIEBEAM_BACKEND` names no backend or `TIEBEAM_OFF` no feature.
    pub fn adapters() -> Result<Vec<AdapterSummary>> {
        let without = without(vec![])?;
        let _one = lock(&OPENING);
        let adapters = list(variable("TIEBEAM_BACKEND").as_deref(), None)?;
        Ok(adapters.iter().enumerate().map(|(i, a)| summarize(i, a, &without)).collect())
    }

    fn from_adapter(
        index: usize,
        adapter: &wgpu::Adapter,
        options: Options,
        wait: Option<Duration>,
    ) -> Result<Gpu> {
        let (checked, round_products) = (options.checked, options.round_products);
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
            // Dropping the last handle also arrives here; nobody is left to ask then.
            if reason != wgpu::DeviceLostReason::Destroyed {
                lock(&slot).get_or_insert(Error::Lost { message });
            }
        });
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
            pool: Arc::default(),
            staging: Mutex::default(),
            kernels: Mutex::default(),
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
        // What fails without it too is an error, with the words of the second try; other features are not given up.
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
        assert_eq!(used(have, &[Feature::F16]), [Feature::Subgroups, Feature::Timestamps]);
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
        let all = Feature::parse_list("f16, subgroups,timestamps,cooperative-matrix,").unwrap();
        assert_eq!(all, Feature::ALL);
        let said = Feature::parse_list("f16,fp64").unwrap_err().to_string();
        assert_eq!(
            said,
            "TIEBEAM_OFF: 'fp64' is no feature; there are f16, subgroups, timestamps, cooperative-matrix"
        );
    }
}
