"""Dynamo's limit of graphs a function, behind which calls of a new kind run uncompiled and their caches stay dense.

A model with a cache has more kinds of calls than the default of 8 foresees: a prompt and a step, each with and without
padding, one row and several, growing and preallocated caches, autocast, inference mode. So the limit is raised, and
should it be met all the same, that is said.
"""

from __future__ import annotations

import logging

from tqc import torch_private

log = logging.getLogger(__name__)
GRAPHS = 128
_frames: set[int] = set()
_met: list[str] = []


def install() -> None:
    """Raise the limit, unless it is not torch's default, and hear of it being met."""
    torch_private.raise_recompile_limit(GRAPHS)
    torch_private.on_recompile_limit(_say)


def count(frame: int | None) -> None:
    """Note that the frame of dynamo's that is being compiled is a model of ours."""
    if frame is not None:
        _frames.add(frame)


def forget() -> None:
    """Dynamo was reset, and counts its frames anew."""
    _frames.clear()


def met() -> list[str]:
    """Where the limit was met in this process, a sentence each."""
    return list(_met)


def _say(frame: int | None, limit: str, value: int, function: str, reason: str) -> None:
    if frame not in _frames:
        return
    sentence = (
        f"torch._dynamo.config.{limit} ({value} graphs) is reached for {function}: calls of a new kind run uncompiled "
        f"from now on, and their caches stay dense. Raise the limit, or find out what varies: {reason.strip()}"
    )
    _met.append(sentence)
    log.warning("%s", sentence)
