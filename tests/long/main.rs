//! Long walks: every op that loops, with more turns than the software driver of Debian 12 gives a thread (65 535, and then it ends
//! the loop without a word), sums so long that a single running sum drifts, and many threads on one device.
//!
//! `TIEBEAM_LONG=1` (`make test-long`) takes them to 2^20 turns, 2^26 terms and a minute; what an adapter's memory does not hold is
//! reported as ignored.

mod drift;
#[path = "../support/mod.rs"]
mod support;
mod threads;
mod turns;

use libtest_mimic::{Arguments, Trial};
use support::*;
use tiebeam::Gpu;

/// One test: its name, the bytes of its largest tensor, and what it does on a device.
pub struct Long {
    pub name: String,
    pub bytes: usize,
    pub run: Box<dyn Fn(&Gpu) + Send + Sync>,
}

impl Long {
    pub fn new(name: impl Into<String>, elements: usize, run: impl Fn(&Gpu) + Send + Sync + 'static) -> Long {
        Long { name: name.into(), bytes: 4 * elements, run: Box::new(run) }
    }
}

fn main() {
    let args = Arguments::from_args();
    let long = std::env::var_os("TIEBEAM_LONG").is_some_and(|v| v != "0");
    let mut trials = Vec::new();
    for Long { name, bytes, run } in
        turns::all(long).into_iter().chain(drift::all(long)).chain(threads::all(long))
    {
        let (adapter, have) = (gpu().adapter(), gpu().adapter().max_binding.min(gpu().adapter().max_buffer));
        if bytes as u64 > have {
            let name = format!("{name} (ignored: {} binds {have} bytes, this takes {bytes})", adapter.name);
            trials.push(Trial::test(name, || Ok(())).with_ignored_flag(true));
            continue;
        }
        trials.push(Trial::test(name, move || {
            // What an adapter picks by itself is only one of the kernels that must be right.
            for gpu in [gpu(), other_kernels()] {
                // A fault of another test is that test's failure.
                gpu.take_fault();
                run(gpu);
            }
            Ok(())
        }));
    }
    libtest_mimic::run(&args, trials).exit();
}
