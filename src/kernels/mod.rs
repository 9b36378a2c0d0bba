//! Attention. Every operator has a naive form in the simplest words there are, and fast forms that are tested against it.
//!
//! | operator | equation | forms |
//! | --- | --- | --- |
//! | [`exact`] | `softmax(scale * q k^T + bias) v`, and other score functions and normalisers | naive, prefill, decode |
//!
//! Contract of all forms: queries with no visible key give zeros and `lse = -inf`; keys that a mask hides have no influence,
//! not even when they or their values are NaN; scores, maxima, sums and accumulators are `Element::Acc`.

pub mod bias;
pub mod dropout;
pub mod exact;
pub mod mask;
pub mod mask_rules;
pub mod recurrent;
pub mod rotary;
pub mod score_mod;
