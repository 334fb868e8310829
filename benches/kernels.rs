//! Times the rows of `tiebeam bench` for developers, with criterion's statistics and its comparison to the last run.
//! `cargo bench -- matmul` times those whose name contains a word.

use criterion::Criterion;
use std::time::{Duration, Instant};
use tiebeam::bench::{Suite, entries};
use tiebeam::{Gpu, no_grad};

fn main() {
    let gpu = Gpu::open().unwrap_or_else(|error| panic!("the benchmark needs an adapter: {error}"));
    println!("{}", gpu.adapter());
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    for entry in
        entries(gpu.adapter().is_software(), Suite::Quick).into_iter().filter(|entry| entry.is_wanted(&words))
    {
        let name = entry.name();
        let row = (entry.make)(&gpu, false).unwrap_or_else(|error| panic!("{name}: {error}"));
        row.check(&gpu).unwrap_or_else(|error| panic!("{name}: {error}"));
        criterion.bench_function(&name, |bencher| {
            bencher.iter_custom(|count| {
                gpu.synchronize().expect("no fault");
                let started = Instant::now();
                for i in 0..count as usize {
                    let y = (row.run)(i % row.sets);
                    no_grad(|| y.contiguous().evaluate());
                }
                gpu.synchronize().expect("no fault");
                started.elapsed()
            });
        });
        drop(row);
        gpu.trim();
    }
    criterion.final_summary();
}
