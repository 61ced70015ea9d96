"""Ctrl-C between two lines that belong together."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` takes 40 times as long, in its enums
import threading
from typing import Any


class Uninterrupted:
    """`with Uninterrupted():` — a Ctrl-C that comes inside is raised at the end, of the outermost.

    Signals reach the main thread alone, so in others there is nothing to do.
    """

    def __enter__(self) -> None:
        self._handler: Any = None
        self._came: tuple[Any, ...] | None = None
        if threading.current_thread() is threading.main_thread():
            handler = _signal.getsignal(_signal.SIGINT)
            inside = getattr(handler, "__func__", None) is Uninterrupted._note
            if callable(handler) and not inside:  # else Python raises nothing
                self._handler = handler
                _signal.signal(_signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._handler is None:
            return
        _signal.signal(_signal.SIGINT, self._handler)
        if self._came is not None:
            self._handler(*self._came)

    def _note(self, *came: Any) -> None:
        self._came = came
