"""Results of several tensors, most of them made when they are first read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from .. import backends


class Field:
    """One tensor of a `Result`. A plain attribute of the same name comes before it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, result: Any, owner: type) -> Any:
        if result is None:
            return self
        assert backends.compiled is not None
        value = backends.compiled.field(result._kernel, self.name)
        result.__dict__[self.name] = value
        return value


class Result:
    """Named tensors, read by name or, like a tuple, in order.

    A compiled kernel on small matrices takes less time than making its result tensors, so of
    `from_kernel` the first field is made at once and each other when it is first read.
    """

    _fields: tuple[str, ...] = ()
    _kernel: Any  # a result of the compiled module

    #: (the first field, the result of the compiled module that has the others) → a result
    from_kernel: ClassVar[Callable[[Any, Any], Any]]

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(name for name, x in vars(cls).items() if isinstance(x, Field))
        first = cls._fields[0]
        new = cls.__new__

        def from_kernel(value: Any, kernel: Any) -> Any:
            result = new(cls)
            setattr(result, first, value)
            result._kernel = kernel
            return result

        cls.from_kernel = staticmethod(from_kernel)

    def __init__(self, *values: Any) -> None:
        for name, value in zip(self._fields, values, strict=True):
            setattr(self, name, value)

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index]

    def _replace(self, **changes: Any) -> Any:
        """The same with other values of some fields."""
        values = {name: getattr(self, name) for name in self._fields} | changes
        return type(self)(*values.values())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields)
        return f"{type(self).__name__}({fields})"
