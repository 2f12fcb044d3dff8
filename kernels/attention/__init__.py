"""Attention: forward, backward and decoding, with kernels of their own for Hopper."""
