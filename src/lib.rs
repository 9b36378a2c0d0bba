//! Attention for CPUs. Modules in layer order; each may use those above it, and a test holds the line.
//!
//! | layer | module | what it is for |
//! | --- | --- | --- |
//! | L0 | [`error`] [`dtype`] [`tensor`] [`index`] [`workspace`] | the words everything else is written in |
//! | L1 | [`simd`] | instruction sets: vectors, matrix tiles, run-time detection; the only home of `std::arch` |
//! | L2 | [`parallel`] | threads and the entry into an instruction set, once per task; the only home of `rayon` |
//! | L2 | [`math`] | primitives that are generic over the instruction set |
//! | L3 | [`kernels`] | attention itself |
//! | L6 | `bindings` | Python (feature `python`); the only home of `pyo3` |
#![deny(unsafe_code)]

pub mod dtype;
pub mod error;
pub mod index;
pub mod tensor;
pub mod workspace;

pub mod simd;

pub mod math;
pub mod parallel;

pub mod kernels;

#[cfg(feature = "python")]
mod bindings;
