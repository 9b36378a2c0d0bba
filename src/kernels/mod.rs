//! Attention. Every operator has a naive form in the simplest words there are, and fast forms that are tested against it.
//!
//! | operator | equation | forms |
//! | --- | --- | --- |
//! | [`exact`] | `softmax(scale * q k^T + bias) v`, and other score functions and normalisers | naive, prefill, decode |
//! | [`convolution`] | `y_t = bias + sum over j of w_j x_(t - W + 1 + j)` for each channel | naive, tokens first, channels first, update |
//! | [`recurrent`] | `S_t = D_t S_{t-1} + k_t u_t^T`, `o_t = scale * S_t^T q_t` | naive, chunk, step |
//! | [`gated_norm`] | `y = (x / sqrt(mean(x^2) + eps) * weight + bias) * act(g)` for each row | rows |
//! | [`scan`] | `h_t = f_t h_{t-1} + x_t` of each channel and state | naive, chunk, step |
//!
//! Contract of all forms of exact attention: queries with no visible key give zeros and `lse = -inf`; keys that a mask hides have no influence,
//! not even when they or their values are NaN; scores, maxima, sums and accumulators are `Element::Acc`.

pub mod bias;
pub mod convolution;
pub mod dropout;
pub mod exact;
pub mod gated_norm;
pub mod mask;
pub mod mask_rules;
pub mod recurrent;
pub mod rotary;
pub mod scan;
pub mod score_mod;
