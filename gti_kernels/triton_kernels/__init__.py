"""Triton kernels, one file per op: kernel first, launcher below. Imported only when chosen."""
