"""What every runner does with its peer: prefill and decode the same tokens at each context, and report.

A runner is a script `run_PEER.py JOB`, where JOB is a JSON object (see `generate_peers.py`). It runs in the environment
of its peer, so this module uses the standard library only. Each context gives one line of JSON on the standard output:

    {"context", "prefill_s", "step_ms", "peak_mb", "tokens": [the most likely token after each step]}

Decoding is teacher-forced: whatever a peer predicts, it is given the text's next token, so all do the same work, and
their predictions can be compared.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

WARM_UP_STEPS = 4


def job() -> dict[str, Any]:
    """The job that this process was started for."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    return given


def measure(
    given: dict[str, Any], prefill: Callable[[list[int]], int], step: Callable[[int], int], versions: dict[str, str]
) -> None:
    """Measure all contexts of the job, shortest first.

    Args:
        given: the job; of it "tokens", a file with the text's token ids, "contexts" and "steps" are used.
        prefill: forgets all before, reads the tokens, and returns the most likely next one.
        step: reads one more token, and returns the most likely next one.
        versions: of the packages that matter, for the results.
    """
    with open(given["tokens"]) as file:
        ids = json.load(file)
    for context in sorted(given["contexts"]):
        begin = time.perf_counter()
        tokens = [prefill(ids[:context])]
        prefill_s = time.perf_counter() - begin
        times = []
        for token in ids[context : context + WARM_UP_STEPS + given["steps"]]:
            begin = time.perf_counter()
            tokens.append(step(token))
            times.append(time.perf_counter() - begin)
        report(context, prefill_s, times[WARM_UP_STEPS:], tokens, versions)


def report(context: int, prefill_s: float, times: list[float], tokens: list[int], versions: dict[str, str]) -> None:
    """Print the line of one context; `times` are seconds, one per token."""
    found = {
        "context": context,
        "prefill_s": prefill_s,
        "step_ms": 1e3 * statistics.median(times),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "tokens": tokens,
        "versions": versions,
    }
    print(json.dumps(found), flush=True)
