"""Which keys a query sees, as a matrix: causal, windows and mask objects."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]

_UNBOUNDED = np.iinfo(np.int64).max // 4


def sides_of_windows(window_size: Any, heads: int) -> npt.NDArray[np.int64]:
    """Returns left and right side of the window of each head, `[H, 2]`.

    Args:
        window_size: `None`, a pair of integers from 0 or `None`, a sequence of `H` such pairs, or an integer array `[H, 2]`, in
            which -1 is unbounded.
        heads: `H`.
    """
    if window_size is None:
        window_size = (None, None)
    if hasattr(window_size, "dtype"):
        sides = np.asarray(window_size).astype(np.int64)
        sides = np.where(sides < 0, _UNBOUNDED, sides)
    else:
        pairs = [window_size] if not hasattr(window_size[0], "__len__") else window_size
        sides = np.array([[_UNBOUNDED if side is None else side for side in pair] for pair in pairs])
    return np.broadcast_to(sides, (heads, 2))


def visible_keys(shape: tuple[int, ...], *, causal: bool, window_size: Any, mask: Any | None) -> Bool:
    """Returns which keys are seen, `[B, H, Sq, Sk]`.

    Query `i` is at the position `p = i + Sk - Sq` of key `p`.

    Args:
        shape: `(B, H, Sq, Sk)`.
        causal: whether query `i` sees only keys `j <= p`.
        window_size: see `sides_of_windows`; query `i` sees only keys `p - left <= j <= p + right`.
        mask: an object whose method `dense(B, Sq, Sk)` returns the keys that it shows, `[B, Sq, Sk]`, or `None`.
    """
    batch, heads, seqlen_q, seqlen_k = shape
    i, j = np.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q, np.arange(seqlen_k)
    left, right = np.moveaxis(sides_of_windows(window_size, heads), 1, 0)[:, :, None, None]
    visible = (i - left <= j) & (j <= i + right)
    if causal:
        visible &= j <= i
    visible = np.broadcast_to(visible, shape)
    return visible if mask is None else visible & mask.dense(batch, seqlen_q, seqlen_k)[:, None]
