//! Sums of products: matrices, sums over named axes, the weights of sharing sites, combinations of atoms, convolutions and the windows of images.

pub mod combine;
pub mod conv;
pub mod conv1d;
pub mod conv_transpose;
pub mod einsum;
pub mod linear;
pub mod lookup;
pub mod matmul;
pub(crate) mod mixed;
pub mod narrow;
pub mod pool;
pub(crate) mod routed;
pub mod site;
pub(crate) mod weight;

crate::ops::listed!(matmul, einsum, weight, site, combine, conv, conv1d, conv_transpose, pool);
