//! Primitives, generic over the instruction set. No threads, no intrinsics.

pub mod activation;
pub mod dot;
pub mod elementwise;
pub mod exp;
pub mod gradient_pass;
pub mod load;
pub mod matrix_rows;
pub mod matrix_tiles;
pub mod online_softmax;
pub mod philox;
pub mod product;
pub mod row_tile;
pub mod score_pass;
pub mod silu;
pub mod tanh;
pub mod tile;
pub mod tile_packing;
pub mod tile_product;
pub mod triangular;
pub mod weigh;
