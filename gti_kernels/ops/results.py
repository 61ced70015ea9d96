"""Results of several tensors, most of them made when they are first read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typing_extensions import Self


class Field:
    """One tensor of a `Result`. A plain attribute of the same name comes before it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, result: Any, owner: type) -> Any:
        if result is None:
            return self
        value = getattr(result._kernel, self.name)
        result.__dict__[self.name] = value
        return value


class Result:
    """Named tensors, read by name or, like a tuple, in order.

    A compiled kernel on small matrices takes less time than making its result tensors, so of
    `from_kernel` the first field is made at once and each other when it is first read.
    """

    _fields: tuple[str, ...] = ()
    _first: str
    _kernel: Any  # a result of the compiled module

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(name for name, x in vars(cls).items() if isinstance(x, Field))
        cls._first = cls._fields[0]

    def __init__(self, *values: Any) -> None:
        for name, value in zip(self._fields, values, strict=True):
            setattr(self, name, value)

    @classmethod
    def from_kernel(cls, first: Any, kernel: Any) -> Self:
        """The first field, and the result of the compiled module that has the others."""
        result = cls.__new__(cls)
        setattr(result, cls._first, first)
        result._kernel = kernel
        return result

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index]

    def _replace(self, **changes: Any) -> Self:
        """The same with other values of some fields."""
        values = {name: getattr(self, name) for name in self._fields} | changes
        return type(self)(*values.values())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields)
        return f"{type(self).__name__}({fields})"
