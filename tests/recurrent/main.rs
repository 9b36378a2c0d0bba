//! Recurrent attention: every form, level and thread count against the naive form.

mod case;
mod forms;
mod gradients;
#[path = "../common/stream.rs"]
mod stream;
