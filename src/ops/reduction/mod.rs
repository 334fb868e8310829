//! Ops over whole rows: sums, products and extremes, moments, scans, softmax, losses and norms.

pub mod arg;
pub mod axes;
pub mod batch_norm;
mod columns;
pub mod cross_entropy;
pub mod cross_entropy_with;
pub mod cumsum;
pub mod moments;
pub mod nll_loss;
pub mod norm;
pub mod prod;
pub mod reduce;
pub mod softmax;

crate::ops::listed!(
    reduce,
    axes,
    prod,
    moments,
    arg,
    cumsum,
    softmax,
    cross_entropy,
    cross_entropy_with,
    nll_loss,
    norm,
    batch_norm
);
