"""ResNet-18 for small images."""

from __future__ import annotations

from torch import Tensor, nn

from .normalization import normalization


class ResNet18(nn.Module):
    """He et al., Deep residual learning (2016), 18 layers, with a 3×3 stem of stride 1 and no
    max-pool.

    [B, channels, H, W] -> logits [B, classes]. With 3 channels, 10 classes and a normalisation: 62
    parameter tensors, 11.2 million numbers, 21 of them matrices. Without a normalisation each
    residual branch starts at zero (last convolution), as otherwise activations double from block to
    block.
    """

    def __init__(self, channels: int, classes: int, norm: str = "batch") -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1, bias=False), normalization(norm, 64), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        inputs = 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [Block(inputs, outputs, stride, norm), Block(outputs, outputs, 1, norm)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    """y = ReLU(x' + branch(x)); x' is x, or a 1×1 convolution of it where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        last = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if norm == "none":
            nn.init.zeros_(last.weight)
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            normalization(norm, outputs),
            nn.ReLU(),
            last,
            normalization(norm, outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                normalization(norm, outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.shortcut(x) + self.branch(x))
