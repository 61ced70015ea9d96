"""The Triton kernels without a GPU: triton_cases.py under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_cases_pass_in_the_interpreter() -> None:
    # A process of its own: the variable must be set before triton is imported.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(CASES)], env=environment, capture_output=True, text=True, timeout=900
    )
    out = done.stdout + done.stderr
    # 5: nothing was collected, this Triton is too old for the cases
    assert done.returncode in (0, 5), out[-6000:]
    if " passed" not in out:
        pytest.skip(out[-300:])
