"""Each op on each GPU backend, on small shapes: what compute-sanitizer watches.

`python tools/small_shapes.py [PART ...]`: PhaseSpace, or names of ops; all where none is given.
"""

import sys

import torch

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.rows import BUILT, BY_NAME, ROWS

PARTS = ("PhaseSpace", *(row.name for row in ROWS))


def step_plans(backend: str) -> None:
    """Every kernel of a plan, with tails and an address between 16-byte boundaries."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for wide, exact in ((torch.float32, False), (torch.float64, False), (None, True)):
            q = [torch.randn(n, device="cuda").to(dtype) for n in (1, 37, 8192, 20_001)]
            q.append(torch.randn(5000, device="cuda").to(dtype)[1:])
            space = gti.PhaseSpace(q, momentum_dtype=wide, exact=exact, backend=backend)
            space.kick_drift_(0.1, 0.1, grads=[torch.sin(x) for x in q])
            space.kick_(0.1, grads=[None, *[torch.sin(x) for x in q[1:]]])
            space.drift_(0.1)


def run_samples(op: str, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for sample in testing.samples(op):
            args, kwargs = sample.make(dtype, "cuda")
            if "max_steps" in kwargs:
                kwargs["max_steps"] = 4
            getattr(gti, op)(*args, **kwargs, backend=backend)
            if op == "power_iteration":
                several = [w for w in args[0] if min(w.shape[0], w[0].numel()) > 2]
                gti.power_iteration(several, **kwargs, k=3, backend=backend)
        if op == "power_iteration":  # a block, a cluster, a quarter of the device and all of it
            shapes = (20, 30), (300, 301), (1100, 1000), (9, 30_000)
            ws = [torch.randn(s, device="cuda").to(dtype) for s in shapes]
            gti.power_iteration(ws, max_steps=2, backend=backend)


wanted = sys.argv[1:] or PARTS
if unknown := set(wanted) - set(PARTS):
    sys.exit(f"expected some of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
for backend in ("cuda", "triton"):
    if gti.available()[backend] is not None:
        continue
    for part in wanted:
        if part == "PhaseSpace":
            step_plans(backend)
        elif (BY_NAME[part].stem, backend) in BUILT:
            run_samples(part, backend)
        torch.cuda.synchronize()
        print(part, backend, flush=True)
