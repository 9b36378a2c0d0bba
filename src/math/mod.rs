//! Primitives, generic over the instruction set. No threads, no intrinsics.

pub mod exp;
pub mod online_softmax;
pub mod tile;
