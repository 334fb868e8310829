//! The cost of one small op, measured by a thousand dependent additions.

use super::normal;
use crate::bench::{Check, Entry, Row, carried};
use crate::gpu::Gpu;
use crate::step::Step;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::cell::RefCell;

/// Three rows: each addition in its own kernel, all additions as one chain that the engine may fuse, and a kernel for each addition
/// replayed from a recorded step.
pub(super) fn entries() -> [Entry; 3] {
    [
        Entry::new("adds, a kernel each", ADDS, |gpu| Ok(thousand(gpu, false))),
        Entry::new("adds in a chain", ADDS, |gpu| Ok(thousand(gpu, true))),
        Entry::new("adds, replayed", ADDS, |gpu| {
            let row = thousand(gpu, false);
            let step = RefCell::new(Step::record(gpu, &[], |_| Ok(vec![(row.run)(0)]))?);
            let device = gpu.clone();
            let run = move |_| carried(&device, step.borrow_mut().run(&[]).map(|all| all[0].clone()));
            Ok(Row { run: Box::new(run), ..row })
        }),
    ]
}

const ADDS: &str = "1000 of 1024";

fn thousand(gpu: &Gpu, fused: bool) -> Row {
    let host = normal(1024, 9);
    let y = Tensor::from_slice(gpu, &host, [1024]);
    let run = move |_| {
        no_grad(|| {
            (0..1000).fold(y.clone(), |x, _| {
                let z = x.add(&y);
                if !fused {
                    z.evaluate();
                }
                z
            })
        })
    };
    let want = 1001.0 * host[5] as f64;
    let checks = vec![Check { at: 5, want, bound: 1e-3 * want.abs() }];
    Row { ops: 1000, checks, ..Row::new([0.0, 0.0], run) }
}
