"""Tests that need flash-linear-attention; see `tests/python/fla/test_package.py`."""
