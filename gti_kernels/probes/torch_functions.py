"""Functions of torch as a system calls them: the same values and draws under every transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_RANDOM = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    F.rrelu,
    torch.dropout,
    torch.alpha_dropout,
    torch.feature_dropout,
    torch.feature_alpha_dropout,
    torch.rrelu,
    torch.bernoulli,
    torch.rand_like,
    torch.randn_like,
    torch.randint_like,
    Tensor.bernoulli,
}

_SPARSE = {F.embedding: 6, F.embedding_bag: 7}  #: place of the argument `sparse`


class PlainFunctions(TorchFunctionMode):
    """Inside the block a draw belongs to an entry of a tensor, and what torch differentiates twice
    without an error, but wrong or not at all, is made of plain operations.

    torch fills memory with random numbers in the order of addresses. Transforms (jvp, vmap) may lay
    out an activation in another order, and dropout would then take another mask: so random
    functions see contiguous tensors. (In-place dropout keeps the layout it was given.) Weight norm
    is v·(g/‖v‖): torch's own, twice differentiated, gives a Hessian that is not symmetric (torch
    2.13), and has no forward rule. The mean of mse_loss is taken after its squares: forward over
    reverse of torch's own refuses a target that is constant. Embeddings have dense gradients.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inplace = kwargs.get("inplace", len(args) > 3 and args[-1] is True)
        if func in _RANDOM and not inplace:
            args = tuple(_contiguous(x) for x in args)
            kwargs = {name: _contiguous(x) for name, x in kwargs.items()}
        elif func in _SPARSE:
            args = (*args[: _SPARSE[func]], False, *args[_SPARSE[func] + 1 :])[: len(args)]
            kwargs = {**kwargs, "sparse": False} if "sparse" in kwargs else kwargs
        elif func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        elif func is F.mse_loss and len(args) < 3 and _is_plain_mean(kwargs):
            return func(*args, **{**kwargs, "reduction": "none"}).mean()
        return func(*args, **kwargs)


def _is_plain_mean(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("reduction", "mean") == "mean" and kwargs.get("weight") is None


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) else x


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))
