"""A multilayer perceptron."""

from __future__ import annotations

from torch import Tensor, nn

from .normalization import normalization


class MLP(nn.Module):
    """Linear–norm–ReLU twice, then Linear: [B, features...] -> logits [B, classes]."""

    def __init__(self, features: int, classes: int, norm: str = "none", width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(features, width, bias=norm == "none"),
            normalization(norm, width, dims=0),
            nn.ReLU(),
            nn.Linear(width, width, bias=norm == "none"),
            normalization(norm, width, dims=0),
            nn.ReLU(),
            nn.Linear(width, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
