//! Elementwise ops: functions of one and of two tensors, operators with numbers, losses, conversions, random numbers.

pub mod bf16;
pub mod binary;
pub mod dropout;
pub mod losses;
pub mod random;
pub mod scalar;
pub mod unary;

crate::ops::listed!(unary, binary, scalar, bf16, random, dropout, losses);
