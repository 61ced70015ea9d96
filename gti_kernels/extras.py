"""Optional packages: imported when they are used, with an error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, purpose: str, extra: str = "probes") -> ModuleType:
    """The module, or an ImportError that names what needs it and the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module if module.startswith("cuda.") else module.split(".")[0]
        raise ImportError(
            f'{purpose} needs {package}, which is not installed; pip install "gti_kernels[{extra}]"'
        ) from error
