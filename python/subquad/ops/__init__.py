"""Operators, on PyTorch tensors, NumPy arrays and other DLPack arrays alike."""
