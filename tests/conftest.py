"""Settings of torch that a test may change are as before after it."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The one test that takes minutes goes first, or the other processes would wait for it."""
    items.sort(key=lambda item: item.path.name != "test_triton_interpreter.py")


@pytest.fixture(autouse=True)
def settings_as_before():
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
