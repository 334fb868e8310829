//! A step of AdamW over one large parameter.

use super::normal;
use crate::bench::{Check, Entry, Row, carried};
use crate::optim::{AdamW, AdamWConfig, Group};
use crate::tensor::Tensor;
use std::cell::RefCell;

pub(super) fn entry(n: usize) -> Entry {
    Entry::new("adamw", n.to_string(), move |gpu| {
        let [p, g] = [normal(n, 1), normal(n, 2)];
        let (lr, decay) = (1e-3f64, 0.01f64);
        let at = n / 3;
        // The first step's corrected moments are g and g^2.
        let want = p[at] as f64 * (1.0 - lr * decay) - lr * (g[at] as f64).signum();
        let checks = vec![Check { at, want, bound: 1e-6 }];
        let theta = Tensor::from_slice(gpu, &p, [n]).requires_grad();
        let group = Group::new([("theta", &theta)]).weight_decay(decay as f32);
        let optimizer = RefCell::new(AdamW::new(gpu, vec![group], AdamWConfig::default())?);
        let grads = theta.mul(&Tensor::from_slice(gpu, &g, [n])).sum_all().backward()?;
        let run = move |_| {
            let stepped = optimizer.borrow_mut().step(&grads, lr as f32);
            carried(theta.gpu(), stepped.map(|_| theta.clone()))
        };
        Ok(Row { checks, ..Row::new([7.0 * 4.0 * n as f64, 0.0], run) })
    })
}
