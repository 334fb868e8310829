//! One large parameter moved along random directions, as by a step of seeds and scalars.

use super::normal;
use crate::bench::{Check, Entry, Row, carried};
use crate::optim::{Directions, Move, moved};
use crate::tensor::Tensor;
use std::cell::RefCell;

/// Expected: bounded by integers, not by bytes. A block of Philox is ten rounds of two wide products in 16-bit halves, and four draws of
/// two more each: some 300 operations for four elements and each move, beside 32 bytes.
pub(super) fn entry(n: usize, count: u64) -> Entry {
    Entry::new("perturb", format!("{n} x{count}"), move |gpu| {
        let start = normal(n, 1);
        let moves: Vec<Move> = (0..count).map(|id| Move { id, by: 0.01 * (id as f32 - 1.5) }).collect();
        let at = n / 3;
        let mut want = start[..=at].to_vec();
        moved(&mut want, 0, 7, &moves);
        let checks = vec![Check { at, want: f64::from(want[at]), bound: 0.0 }];
        let w = Tensor::from_slice(gpu, &start, [n]);
        let directions = RefCell::new(Directions::new([("w", &w)], 7)?);
        let run = move |_| {
            let went = directions.borrow_mut().probe(&moves);
            carried(w.gpu(), went.map(|()| w.clone()))
        };
        Ok(Row { checks, ..Row::new([8.0 * n as f64, 0.0], run) })
    })
}
