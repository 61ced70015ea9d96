"""The models, their normalisations, and the data they are trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gti_kernels.models.data import load_images
from gti_kernels.models.mlp import MLP
from gti_kernels.models.normalization import REGIMES, normalization
from gti_kernels.models.resnet18 import ResNet18
from gti_kernels.models.simple_cnn import SimpleCNN


@pytest.mark.parametrize("norm", REGIMES)
@pytest.mark.parametrize("build", [lambda n: MLP(64, 10, n), lambda n: SimpleCNN(1, 10, n)])
def test_logits_and_gradients(build, norm):
    model = build(norm)
    out = model(torch.randn(5, 1, 8, 8))
    assert out.shape == (5, 10)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_resnet18_has_the_published_size():
    parameters = list(ResNet18(3, 10, "batch").parameters())
    assert len(parameters) == 62
    assert sum(p.numel() for p in parameters) == 11_173_962
    assert sum(p.ndim >= 2 for p in parameters) == 21


def test_resnet18_without_normalisation_starts_with_empty_branches():
    model = ResNet18(1, 10, "none")
    out = model(torch.randn(2, 1, 8, 8))
    assert out.shape == (2, 10) and bool(out.isfinite().all())
    assert all(not block.branch[3].weight.any() for block in model.blocks)


def test_normalisations():
    assert isinstance(normalization("none", 8), nn.Identity)
    assert isinstance(normalization("group", 8), nn.GroupNorm)
    for norm in ("batch", "running", "frozen"):
        assert isinstance(normalization(norm, 8), nn.BatchNorm2d)
        assert isinstance(normalization(norm, 8, dims=0), nn.BatchNorm1d)
    with pytest.raises(ValueError, match="norm: expected one of"):
        normalization("layer", 8)


def test_digits_are_standardised_images():
    pytest.importorskip("sklearn")
    data = load_images("digits")
    assert data.x.shape == (1797, 1, 8, 8) and data.x.dtype == torch.float32
    assert data.classes == 10 and data.y.dtype == torch.int64
    assert float(data.x.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(data.x.std()) == pytest.approx(1.0, abs=1e-4)


def test_npz_and_batches(tmp_path):
    path = tmp_path / "data.npz"
    x = np.arange(10 * 3 * 4 * 4, dtype=np.uint8).reshape(10, 3, 4, 4)
    np.savez(path, x=x, y=np.arange(10) % 3)
    data = load_images(str(path))
    assert data.x.shape == (10, 3, 4, 4) and data.classes == 3
    batches = data.batches(4, 5, seed=1)
    assert [len(y) for _, y in batches] == [4] * 5
    again = data.batches(4, 5, seed=1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again))
    first_ten = torch.cat([x for x, _ in batches])[:10].flatten(1).sort(0)[0]
    assert torch.equal(first_ten, data.x.flatten(1).sort(0)[0])  # each image once per epoch


X, Y = np.zeros((4, 8, 8)), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": X, "y": Y}, r"x missing.*the file has \['images', 'y'\]"),
        ({"x": X}, "y missing"),
        ({}, "x and y missing.*none"),
        ({"x": X[0], "y": Y}, r"x: expected real numbers \[n, H, W\]"),
        ({"x": X, "y": Y[:3]}, "as many images as labels.*4 and 3"),
        ({"x": X, "y": Y * 1.0}, "y: expected integers"),
        ({"x": X, "y": Y - 1}, "labels 0, 1, 2.*got -1"),
        ({"x": X * np.nan, "y": Y}, "finite"),
        ({"x": np.array([object()] * 4), "y": Y}, "plain number arrays"),
    ],
)
def test_bad_npz_files_say_what_is_wrong(tmp_path, arrays, words):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=words):
        load_images(str(path))


def test_files_that_are_no_npz(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_images(str(tmp_path / "absent.npz"))
    path = tmp_path / "text.npz"
    path.write_text("hello")
    with pytest.raises(ValueError, match="expected an"):
        load_images(str(path))
    array = tmp_path / "array.npy"
    np.save(array, X)
    with pytest.raises(ValueError, match="one bare array"):
        load_images(str(array))
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="could not read it"):
        load_images(str(path))
