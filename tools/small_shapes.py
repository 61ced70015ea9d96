"""Each op on each GPU backend, on small shapes: what compute-sanitizer watches."""

import torch

import gti_kernels as gti
from gti_kernels import testing
from gti_kernels.rows import BUILT, ROWS

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
