//! What the benchmark refuses: a wrong result has no time, and no row is above its ceiling.

mod support;

use std::time::Duration;
use support::gpu;
use tiebeam::Tensor;
use tiebeam::bench::{Ceilings, Check, Row, time};

fn row(want: f64) -> Row {
    let x = Tensor::ones(gpu(), [1 << 16]);
    let run = Box::new(move |_| x.affine(2.0, 0.0));
    let checks = vec![Check { at: 7, want, bound: 0.0 }];
    Row { checks, ..Row::new("double", "65536".into(), [8.0 * 65536.0, 0.0], run) }
}

/// Ceilings that nothing reaches.
fn far() -> Ceilings {
    Ceilings { copy: 1e18, kernel_copy: 1e18, fma32: 1e18, ..Ceilings::default() }
}

#[test]
fn a_right_result_has_a_time() {
    let record = time(gpu(), &row(2.0), &far(), Duration::ZERO).expect("right and below its ceiling");
    assert!(record.median_ms > 0.0 && record.min_ms <= record.median_ms && record.median_ms <= record.max_ms);
    assert!(record.fraction.is_some_and(|f| f > 0.0 && f < 1.0), "{:?}", record.fraction);
}

#[test]
fn a_wrong_result_has_no_time() {
    let error =
        time(gpu(), &row(2.5), &far(), Duration::ZERO).expect_err("the result is 2, not 2.5").to_string();
    assert!(error.contains("double 65536: element 7 is 2, want 2.5"), "{error}");
    let nan = time(gpu(), &row(f64::NAN), &far(), Duration::ZERO);
    assert!(nan.is_err(), "nothing equals a reference that is no number");
}

#[test]
fn a_row_above_its_ceiling_fails_the_run() {
    let low = Ceilings { copy: 1.0, ..far() };
    let error = time(gpu(), &row(2.0), &low, Duration::ZERO).expect_err("a byte a second").to_string();
    assert!(error.contains("of its ceiling (copy)"), "{error}");
}
