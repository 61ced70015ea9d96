"""Batch normalisation as a pure function: no buffer is written, statistics carry tangents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

#: mean and unbiased variance of a layer's input over the batch, [C] each
Moments = tuple[Tensor, Tensor]


def tracked_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of `model` that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@contextmanager
def functional_normalization(
    layers: dict[str, _BatchNorm], running: dict[str, Tensor] | None = None
) -> Iterator[dict[str, list[Moments]]]:
    """Inside the block the layers are pure functions of their input, parameters and `running`.

    running: buffers by name; the layers normalise by these running statistics. None: by the moments
    of the batch, as in train mode. Yields a dict to which each forward pass adds these moments,
    by layer name. Unlike torch's own layers, which update running statistics in place and refuse
    tangents in them, these can be differentiated, pushed forward and vmapped.
    """
    moments: dict[str, list[Moments]] = {}

    def hook_of(name: str):
        def hook(layer: _BatchNorm, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            x = args[0]
            if running is not None:
                mean, var = running[join(name, "running_mean")], running[join(name, "running_var")]
                return _affine(layer, x, mean, var)
            dims = [0, *range(2, x.ndim)]
            moments.setdefault(name, []).append((x.mean(dims), x.var(dims, unbiased=True)))
            return F.batch_norm(
                x, None, None, layer.weight, layer.bias, training=True, eps=layer.eps
            )

        return hook

    flags = {name: layer.training for name, layer in layers.items()}
    handles = []
    try:
        for name, layer in layers.items():
            layer.training = (
                False  # in train mode the layer would write its buffers before the hook
            )
            handles.append(layer.register_forward_hook(hook_of(name)))
        yield moments
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.training = flags[name]


def join(layer: str, buffer: str) -> str:
    """The buffer's name in the whole model; the model itself has the name ""."""
    return f"{layer}.{buffer}" if layer else buffer


def _affine(layer: _BatchNorm, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale = torch.rsqrt(var + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight
    y = (x - mean.reshape(shape)) * scale.reshape(shape)
    return y if layer.bias is None else y + layer.bias.reshape(shape)
