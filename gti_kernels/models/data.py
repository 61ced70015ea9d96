"""Labelled images: scikit-learn's digits, or an .npz file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelledImages:
    """x: images [n, C, H, W] fp32, mean 0 and variance 1 over everything; y: labels [n] int64."""

    x: Tensor
    y: Tensor
    classes: int

    def batches(self, size: int, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        """`count` batches of `size` images in a random order, starting over when the data end."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.x), generator=generator)
        rows = order.repeat(-(-size * count // len(order)))[: size * count].split(size)
        return [(self.x[i], self.y[i]) for i in rows]


def load_images(source: str) -> LabelledImages:
    """ "digits": scikit-learn's 1,797 images of 8×8 (no download); else the path of an .npz file.

    The file holds x, numbers [n, H, W] or [n, C, H, W], and y, integer labels [n] from 0. Raises
    FileNotFoundError or ValueError that says what is missing or wrong in it.
    """
    if source == "digits":
        return _standardized(*_digits())
    return _standardized(*_npz(Path(source)))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn, which is not installed; "
            'pip install "gti_kernels[probes]", or give an .npz file with --data PATH'
        ) from error
    digits = load_digits()
    return digits.images, digits.target


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(
            f'data: expected "digits" or the path of an .npz file with x and y, '
            f"got {str(path)!r}, where there is no file"
        )
    try:
        # No pickles: a data file must not be able to run code.
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it holds one bare array")
        with loaded as file:
            arrays = {key: file[key] for key in file.files}
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"data {path}: expected an .npz archive of plain number arrays x and y, "
            f"could not read it ({error}); write it with numpy.savez(path, x=..., y=...)"
        ) from error
    missing = [key for key in ("x", "y") if key not in arrays]
    if missing:
        raise ValueError(
            f"data {path}: {' and '.join(missing)} missing; expected the arrays x (images) and "
            f"y (labels), the file has {sorted(arrays) or 'none'}; "
            f"write it with numpy.savez(path, x=..., y=...)"
        )
    return _checked(path, arrays["x"], arrays["y"])


def _checked(path: Path, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.ndim not in (3, 4) or not np.issubdtype(x.dtype, np.number) or np.iscomplexobj(x):
        raise ValueError(
            f"data {path}: x: expected real numbers [n, H, W] or [n, C, H, W], "
            f"got {x.dtype} {list(x.shape)}"
        )
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"data {path}: y: expected integers [n], got {y.dtype} {list(y.shape)}")
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"data {path}: expected as many images as labels, at least 2, got {len(x)} and {len(y)}"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"data {path}: x: expected finite numbers, got NaN or infinity")
    if y.min() < 0:
        raise ValueError(f"data {path}: y: expected labels 0, 1, 2, ..., got {y.min()}")
    return x, y


def _standardized(x: np.ndarray, y: np.ndarray) -> LabelledImages:
    images = torch.as_tensor(np.asarray(x, dtype=np.float64))
    if images.ndim == 3:
        images = images.unsqueeze(1)
    images = (images - images.mean()) / images.std().clamp(min=1e-12)
    labels = torch.as_tensor(np.asarray(y, dtype=np.int64))
    return LabelledImages(images.float(), labels, int(labels.max()) + 1)
