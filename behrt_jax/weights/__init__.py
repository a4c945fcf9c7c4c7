"""Weights in and out: the portable form, PyTorch's, vectors of codes."""
