"""The normalisations that the models offer, and the regime that a probe runs them in."""

from __future__ import annotations

from torch import nn

#: normalisation -> regime of `HamiltonianSystem`. "running" and "frozen" are BatchNorm models, too:
#: what differs is which statistics the force sees.
REGIMES = {
    "none": "batch",
    "group": "batch",
    "batch": "batch",
    "running": "running",
    "frozen": "frozen",
}


def normalization(norm: str, channels: int, *, dims: int = 2) -> nn.Module:
    """The normalisation layer over [B, channels] (dims=0) or [B, channels, H, W] (dims=2)."""
    if norm not in REGIMES:
        raise ValueError(f"norm: expected one of {tuple(REGIMES)}, got {norm!r}")
    if norm == "none":
        return nn.Identity()
    if norm == "group":
        return nn.GroupNorm(min(4, channels), channels)
    return nn.BatchNorm2d(channels) if dims == 2 else nn.BatchNorm1d(channels)
