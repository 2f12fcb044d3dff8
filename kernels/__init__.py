"""Triton kernels, and beside each its specification in plain torch."""
