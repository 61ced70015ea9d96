"""Ctrl-C between two lines that belong together."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` takes 14 µs more, in its enums
from typing import Any


class Uninterrupted:
    """`with Uninterrupted():` — a Ctrl-C that comes inside is raised at the end; at that of the
    outermost, where the handler of an inner one is `_note` of another.

    Signals reach the main thread alone, so in others there is nothing to do.
    """

    _handler: Any = None
    _came: tuple[Any, ...] | None = None

    def __enter__(self) -> None:
        handler = _signal.getsignal(_signal.SIGINT)
        if callable(handler):  # else Python raises nothing
            self._handler = handler
            try:
                _signal.signal(_signal.SIGINT, self._note)
            except ValueError:  # in another thread
                self._handler = None

    def __exit__(self, *_: object) -> None:
        if self._handler is None:
            return
        _signal.signal(_signal.SIGINT, self._handler)
        if self._came is not None:
            self._handler(*self._came)

    def _note(self, *came: Any) -> None:
        self._came = came
