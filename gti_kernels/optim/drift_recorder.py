"""The energy of a training run, recorded without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..probes.arguments import whole
from ..probes.energy_drift import tail_drift
from .phase_optimizer import PhaseOptimizer

#: Records that stay on the device between two copies to the host.
_CAPACITY = 1024


class DriftRecorder:
    """Loss and energy of each step of any torch optimizer, and their drift D.

        D = median over t in [⌊0.8 T⌋, T) of |H_{t+1} − H_t|

    H is `optimizer.energy()` of a `Leapfrog` or `BAOAB`: kinetic energy plus loss. For any other
    optimizer (AdamW, SGD with and without momentum) H is the loss: their buffers are no canonical
    momenta. `drift_slope` fits log₁₀ D = m log₁₀ dt + b over several runs.

    Call `record(loss)` once a step, after `optimizer.step`; of step(closure), which returns the
    loss at its beginning, H is taken with the one at its end, as momenta are. Loss and energy are
    copied into a buffer on their device; it goes to the host after every 1024 records, and when a
    result is read.

    Args:
        optimizer: the torch.optim.Optimizer that makes the steps.
        every: each `every`-th call is recorded, the first one included; the others cost nothing.
            D is then that of the recorded energies, which lie `every` steps apart.

    Raises TypeError, ValueError: the argument, what was expected, what came.

    >>> import torch, gti_kernels as gti
    >>> q = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    >>> optimizer = torch.optim.SGD([q], lr=0.1)
    >>> recorder = gti.DriftRecorder(optimizer)
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     loss = 0.5 * q.square().sum()
    ...     loss.backward()
    ...     optimizer.step()
    ...     recorder.record(loss)
    >>> [round(h, 3) for h in recorder.energies[:3]], round(recorder.drift(), 4)
    ([1.5, 1.215, 0.984], 0.059)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, every: int = 1) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        self.every = whole("every", every)
        self._calls = 0
        self._host: list[list[float]] = []
        self._device: Tensor | None = None  # [_CAPACITY, 2] fp64, loss and energy
        self._filled = 0

    def record(self, loss: Tensor) -> None:
        """Notes the loss (a tensor of one element) of the last step, and H after it: with that loss
        where the optimizer knows none of its own."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss: expected a tensor of one element, got {got}")
        self._calls += 1
        if (self._calls - 1) % self.every:
            return
        with torch.no_grad():
            loss = loss.detach().reshape(())
            energy = loss
            if isinstance(self.optimizer, PhaseOptimizer):
                energy = self.optimizer.energy(None if self.optimizer.knows_loss else loss)
            if self._device is None or self._device.device != loss.device:
                self._flush()
                self._device = loss.new_empty((_CAPACITY, 2), dtype=torch.float64)
            self._device[self._filled, 0] = loss
            self._device[self._filled, 1] = energy
        self._filled += 1
        if self._filled == _CAPACITY:
            self._flush()

    @property
    def losses(self) -> list[float]:
        """The recorded losses."""
        self._flush()
        return [loss for loss, _ in self._host]

    @property
    def energies(self) -> list[float]:
        """The recorded energies H."""
        self._flush()
        return [energy for _, energy in self._host]

    def drift(self) -> float:
        """D of the recorded energies H_0 … H_T, T >= 5; NaN when an energy of the tail is."""
        energies = self.energies
        if len(energies) < 6:
            raise ValueError(f"drift: expected at least 6 recorded energies, got {len(energies)}")
        return tail_drift(energies)

    def _flush(self) -> None:
        if self._device is not None and self._filled:
            self._host += self._device[: self._filled].tolist()
            self._filled = 0
