//! Long walks: every op with a loop, with more turns than the software driver of Debian 12 allows per thread (after 65 535 it
//! silently ends the loop). Also sums that are so long that a single running sum would drift, and many threads on one device, and
//! learning curves in half precision.
//!
//! `TIEBEAM_LONG=1` (`make test-long`) extends them to 2^20 turns, 2^26 terms and a minute. Tests that do not fit in the
//! adapter's memory are reported as ignored.

mod curve;
mod drift;
#[path = "../support/mod.rs"]
mod support;
mod threads;
mod turns;

use libtest_mimic::{Arguments, Trial};
use support::*;
use tiebeam::Gpu;

/// A test: its name, the bytes of its largest tensor, and the function that runs it on a device.
pub struct Long {
    /// The name under which it is listed.
    pub name: String,
    /// Bytes of its largest tensor. A device that has less skips the test.
    pub bytes: usize,
    /// The test.
    pub run: Box<dyn Fn(&Gpu) + Send + Sync>,
}

impl Long {
    /// A test whose largest tensor has so many elements of 4 bytes.
    pub fn new(name: impl Into<String>, elements: usize, run: impl Fn(&Gpu) + Send + Sync + 'static) -> Long {
        Long { name: name.into(), bytes: 4 * elements, run: Box::new(run) }
    }
}

fn main() {
    let args = Arguments::from_args();
    let long = std::env::var_os("TIEBEAM_LONG").is_some_and(|v| v != "0");
    let mut trials = Vec::new();
    for Long { name, bytes, run } in
        turns::all(long).into_iter().chain(drift::all(long)).chain(threads::all(long)).chain(curve::all(long))
    {
        let (adapter, have) = (gpu().adapter(), gpu().adapter().max_binding.min(gpu().adapter().max_buffer));
        if bytes as u64 > have {
            let name = format!("{name} (ignored: {} binds {have} bytes, this takes {bytes})", adapter.name);
            trials.push(Trial::test(name, || Ok(())).with_ignored_flag(true));
            continue;
        }
        trials.push(Trial::test(name, move || {
            // All kernels must be right, not only those that the adapter uses by default.
            for gpu in [gpu(), other_kernels()] {
                // A fault of another test must not fail this one.
                gpu.take_fault();
                run(gpu);
            }
            Ok(())
        }));
    }
    libtest_mimic::run(&args, trials).exit();
}
