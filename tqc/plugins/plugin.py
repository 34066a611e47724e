"""What a plugin is: a method from a paper in one file, as a small class with a name and typed parameters."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Plugin:
    """Base of all plugins. A subclass is a frozen dataclass whose fields are its parameters, all with defaults.

    Its text, as `snapkv(queries=16)`, names it in the format of a cache, so that a cache that was saved goes on with
    what it began with.

    Attributes:
        name: what options call it.
        kind: what it is for, e.g. "scorer".
        paper: where it is from; "" for none.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> Plugin:
        """One with these parameters.

        Raises:
            ValueError: for a parameter that it does not have, naming the nearest, or a value that is not allowed.
            TypeError: for a value of another type.
        """
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        for name, value in parameters.items():
            if name not in names:
                has = f"its parameters are {', '.join(names)}" if names else "it has none"
                raise ValueError(f"{cls.kind} {cls.name} has no parameter {name!r}{nearest(name, names)}; {has}")
            wanted = hints[name]
            fits = isinstance(value, (int, float) if wanted is float else wanted)
            if not fits or (isinstance(value, bool) and wanted is not bool):
                raise TypeError(f"{name} of {cls.kind} {cls.name} must be {_article(wanted)}, got {value!r}")
        made = cls(**parameters)
        made.check()
        return made

    def check(self) -> None:
        """Raise ValueError, by way of `require`, for parameters that are not allowed."""

    def require(self, name: str, allowed: bool, what: str) -> None:
        if not allowed:
            raise ValueError(f"{name} of {self.kind} {self.name} must be {what}, got {getattr(self, name)!r}")

    def __str__(self) -> str:
        values = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return (
            f"{self.name}({','.join(f'{field.name}={value!r}' for field, value in values if value != field.default)})"
        )


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters that `str` of a plugin wrote. Raises ValueError."""
    try:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
        return call.func.id, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, AssertionError, ValueError):
        raise ValueError(f"malformed plugin {text!r}: it must read as name(parameter=value)") from None


def nearest(name: Any, valid: Any) -> str:
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _article(kind: type) -> str:
    return {int: "an int", float: "a number", bool: "True or False", str: "a string"}.get(kind, kind.__name__)
