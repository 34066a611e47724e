"""What the commands write beside their results: a line that changes, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.status import Status


def stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def status_of(message: str) -> Iterator[Status]:
    with stderr().status(message) as status:
        yield status
