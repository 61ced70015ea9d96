"""What a probe borrows from the caller and gives back: training flags and random state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def random_state(device: torch.device) -> list[Tensor]:
    """The states of the generators of the CPU and, where it is another, of `device`."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """The generators of the CPU and of `device` leave the block as they entered it."""
    cpu, *cuda = random_state(device)
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        for state in cuda:
            torch.cuda.set_rng_state(state, device)


@contextmanager
def preserved_training_flags(model: nn.Module) -> Iterator[None]:
    """The training flag of every submodule leaves the block as it entered it."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed the generators that forward passes on `device` draw from, and no others."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        torch.cuda.default_generators[index].manual_seed(seed)


def kept_values(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """A function that gives back their values of now to those tensors that were written since."""
    kept = [(x, x._version, x.clone()) for x in tensors]

    def restore() -> None:
        with torch.no_grad(), torch._C._DisableFuncTorch():
            for x, version, value in kept:
                if x._version != version:
                    x.copy_(value)

    return restore
