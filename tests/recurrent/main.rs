//! Recurrent attention: every form, level and thread count against the naive form.
#![allow(clippy::float_cmp, reason = "exact values are meant")]

mod case;
mod convolution;
mod forms;
mod gradients;
mod scan;
#[path = "../common/stream.rs"]
mod stream;
