"""Tools to test engines, kernels and platforms with."""
