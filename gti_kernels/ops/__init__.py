"""The public functions, one file per op: equation, shapes, checks, choice of backend, autograd."""
