"""Each op on each GPU backend, on small shapes: what compute-sanitizer watches."""

import torch

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.rows import BUILT, ROWS


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


for backend in ("cuda", "triton"):
    if gti.available()[backend] is None:
        step_plans(backend)
        torch.cuda.synchronize()
        print("PhaseSpace", backend)

for row in ROWS:
    for backend in ("cuda", "triton"):
        if (row.stem, backend) not in BUILT or gti.available()[backend] is not None:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for sample in testing.samples(row.name):
                args, kwargs = sample.make(dtype, "cuda")
                if "max_steps" in kwargs:
                    kwargs["max_steps"] = 4
                getattr(gti, row.name)(*args, **kwargs, backend=backend)
                if row.name == "power_iteration":
                    several = [w for w in args[0] if min(w.shape[0], w[0].numel()) > 2]
                    gti.power_iteration(several, **kwargs, k=3, backend=backend)
        torch.cuda.synchronize()
        print(row.name, backend)
