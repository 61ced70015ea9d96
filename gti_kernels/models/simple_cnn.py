"""A small convolutional network."""

from __future__ import annotations

from torch import Tensor, nn

from .normalization import normalization


class SimpleCNN(nn.Module):
    """Conv 3×3–norm–ReLU three times, halving the image after the first two; mean over pixels;
    Linear.

    [B, channels, H, W] -> logits [B, classes], H and W at least 4.
    """

    def __init__(self, channels: int, classes: int, norm: str = "none", width: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_block(channels, width, norm),
            nn.AvgPool2d(2),
            *_block(width, 2 * width, norm),
            nn.AvgPool2d(2),
            *_block(2 * width, 4 * width, norm),
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def _block(inputs: int, outputs: int, norm: str) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm == "none"),
        normalization(norm, outputs),
        nn.ReLU(),
    ]
