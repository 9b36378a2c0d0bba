//! Recurrent attention: every form, level and thread count against the naive form.
#![allow(clippy::float_cmp, reason = "exact values are meant")]

mod case;
mod compare;
mod convolution;
mod forms;
mod gradients;
mod linear_scan;
mod scan;
mod scan_step;
#[path = "../common/stream.rs"]
mod stream;
