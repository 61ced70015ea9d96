"""gti_kernels: kernels that measure the geometry of neural-network training.

Three families, each a plain function on tensors: singular values of many weights
(`power_iteration`, `top_singular_values`), in-place symplectic steps (`kick_`, `drift_`,
`kick_drift_`, `kinetic_energy`, `leapfrog_`) and the symplectic 2-form (`two_form`). On top of them
the probes and the certificate (`HamiltonianSystem`, `round_trip`, `omega_invariance`,
`energy_drift`, `certify`). `explain`, `available` and `build_info` tell what runs where.
"""

__version__ = "0.1.0"

from .backends import available, build_info, explain
from .ops.kinetic_energy import kinetic_energy
from .ops.leapfrog import drift_, kick_, kick_drift_, leapfrog_
from .ops.power_iteration import SingularTriples, power_iteration, top_singular_values
from .ops.two_form import TwoForm, two_form

__all__ = [
    "SingularTriples",
    "TwoForm",
    "available",
    "build_info",
    "drift_",
    "explain",
    "kick_",
    "kick_drift_",
    "kinetic_energy",
    "leapfrog_",
    "power_iteration",
    "top_singular_values",
    "two_form",
]
