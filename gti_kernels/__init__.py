"""gti_kernels: kernels that measure the geometry of neural-network training.

Three families, each a plain function on tensors: singular values of many weights
(`power_iteration`, `top_singular_values`) and of operators (`power_iteration_operator`), in-place
symplectic steps (`kick_`, `drift_`, `kick_drift_`, `kinetic_energy`, `leapfrog_`; as a plan with
exact reversal, `PhaseSpace`) and the symplectic 2-form (`two_form`; with it inner products,
`gram`). On top of them spectral regularisation (`nn.spectral_norm`, `SpectralPenalty`), the probes
and the certificate (`HamiltonianSystem`, `round_trip`, `omega_invariance`, `push_tangents`,
`energy_drift`, `certify`), and optimizers (`optim.Leapfrog`, `optim.BAOAB`, with `DriftRecorder`).
`explain`, `available` and `build_info` tell what runs where.
"""

__version__ = "0.1.0"

from . import nn, optim
from .backends import available, build_info, explain
from .ops.gram import Gram, gram
from .ops.kinetic_energy import kinetic_energy
from .ops.leapfrog import drift_, kick_, kick_drift_, leapfrog_
from .ops.power_iteration import SingularTriples, power_iteration, top_singular_values
from .ops.power_iteration_operator import power_iteration_operator
from .ops.two_form import TwoForm, two_form
from .optim.drift_recorder import DriftRecorder
from .phase_space import PhaseSpace
from .probes.certificate import Certificate, Thresholds, certify
from .probes.dose_response import dose_response
from .probes.energy_drift import drift_slope, energy_drift
from .probes.hamiltonian_system import HamiltonianSystem
from .probes.omega_invariance import omega_invariance
from .probes.push_tangents import push_tangents, volume_change
from .probes.round_trip import round_trip
from .probes.subspaces import darboux_pairs
from .spectral_penalty import SpectralPenalty

__all__ = [
    "Certificate",
    "DriftRecorder",
    "Gram",
    "HamiltonianSystem",
    "PhaseSpace",
    "SingularTriples",
    "SpectralPenalty",
    "Thresholds",
    "TwoForm",
    "available",
    "build_info",
    "certify",
    "darboux_pairs",
    "dose_response",
    "drift_",
    "drift_slope",
    "energy_drift",
    "explain",
    "gram",
    "kick_",
    "kick_drift_",
    "kinetic_energy",
    "leapfrog_",
    "nn",
    "omega_invariance",
    "optim",
    "power_iteration",
    "power_iteration_operator",
    "push_tangents",
    "round_trip",
    "top_singular_values",
    "two_form",
    "volume_change",
]
