"""Ctrl-C between two lines that belong together."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` takes 40 times as long, in its enums
import threading
from typing import Any


class Uninterrupted:
    """`with Uninterrupted():` — a Ctrl-C that comes inside is raised at the end; at that of the
    outermost, where the handler of an inner one is `_note` of another.

    Signals reach the main thread alone, so in others there is nothing to do.
    """

    def __enter__(self) -> None:
        self._handler: Any = None
        self._came: tuple[Any, ...] | None = None
        if threading.current_thread() is threading.main_thread():
            handler = _signal.getsignal(_signal.SIGINT)
            if callable(handler):  # else Python raises nothing
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
