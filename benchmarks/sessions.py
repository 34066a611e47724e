"""Long random sessions on one model: does everything stay packed and right, and how many graphs does it take?

    python -m benchmarks.sessions [--sessions 3] [--calls 30]        or `make test-sessions`

A session is a random sequence of calls: prompts, steps, padding, beams, prompt look-up, chunked prompts, crops, chats
that go on, growing and static caches, autocast, inference mode; on a tiny model with 8-bit caches. Each call is
compared with the dense model's (tests/models/test_session.py). A row counts the graphs of all calls, those that dynamo
makes of the same session with `backend="eager"` and dense caches, and the kinds of calls that dynamo's guards tell
apart whatever a backend does, so that no backend needs fewer graphs: `no_grad`, `inference_mode` or autocast; which
arguments are given, by position or by name; the class of the cache, and whether it is filled; one row or several; one
token or several. Graphs beyond these come from sizes that are constants until they are seen to change.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch._dynamo.testing import CompileCounter

from benchmarks.envelope import write
from tests.models.common import FAMILIES
from tests.models.test_session import Call, check_session, run, sessions
from tests.passes.common import OPTIONS

SETTINGS = {"None": None, "True": True, "False": False}  # of torch.compile's `dynamic`


def drawn(number: int, calls: int) -> list[Call]:
    """Session `number`, always the same."""
    found: list[list[Call]] = []

    @seed(number)
    @settings(max_examples=2, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
    @given(sessions(calls))
    def draw(session: list[Call]) -> None:
        found.append(session)

    draw()
    return found[-1]


def graphs_of_dynamo(session: list[Call], dynamic: bool | None) -> int:
    torch._dynamo.reset()
    model, counter = FAMILIES["llama"].build(), CompileCounter()
    model.compile(backend=counter, dynamic=dynamic)
    with torch._dynamo.config.patch(recompile_limit=1 << 10, accumulated_recompile_limit=1 << 10):
        for call in session:
            run(model, call)
    return int(counter.frame_count)


def kinds_of_calls(session: list[Call]) -> int:
    """How many kinds of calls a session makes to the model that dynamo cannot serve with one graph."""
    model, found = FAMILIES["llama"].build(), set()

    def note(model: Any, args: Any, kwargs: Any) -> None:
        ids, cache = args[0] if args else kwargs["input_ids"], kwargs["past_key_values"]
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), ids.is_inference()
        sizes = ids.shape[0] > 1, ids.shape[1] > 1
        found.add((*modes, len(args), *sorted(kwargs), type(cache), cache.layers[0].is_initialized, *sizes))

    model.register_forward_pre_hook(note, with_kwargs=True)
    for call in session:
        run(model, call)
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--rest", nargs="+", default=["eager", "inductor"])
    parser.add_argument("--dynamic", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for rest in arguments.rest:
        for dynamic in map(SETTINGS.__getitem__, arguments.dynamic):
            for number in range(arguments.sessions):
                session = drawn(number, arguments.calls)
                row = {"rest": rest, "dynamic": dynamic, "session": number, "calls": len(session)}
                try:
                    row["graphs"] = check_session(session, options={**OPTIONS, "rest": rest}, dynamic=dynamic)
                    row["result"] = "packed and right"
                except Exception as error:
                    row["result"] = f"{type(error).__name__}: {error}"
                row["kinds of calls"] = kinds_of_calls(session)
                row["graphs of dynamo alone"] = graphs_of_dynamo(session, dynamic)
                print(row, flush=True)
                rows.append(row)
                write("sessions", rows, packages=("transformers", "hypothesis"))
    if any(row["result"] != "packed and right" for row in rows):
        sys.exit("a session failed")


if __name__ == "__main__":
    main()
