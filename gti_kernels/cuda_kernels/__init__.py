"""CUDA C++ kernels: one launcher per op, `<stem>.py`, for the kernels of `csrc/cuda/<stem>.cu`.

`compiler` makes a cubin of a source and keeps it, `runtime` loads it and launches it;
`python -m gti_kernels.cuda_kernels` compiles ahead of time. Nothing here is imported unless chosen.
"""
