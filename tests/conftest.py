"""Settings of torch that a test may change are as before after it."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator

import pytest
import torch

CASES = pytest.StashKey[subprocess.Popen[str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Triton's interpreter is slow: where its test is wanted, it runs beside the others."""
    wanted = [item for item in session.items if item.path.name == "test_triton_interpreter.py"]
    collected_only = session.config.option.collectonly
    if wanted and not collected_only and importlib.util.find_spec("triton") is not None:
        session.stash[CASES] = wanted[0].module.start_cases()  # type: ignore[attr-defined]


@pytest.fixture
def triton_cases(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    process = request.session.stash[CASES]
    yield process
    process.kill()


@pytest.fixture(autouse=True)
def settings_as_before():
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
