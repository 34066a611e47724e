"""Graphs that dynamo makes, how often it makes them, and the tensors that stand for others in them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from tqc.torch_private.lookup import find
from tqc.torch_private.needs import LIMIT, lacking

# Fake tensor or symbolic int that a node gives. torch.export has `val`, but dynamo's own graphs are what backends get.
EXAMPLE_VALUE = "example_value"
# The modules that a node was traced in; torch.export documents the same name.
MODULE_STACK = "nn_module_stack"
# Attributes of an input tensor, `STATIC_INPUT` among them for one of `mark_static_address`. No public way.
TENSOR_DICT = "tensor_dict"
STATIC_INPUT = "_dynamo_static_input_type"


def detect_fake_mode(examples: Any) -> Any:
    """The mode of fake tensors: the tracing context's, else that of the examples; None without. No public way."""
    detect = find("torch._guards.detect_fake_mode")
    return detect(examples) if detect else None


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    """Real tensors while something is traced with fake ones. No public way."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def raise_recompile_limit(graphs: int) -> None:
    """Let dynamo make this many graphs of one function, if nobody has changed its own limit. The setting is public, but
    for the name of the module; `torch.compile(recompile_limit=...)`, from 2.13 on, is the user's."""
    config = find("torch._dynamo.config")
    if not lacking(LIMIT) and config.recompile_limit == 8:
        config.recompile_limit = graphs


def frame_number() -> int | None:
    """A number of the function that dynamo compiles at the moment, the same at each recompilation. No public way."""
    compiling = None if lacking(LIMIT) else find("torch._guards.CompileContext").current_compile_id()
    return compiling.frame_id if compiling else None


def on_recompile_limit(listener: Callable[[int | None, str, int, str, str], None]) -> None:
    """Call `listener` with the function's `frame_number`, the setting's name, its value, the function in words and the
    last reason when dynamo gives up on a function. There is no event for it, public or not, but a log record."""

    def listen(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("torch._dynamo hit config.") and isinstance(record.args, tuple):
            limit, value, function, reason, *_ = record.args
            listener(frame_number(), str(limit), int(str(value)), str(function), str(reason))
        return True

    logging.getLogger("torch._dynamo.convert_frame").addFilter(listen)
